"""`HostTier`: the part in this machine's memory of a model that computes on a device such as a GPU (contract C5)."""

from __future__ import annotations

from dataclasses import dataclass

from hf_flash.base.sizes import format_bytes
from hf_flash.budget.too_small import too_small

_WHERE = "in this machine's memory"


@dataclass(frozen=True)
class HostTier:
    """Buffers, and units that left the device or have not reached it; sizes in bytes.

    Attributes:
        budget_bytes: the most that all of it may take; `None`: only buffers.
        buffer_bytes: the buffers that units are read into.
        slots: how many units of each layer there is room for.
        slot_bytes: size of one such unit of each layer.
    """

    budget_bytes: int | None
    buffer_bytes: int
    slots: tuple[int, ...]
    slot_bytes: tuple[int, ...]

    @property
    def window_bytes(self) -> int:
        """Bytes of all slots."""
        return sum(count * size for count, size in zip(self.slots, self.slot_bytes, strict=True))

    @property
    def nbytes(self) -> int:
        return self.buffer_bytes + self.window_bytes

    @property
    def rows(self) -> list[tuple[str, int]]:
        """The parts, a label and bytes each, for printed tables."""
        rows = [(f"{_WHERE}: buffers", self.buffer_bytes)]
        if low_to_high := spread(self.slots):
            rows.append((f"{_WHERE}: room for {low_to_high} a layer", self.window_bytes))
        return rows

    def check(self) -> None:
        """Refuse a budget that does not hold the buffers.

        Raises:
            BudgetError: the budget is too small.
        """
        if self.budget_bytes is not None and self.budget_bytes < self.buffer_bytes:
            raise too_small(
                "this machine's part of the memory budget is too small",
                where="memory_budget of cpu",
                minimum_bytes=self.buffer_bytes,
                budget_bytes=self.budget_bytes,
                least=" for buffers",
                hint="raise it, or leave it out",
            )


def spread(counts: tuple[int, ...]) -> str:
    """Smallest and largest count as text, `"3"` or `"3 to 4"`; empty if all are 0."""
    low, high = min(counts), max(counts)
    return "" if not high else f"{low}" if low == high else f"{low} to {high}"


def table(rows: list[tuple[str, int]]) -> str:
    """Labels and formatted sizes, one a line."""
    return "\n".join(f"{name:<44}{format_bytes(size):>12}" for name, size in rows)
