"""`HostTier`: what is in this machine's memory of a model that computes on a device such as a GPU (contract C5)."""

from __future__ import annotations

from dataclasses import dataclass

from hf_flash.base.sizes import format_bytes
from hf_flash.budget.too_small import too_small

_WHERE = "in this machine's memory"


@dataclass(frozen=True)
class HostTier:
    """Buffers, and units that left the device or have not got there; sizes in bytes.

    Attributes:
        budget_bytes: at most; `None`: nothing but buffers.
        buffer_bytes: that units are read into.
        slots: units of each layer that there is room for. slot_bytes: of one of each.
    """

    budget_bytes: int | None
    buffer_bytes: int
    slots: tuple[int, ...]
    slot_bytes: tuple[int, ...]

    @property
    def window_bytes(self) -> int:
        """Of the slots."""
        return sum(count * size for count, size in zip(self.slots, self.slot_bytes, strict=True))

    @property
    def nbytes(self) -> int:
        return self.buffer_bytes + self.window_bytes

    @property
    def rows(self) -> list[tuple[str, int]]:
        """The parts, for people: a name and bytes each."""
        rows = [(f"{_WHERE}: buffers", self.buffer_bytes)]
        if low_to_high := spread(self.slots):
            rows.append((f"{_WHERE}: room for {low_to_high} a layer", self.window_bytes))
        return rows

    def check(self) -> None:
        """Refuse a budget that does not hold the buffers.

        Raises:
            BudgetError: it is too small.
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
    """`"3"` or `"3 to 4"`, for people; nothing if all are 0."""
    low, high = min(counts), max(counts)
    return "" if not high else f"{low}" if low == high else f"{low} to {high}"


def table(rows: list[tuple[str, int]]) -> str:
    """Names and sizes, one a line."""
    return "\n".join(f"{name:<44}{format_bytes(size):>12}" for name, size in rows)
