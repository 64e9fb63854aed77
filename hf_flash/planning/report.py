"""`Plan`: what the planner says, for people and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from rich.console import Group

from hf_flash.base.sizes import format_bytes
from hf_flash.base.tables import Figures, Paragraph, facts, items, section
from hf_flash.budget.demand import Demand
from hf_flash.budget.plan import MemoryPlan, ceiling_bytes
from hf_flash.config import FlashOffloadConfig
from hf_flash.planning.measuring import Measured
from hf_flash.planning.sentences import HEADINGS, NOT_COUNTED, SOURCES, budget_advice, counted, memory_section, speed, verdict

READING, CHOOSING, REST = "reading from the disk", "choosing neurons", "attention and the output matrix"


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

    def describe(self) -> Group:
        """What people read, to be printed by rich."""
        return Group(
            Paragraph(self._verdict, "bold"),
            Paragraph(
                f"{self.model_type}, {self.memory.layers} layers of {self.memory.d_ff} neurons, {self.dtype}, "
                f"{format_bytes(self.memory.dense_bytes)} of weights; predictor: {self.predictor}"
            ),
            memory_section(self.memory.parts, self.kv_cache_bytes_per_token),
            section("Where the time of a token goes", facts(self._times())),
            section("Other budgets", self._table(), Paragraph(HEADINGS)),
            section("What would help", items(self._advice())),
            section("What this rests on", items(self._basis())),
        )

    @property
    def _verdict(self) -> str:
        return verdict(self.model, self.point.budget_bytes, ceiling_bytes(None), [self.point.token_ms])

    def _times(self) -> Iterator[tuple[str, str]]:
        for name, ms in self._parts_ms.items():
            yield name, f"{ms:.1f} ms, {ms / self.point.token_ms:.0%}"

    @property
    def _parts_ms(self) -> dict[str, float]:
        at = self.point
        return {
            READING: at.io_ms, CHOOSING: at.predict_ms, "managing the windows": at.manage_ms,
            "the neurons' products": at.compute_ms, REST: at.rest_ms,
        }  # fmt: skip

    def _table(self) -> Figures:
        dense = self.memory.dense_bytes
        rows = [
            (
                format_bytes(p.budget_bytes), f"{p.budget_bytes / dense:.0%}", speed(p.token_ms), f"{p.token_ms:.1f}",
                f"{p.hit_rate:.0%}", format_bytes(round(p.read_bytes)),
            )
            for p in self.points
        ]  # fmt: skip
        without = ("without hf_flash", "100%", speed(self.dense_token_ms), f"{self.dense_token_ms:.1f}", "", "")
        headings = ("budget", "share", "tokens/s", "ms each", "hits", "read each")
        return Figures(headings, [*rows, without], self.points.index(self.point))

    def _advice(self) -> Iterator[str]:
        at, most = self.point, max(self._parts_ms, key=self._parts_ms.__getitem__)
        yield from budget_advice(self.suggested_bytes, self.token_ms, at.budget_bytes, self.memory.minimum_bytes)
        if shortage := self.memory.shortage(FlashOffloadConfig().window):
            yield f"{shortage}."
        if most == CHOOSING and self.predictor == "quantized":
            yield "Choosing neurons takes the largest part: `hf-flash calibrate` trains a predictor that is smaller and faster."
        elif most == READING:
            yield "Reading takes the largest part: more memory or a faster disk helps."
        elif most == REST:
            yield "Attention and the output matrix take the largest part. They are in memory with any budget."
        if self.dense_fits:
            would = "would" if self.dense_token_ms < min(p.token_ms for p in self.points) else "would not"
            yield f"The whole model fits into what is free; without hf_flash it {would} be faster."

    def _basis(self) -> Iterator[str]:
        act, here = self.activity, self.measured
        yield (
            f"Measured on this machine: {here.dram_gb_per_s:.1f} GB/s from DRAM in the stock model's products on "
            f"{counted(here.torch_threads, 'thread')}; reads from {here.disk}. {format_bytes(self.free_bytes)} are free."
        )
        chosen = act.selected / self.memory.d_ff
        used = f"{act.active:.1%} of the neurons are active for a token, and the predictor chooses {chosen:.1%}"
        if self.predictor == "none":
            yield "Every token uses every neuron."
        else:
            yield f"{SOURCES[act.source]}: {used}."
        yield NOT_COUNTED
