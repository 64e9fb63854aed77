"""`Plan`: what the planner says, for people and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from hf_flash.base.sizes import format_bytes
from hf_flash.budget.demand import Demand
from hf_flash.budget.plan import MemoryPlan, ceiling_bytes
from hf_flash.config import FlashOffloadConfig
from hf_flash.planning.measuring import Measured


@dataclass(frozen=True)
class Point:
    """What to expect of one budget. Times in milliseconds per decoded token."""

    budget_bytes: int
    capacity: int  # neurons that a layer's window holds, on average
    hit_rate: float
    read_bytes: float  # per token
    io_ms: float
    manage_ms: float
    predict_ms: float
    compute_ms: float
    rest_ms: float  # attention, head, Python

    @property
    def token_ms(self) -> float:
        return self.io_ms + self.manage_ms + self.predict_ms + self.compute_ms + self.rest_ms


@dataclass(frozen=True)
class Plan:
    """What [`hf_flash.planning.planner.plan`] says. Sizes in bytes, times in milliseconds per decoded token."""

    model: str
    model_type: str
    dtype: str
    predictor: str
    memory: MemoryPlan  # of the budget that was asked about
    activity: Demand
    measured: Measured
    point: Point  # that budget
    points: tuple[Point, ...]  # it and others, ascending
    free_bytes: int
    dense_token_ms: float
    suggested_bytes: int | None  # `None`: the model needs more than is free
    kv_cache_bytes_per_token: int

    @property
    def dense_fits(self) -> bool:
        """Whether the whole model fits into what is free."""
        return self.memory.dense_bytes <= ceiling_bytes(None)

    def token_ms(self, budget_bytes: float) -> float:
        """The time of a token with another budget, between those that were looked at."""
        sizes = [point.budget_bytes for point in self.points]
        return float(np.interp(budget_bytes, sizes, [point.token_ms for point in self.points]))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, derived ones included."""
        plain = replace(self.memory, demand=None)
        found = asdict(replace(self, memory=plain))
        for inner in ("demand", "widths"):
            found["memory"].pop(inner)
        found["activity"] = {name: getattr(self.activity, name) for name in ("source", "active", "predicted", "selected")}
        derived = ("layers", "d_ff", "minimum_bytes", "window_bytes", "capacity", "dense_bytes")
        found["memory"] |= {name: getattr(self.memory, name) for name in derived}
        found["point"]["token_ms"] = self.point.token_ms
        for point, plain in zip(self.points, found["points"], strict=True):
            plain["token_ms"] = point.token_ms
        return found | {"dense_fits": self.dense_fits}

    def describe(self) -> str:
        """What people read."""
        return "\n".join([*self._head(), "", self.memory.describe(), "", *self._table(), "", *self._advice()])

    def _head(self) -> Iterator[str]:
        size, act, here = self.memory, self.activity, self.measured
        yield (
            f"{self.model}: {self.model_type}, {size.layers} layers, d_ff {size.d_ff}, {self.dtype}, "
            f"{format_bytes(size.dense_bytes)} in all; predictor {self.predictor}"
        )
        yield (
            f"activations ({act.source}): {act.active:.1%} of a layer active, {act.predicted:.2f} predicted for one, "
            f"{act.selected:.0f} neurons a token"
        )
        yield (
            f"machine (measured): {here.disk}; stock FFN {here.dram_gb_per_s:.1f} GB/s with {here.torch_threads} threads; "
            f"{format_bytes(self.free_bytes)} free"
        )
        reads = ", ".join(f"{count}: {ms:.2f}" for count, ms in zip(here.misses, here.io_ms, strict=True))
        yield f"reading neurons of a layer takes, in ms: {reads}"

    def _table(self) -> Iterator[str]:
        yield "predicted:  budget  of dense  neurons   hits %  MB read    ms a token = I/O + manage + predict + compute + rest"
        for p in self.points:
            share = p.budget_bytes / self.memory.dense_bytes
            yield (
                f"{'>' if p is self.point else ' ':<7}{format_bytes(p.budget_bytes):>11}{share:>10.0%}{p.capacity:>9}"
                f"{p.hit_rate:>9.1%}{p.read_bytes / 1e6:>9.1f}{p.token_ms:>14.1f} ={p.io_ms:>6.1f}{p.manage_ms:>9.1f}"
                f"{p.predict_ms:>10.1f}{p.compute_ms:>10.1f}{p.rest_ms:>7.1f}"
            )
        yield f"       {format_bytes(self.memory.dense_bytes):>11}{'the dense model':>28}{self.dense_token_ms:>23.1f}"

    def _advice(self) -> Iterator[str]:
        yield f"on top of a budget come about 0.3 GB and {format_bytes(self.kv_cache_bytes_per_token)} of KV cache a token"
        if shortage := self.memory.shortage(FlashOffloadConfig().window):
            yield shortage
        fastest = min(p.token_ms for p in self.points)
        if self.suggested_bytes is None:
            yield f"the model does not run here: it needs {format_bytes(self.memory.minimum_bytes)} at least"
        else:
            yield f'suggested: memory_budget="{self.suggested_bytes / 1e9:.2f}GB", the least within a tenth of the best speed'
        if self.dense_fits:
            verdict = "and would be faster" if self.dense_token_ms < fastest else "but would not be faster"
            yield f"the dense model fits into what is free, {verdict}"
