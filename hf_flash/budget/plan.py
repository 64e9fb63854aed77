"""From a number of bytes to what stays in DRAM (contract C5).

`memory_budget` is a ceiling on every *weight* byte the process holds, counted in the compute dtype:

    resident   embeddings, attention, norms, biases: everything that is not an FFN matrix
  + predictor  the packed predictor of every layer
  + scratch    block buffers shared by all layers (`Arithmetic`) and bounce buffers of the reader
  + windows    whatever the budget leaves: room for equally many tokens in each layer (demand.py), or for equally many neurons
               without a predictor; at most d_ff

The first three are the minimum; a budget below it is an error before anything is loaded. Interpreter, libraries,
activations and the KV cache come on top: about 0.3 GB plus the KV cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from hf_flash.base.sizes import format_bytes
from hf_flash.budget.beside import Beside
from hf_flash.budget.ceilings import ceilings_of
from hf_flash.budget.demand import LONGEST, Demand
from hf_flash.budget.host_tier import HostTier, table
from hf_flash.budget.too_small import too_small


def ceiling_bytes(budget: Any) -> int:
    """The bytes of a budget for a model that computes on the CPU; `None` takes most of what is free on this machine."""
    return ceilings_of(budget, None).host_bytes or 0


@dataclass(frozen=True)
class MemoryPlan:
    """What a budget holds, in bytes. Made by [`plan_memory`]."""

    budget_bytes: int
    resident_bytes: int
    predictor_bytes: int
    scratch_bytes: int
    widths: tuple[int, ...]  # neurons of each layer
    bundle_bytes: int  # one neuron in the compute dtype
    demand: Demand | None = field(default=None, repr=False, compare=False)  # how many neurons tokens need; None: all of them
    device: str = "cpu"  # where all of this is
    beside: Beside | None = None  # everything that is not a unit, if it is on another device
    host: HostTier | None = None  # what is in this machine's memory, if `device` is one such as a GPU

    @property
    def layers(self) -> int:
        return len(self.widths)

    @property
    def d_ff(self) -> int:
        """Neurons of the widest layer."""
        return max(self.widths)

    @property
    def minimum_bytes(self) -> int:
        """The smallest budget this model runs in: windows hold nothing."""
        return self.resident_bytes + self.predictor_bytes + self.scratch_bytes

    @cached_property
    def capacities(self) -> tuple[int, ...]:
        """Neurons that each layer's window can hold."""
        return self.divided(max(0, self.budget_bytes - self.minimum_bytes) // self.bundle_bytes)

    def divided(self, total: int) -> tuple[int, ...]:
        """Divide room for `total` neurons among the layers."""
        if self.demand is not None:
            return self.demand.divide(total)
        return tuple(min(d_ff, total // self.layers) for d_ff in self.widths)

    @property
    def capacity(self) -> int:
        """Neurons that a layer's window can hold, on average."""
        return sum(self.capacities) // self.layers

    @property
    def window_bytes(self) -> int:
        return sum(self.capacities) * self.bundle_bytes

    @property
    def dense_bytes(self) -> int:
        """The whole model in DRAM, as stock transformers would hold it."""
        beside = self.beside.resident_bytes if self.beside else 0
        return self.resident_bytes + beside + sum(self.widths) * self.bundle_bytes

    def shortage(self, tokens: int) -> str | None:
        """A warning if the windows do not even hold the neurons that one token uses; else `None`.

        Args:
            tokens: how many tokens' neurons windows are meant to hold.
        """
        need = self.demand
        if need is None or sum(self.capacities) >= need.held(1) - self.layers:
            return None
        enough = self.minimum_bytes + need.held(min(tokens, LONGEST)) * self.bundle_bytes
        return (
            f"a budget of {format_bytes(self.budget_bytes)} leaves room for {self.capacity} neurons a layer, and a token uses "
            f"{need.selected:.0f} ({need.source}): most of them are read again for every token. "
            f"{format_bytes(enough)} would hold what {tokens} tokens use"
        )

    @property
    def parts(self) -> list[tuple[str, int]]:
        """What the memory is for: names and bytes."""
        return [*self._rows, *(self.host.rows if self.host else ()), *([self.beside.row] if self.beside else ())]

    def describe(self) -> str:
        """The parts, one a line."""
        return table(self.parts)

    @property
    def _rows(self) -> list[tuple[str, int]]:
        low, high = min(self.capacities), max(self.capacities)
        spread = f" ({low} to {high})" if low < high else ""
        resident = [] if self.beside else [("embeddings, attention, norms, biases", self.resident_bytes)]
        return [
            *resident,
            ("predictor", self.predictor_bytes),
            ("scratch buffers", self.scratch_bytes),
            (f"windows, {self.capacity} of {self.d_ff} neurons a layer{spread}", self.window_bytes),
        ]

    @property
    def least(self) -> str:
        """The parts of the minimum, one a line."""
        return table(self._rows[:-1])


def plan_memory(
    budget: Any,
    *,
    resident_bytes: int,
    predictor_bytes: int,
    scratch_bytes: int,
    widths: tuple[int, ...],
    bundle_bytes: int,
    demand: Demand | None = None,
    device: str | None = None,
    buffer_bytes: int = 0,
    units_here: bool = False,
) -> MemoryPlan:
    """Divide a budget; `None` takes most of what is free on this machine, or on the device.

    Args:
        budget: as `FlashOffloadConfig` takes it.
        resident_bytes, predictor_bytes, scratch_bytes, widths, bundle_bytes, demand: as in [`MemoryPlan`].
        device: where the model computes; `None`: on the CPU.
        buffer_bytes: with a device, the buffers in this machine's memory.
        units_here: whether units and what computes them are in this machine's memory although the rest is on a device.

    Raises:
        BudgetError: a budget is below the minimum, which it has as `minimum_bytes`; the message lists what the minimum is for.
        ConfigError: the budget names a device that holds no part of this model.
    """
    ceilings = ceilings_of(budget, device, units_here=units_here)
    beside = Beside(device, ceilings.device_bytes, resident_bytes) if device is not None and units_here else None
    if beside is not None:
        resident_bytes, device = 0, None
    ceiling = (ceilings.host_bytes or 0) if device is None else ceilings.device_bytes
    plan = MemoryPlan(
        ceiling, resident_bytes, predictor_bytes, scratch_bytes, widths, bundle_bytes, demand, device or "cpu", beside
    )
    if device is not None:
        plan = replace(plan, host=_host_tier(ceilings.host_bytes, buffer_bytes, plan))
    where = "memory_budget" if device is None else f"memory_budget of {device}"
    if ceiling < plan.minimum_bytes:
        raise too_small(
            "the memory budget is too small for this model",
            where=where if ceilings.is_given else f"memory_budget unset: {format_bytes(ceiling)} of what is free",
            minimum_bytes=plan.minimum_bytes,
            budget_bytes=ceiling,
            least=plan.least,
            hint="raise memory_budget, or load in a smaller dtype" + (", or without a predictor" if predictor_bytes else ""),
        )
    for part in (plan.host, plan.beside):
        if part is not None:
            part.check()
    return plan


def _host_tier(budget_bytes: int | None, buffer_bytes: int, plan: MemoryPlan) -> HostTier:
    """Room in this machine's memory for equally many tokens, or neurons, of each layer."""
    total = max(0, (budget_bytes or 0) - buffer_bytes) // plan.bundle_bytes
    slots = plan.divided(total) if min(plan.capacities) < plan.d_ff else (0,) * plan.layers
    return HostTier(budget_bytes, buffer_bytes, slots, (plan.bundle_bytes,) * plan.layers)
