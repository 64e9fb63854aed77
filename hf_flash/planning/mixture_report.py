"""`ExpertOutlook`: what the planner says of a mixture of experts, for people and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from hf_flash.base.sizes import format_bytes
from hf_flash.budget.expert_plan import ExpertPlan
from hf_flash.budget.plan import ceiling_bytes
from hf_flash.config import FlashOffloadConfig
from hf_flash.planning.measuring import Speeds


@dataclass(frozen=True)
class Expected:
    """What a token costs if experts are used again so often. Times in milliseconds per decoded token."""

    hit_rate: float  # assumed, or measured by calibrate
    read_bytes: float
    resident_ms: float  # everything that is not an expert
    read_ms: float
    hits_ms: float  # those in memory, multiplied while the others arrive
    missing_ms: float  # the others, afterwards

    @property
    def token_ms(self) -> float:
        return self.resident_ms + max(self.read_ms, self.hits_ms) + self.missing_ms


@dataclass(frozen=True)
class ExpertPoint:
    """What to expect of one budget."""

    budget_bytes: int
    capacity: int  # experts that a layer has slots for, on average
    typical: Expected
    uniform: Expected

    @property
    def token_ms(self) -> float:
        return self.typical.token_ms


@dataclass(frozen=True)
class ExpertOutlook:
    """What [`hf_flash.planning.planner.plan`] says of a mixture. Sizes in bytes, of experts as they lie in the checkpoint."""

    model: str
    model_type: str
    dtype: str  # of compute
    expert_bytes: int  # of the largest
    experts_bytes: int  # of all
    active_bytes: int  # of those that a token uses
    touched_bytes: int  # of everything else that it is multiplied with, in the dtype of compute
    memory: ExpertPlan  # of the budget that was asked about
    speeds: Speeds
    point: ExpertPoint  # that budget
    points: tuple[ExpertPoint, ...]  # it and others, ascending
    free_bytes: int
    suggested_bytes: int | None  # `None`: the model needs more than is free
    kv_cache_bytes_per_token: int
    measured_on: str | None  # the text on which typical routing was measured; `None`: it is as others measured it

    @property
    def dense_fits(self) -> bool:
        """Whether the whole model fits into what is free."""
        return self.memory.dense_bytes <= ceiling_bytes(None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, derived ones included."""
        found = asdict(self)
        derived = ("layers", "minimum_bytes", "window_bytes", "capacity", "capacities", "dense_bytes")
        found["memory"] |= {name: getattr(self.memory, name) for name in derived}
        for point, plain in zip([self.point, *self.points], [found["point"], *found["points"]], strict=True):
            plain["token_ms"] = point.token_ms
            for routing in ("typical", "uniform"):
                plain[routing]["token_ms"] = getattr(point, routing).token_ms
        return found | {"experts_per_token": self.memory.used, "dense_fits": self.dense_fits}

    def describe(self) -> str:
        """What people read."""
        return "\n".join([*self._head(), "", *self._division(), "", *self._table(), "", *self._advice()])

    def _head(self) -> Iterator[str]:
        size, here = self.memory, self.speeds
        low, high = min(size.experts), max(size.experts)
        experts = f"{low}" if low == high else f"{low} to {high}"
        yield (
            f"{self.model}: {self.model_type}, {size.layers} layers with {experts} experts, {size.used} a token; {self.dtype}, "
            f"{format_bytes(size.dense_bytes)} in all"
        )
        yield (
            f"an expert has {format_bytes(self.expert_bytes)}, all have {format_bytes(self.experts_bytes)}; a token uses "
            f"{format_bytes(self.active_bytes)} of them, and {format_bytes(self.touched_bytes)} of everything else"
        )
        yield (
            f"machine (measured): {here.disk}, {here.disk_gb_per_s:.2f} GB/s in reads of {format_bytes(here.read_size)}; DRAM "
            f"{here.dram_gb_per_s:.1f} GB/s with {here.torch_threads} threads; {format_bytes(self.free_bytes)} free"
        )

    def _division(self) -> Iterator[str]:
        yield self.memory.describe()
        yield f"{'minimum: all but the slots':<44}{format_bytes(self.memory.minimum_bytes):>12}"

    def _table(self) -> Iterator[str]:
        parts = "ms a token = resident + max(reading, hits) + missing"
        typical = "typical routing, as others measured it" if self.measured_on is None else "routing as measured"
        yield f"{typical:>76}{'uniform routing':>52}"
        yield f"predicted:  budget  of dense  experts   hits %  MB read  {parts}   hits %  ms a token"
        for p in self.points:
            share, usual, even = p.budget_bytes / self.memory.dense_bytes, p.typical, p.uniform
            yield (
                f"{'>' if p is self.point else ' ':<7}{format_bytes(p.budget_bytes):>11}{share:>10.0%}{p.capacity:>9}"
                f"{usual.hit_rate:>9.1%}{usual.read_bytes / 1e6:>9.0f}{usual.token_ms:>12.1f} ={usual.resident_ms:>9.1f}"
                f"{usual.read_ms:>14.1f}{usual.hits_ms:>6.1f}{usual.missing_ms:>11.1f}"
                f"{even.hit_rate:>9.1%}{even.token_ms:>12.1f}"
            )

    def _advice(self) -> Iterator[str]:
        if self.measured_on is None:
            yield "hit rates are assumed: `hf-flash calibrate` measures them on text, stats(model) says what a model does"
        else:
            yield f"hit rates were measured by `hf-flash calibrate`, on {self.measured_on}"
        yield "Python comes on top of the times"
        yield f"on top of a budget come about 0.3 GB and {format_bytes(self.kv_cache_bytes_per_token)} of KV cache a token"
        if shortage := self.memory.shortage(FlashOffloadConfig().window):
            yield shortage
        if self.suggested_bytes is None:
            yield f"the model does not run here: it needs {format_bytes(self.memory.minimum_bytes)} at least"
        else:
            yield f'suggested: memory_budget="{self.suggested_bytes / 1e9:.2f}GB", the least within a tenth of the best speed'
        if self.dense_fits:
            yield "the dense model fits into what is free, and may be faster without hf_flash"
