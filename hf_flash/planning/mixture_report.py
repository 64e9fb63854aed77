"""`ExpertOutlook`: what the planner says of a mixture of experts, for people and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final

from rich.console import Group

from hf_flash.base.sizes import format_bytes
from hf_flash.base.tables import Figures, Paragraph, facts, items, section
from hf_flash.budget.expert_plan import ExpertPlan
from hf_flash.budget.plan import ceiling_bytes
from hf_flash.config import FlashOffloadConfig
from hf_flash.planning.measuring import Speeds
from hf_flash.planning.sentences import NOT_COUNTED, budget_advice, counted, memory_section, speed, verdict

_HEADINGS: Final = (
    "experts: those that a layer has slots for; worst: tokens a second if no expert is used more than others; hits: of the "
    "experts that a token uses, already in memory; read each: for a token."
)


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

    def describe(self) -> Group:
        """What people read, to be printed by rich."""
        size = self.memory
        low, high = min(size.experts), max(size.experts)
        experts = f"{low}" if low == high else f"{low} to {high}"
        return Group(
            Paragraph(self._verdict, "bold"),
            Paragraph(
                f"{self.model_type}, {size.layers} layers with {experts} experts each, of which a token uses {size.used}; "
                f"{self.dtype}, {format_bytes(size.dense_bytes)} of weights"
            ),
            memory_section(size.parts, self.kv_cache_bytes_per_token),
            section("Where the time of a token goes", facts(self._times())),
            section("Other budgets", self._table(), Paragraph(_HEADINGS)),
            section("What would help", items(self._advice())),
            section("What this rests on", items(self._basis())),
        )

    @property
    def _verdict(self) -> str:
        times = [self.point.typical.token_ms, self.point.uniform.token_ms]
        return verdict(self.model, self.point.budget_bytes, ceiling_bytes(None), times[:1] if self.measured_on else times)

    def _times(self) -> Iterator[tuple[str, str]]:
        at = self.point.typical
        yield "all that is not an expert", f"{at.resident_ms:.1f} ms for {format_bytes(self.touched_bytes)}"
        yield "reading experts", f"{at.read_ms:.1f} ms for {format_bytes(round(at.read_bytes))}"
        yield "  meanwhile, those in memory", f"{at.hits_ms:.1f} ms"
        yield "the experts that were read", f"{at.missing_ms:.1f} ms"

    def _table(self) -> Figures:
        rows = [
            (
                format_bytes(p.budget_bytes), f"{p.capacity}", speed(p.token_ms),
                *(() if self.measured_on else (speed(p.uniform.token_ms),)),
                f"{p.typical.hit_rate:.0%}", format_bytes(round(p.typical.read_bytes)),
            )
            for p in self.points
        ]  # fmt: skip
        worst = [] if self.measured_on else ["worst"]
        return Figures(["budget", "experts", "tokens/s", *worst, "hits", "read each"], rows, self.points.index(self.point))

    def _advice(self) -> Iterator[str]:
        at = self.point.typical
        yield from budget_advice(self.suggested_bytes, self._token_ms, self.point.budget_bytes, self.memory.minimum_bytes)
        if shortage := self.memory.shortage(FlashOffloadConfig().window):
            yield f"{shortage}."
        if at.read_ms > at.resident_ms + at.hits_ms + at.missing_ms:
            yield "Reading takes the largest part: more memory or a faster disk helps."
        if self.dense_fits:
            yield "The whole model fits into what is free, and may be faster without hf_flash."

    def _token_ms(self, budget_bytes: float) -> float:
        return next(point.token_ms for point in self.points if point.budget_bytes >= budget_bytes)

    def _basis(self) -> Iterator[str]:
        here = self.speeds
        yield (
            f"Measured on this machine: {here.disk_gb_per_s:.2f} GB/s in reads of {format_bytes(here.read_size)} from "
            f"{here.disk}, {here.dram_gb_per_s:.1f} GB/s from DRAM on {counted(here.torch_threads, 'thread')}. "
            f"{format_bytes(self.free_bytes)} are free."
        )
        yield (
            f"An expert has {format_bytes(self.expert_bytes)}, all have {format_bytes(self.experts_bytes)}; a token uses "
            f"{format_bytes(self.active_bytes)} of them."
        )
        if self.measured_on is None:
            yield (
                "Assumed: tokens use the same experts again as often as others have measured. At worst, every expert is as "
                "likely as any other. `hf-flash calibrate` measures it on your text."
            )
        else:
            yield f"How often experts are used again was measured by `hf-flash calibrate`, on {self.measured_on}."
        yield f"{NOT_COUNTED} Python takes some ms a token on top."
