"""What a memory budget holds of a mixture of experts (contract C5).

    resident   everything that is not an expert: attention, routers, shared experts, norms, embeddings
  + scratch    a buffer that rows are widened into, and slots for experts that pass by, both shared by all layers
  + slots      whatever the budget leaves: equally many for each layer, at most as many as it has experts

A table of embeddings that is only used to look up rows is in memory if everything else fits as well; else it stays on flash.
The minimum is the first two without that table; a budget below it is an error before anything is loaded.

With a device such as a GPU all of this is on the device. This machine's memory then has the buffers that experts are read into,
and, as far as its own budget goes, slots for experts that left the device ([`HostTier`]).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from hf_flash.base.sizes import format_bytes
from hf_flash.budget.beside import Beside
from hf_flash.budget.host_tier import HostTier, spread, table
from hf_flash.budget.too_small import too_small


@dataclass(frozen=True)
class ExpertPlan:
    """What a budget holds, in bytes. Made by `divide_experts`.

    Attributes:
        budget_bytes: the budget.
        all_resident_bytes: everything that is not an expert.
        table_bytes: how many of these are the table of embeddings, which may stay on flash; 0 if it may not.
        scratch_bytes: buffers shared by all layers.
        slot_bytes: size of a slot in each layer with experts; on the CPU a slot has room for the sectors around an expert.
        experts: number of experts in each such layer.
        expert_bytes: size of one expert of each such layer, in the compute dtype.
        used: experts that a token uses in a layer.
        device: where all of this is.
        host: what is in this machine's memory, if `device` is one such as a GPU.
    """

    budget_bytes: int
    all_resident_bytes: int
    table_bytes: int
    scratch_bytes: int
    slot_bytes: tuple[int, ...]
    experts: tuple[int, ...]
    expert_bytes: tuple[int, ...]
    used: int
    device: str = "cpu"
    host: HostTier | None = None
    beside: Beside | None = None  # everything that is not a unit, if it is on another device

    @property
    def layers(self) -> int:
        return len(self.experts)

    @property
    def minimum_bytes(self) -> int:
        """The smallest budget this model runs in: no expert stays in memory."""
        return self.all_resident_bytes - self.table_bytes + self.scratch_bytes

    @property
    def is_table_on_flash(self) -> bool:
        """Whether the table of embeddings stays on flash, and its rows are read when they are looked up."""
        slots = sum(count * size for count, size in zip(self.experts, self.slot_bytes, strict=True))
        return 0 < self.table_bytes and self.budget_bytes < self.all_resident_bytes + self.scratch_bytes + slots

    @property
    def resident_bytes(self) -> int:
        """Everything in memory that is not an expert."""
        return self.all_resident_bytes - (self.table_bytes if self.is_table_on_flash else 0)

    @cached_property
    def capacities(self) -> tuple[int, ...]:
        """Experts that each layer has slots for."""
        left = max(0, self.budget_bytes - self.resident_bytes - self.scratch_bytes)
        each = left // sum(self.slot_bytes)
        found = [min(experts, each) for experts in self.experts]
        left -= sum(count * size for count, size in zip(found, self.slot_bytes, strict=True))
        for layer, size in enumerate(self.slot_bytes):  # the rest of the budget: one slot more, from the first layer on
            if size <= left and found[layer] < self.experts[layer]:
                found[layer] += 1
                left -= size
        return tuple(found)

    @property
    def capacity(self) -> int:
        """Experts that a layer has slots for, on average."""
        return sum(self.capacities) // self.layers

    @property
    def window_bytes(self) -> int:
        return sum(count * size for count, size in zip(self.capacities, self.slot_bytes, strict=True))

    @property
    def dense_bytes(self) -> int:
        """The whole model in DRAM, as stock transformers would hold it."""
        beside = self.beside.resident_bytes if self.beside else 0
        units = sum(n * size for n, size in zip(self.experts, self.expert_bytes, strict=True))
        return self.all_resident_bytes + beside + units

    def shortage(self, tokens: int) -> str | None:
        """A warning if a layer's slots do not even hold the experts that one token uses; else `None`.

        Args:
            tokens: not used; `MemoryPlan.shortage` takes it.
        """
        if min(self.capacities) >= self.used:
            return None
        enough = self.minimum_bytes + 2 * self.used * sum(self.slot_bytes)
        return (
            f"a budget of {format_bytes(self.budget_bytes)} leaves room for {self.capacity} experts a layer, and a token uses "
            f"{self.used}: most of them are read again for every token. {format_bytes(enough)} would hold what two tokens use"
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
        name = f"{'' if self.is_table_on_flash else 'embeddings, '}attention, routers, norms"
        resident = [] if self.beside else [(name, self.resident_bytes)]
        return [
            *resident,
            ("scratch buffers", self.scratch_bytes),
            (f"slots for {spread(self.capacities) or 0} of {max(self.experts)} experts a layer", self.window_bytes),
        ]

    @property
    def least(self) -> str:
        """The parts of the minimum, one a line."""
        return table(self._rows[:-1])


def checked_plan(plan: ExpertPlan, *, is_given: bool) -> ExpertPlan:
    """Return the plan if its budgets are large enough.

    Args:
        is_given: whether the user set the budget, rather than leaving it to what is free.

    Raises:
        BudgetError: a budget is below its minimum; the message lists what the minimum is for.
    """
    where = "memory_budget" if plan.host is None else f"memory_budget of {plan.device}"
    if plan.budget_bytes < plan.minimum_bytes:
        raise too_small(
            "the memory budget is too small for this model",
            where=where if is_given else f"memory_budget unset: {format_bytes(plan.budget_bytes)} of what is free",
            minimum_bytes=plan.minimum_bytes,
            budget_bytes=plan.budget_bytes,
            least=plan.least,
            hint="raise memory_budget, or load in a smaller dtype" + (', or with device_map="cpu"' if plan.host else ""),
        )
    for part in (plan.host, plan.beside):
        if part is not None:
            part.check()
    return plan
