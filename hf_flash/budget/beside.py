"""`Beside`: the part of a model that is on a GPU while the model's units are in host memory and compute on the CPU."""

from __future__ import annotations

from dataclasses import dataclass

from hf_flash.budget.too_small import too_small


@dataclass(frozen=True)
class Beside:
    """All weights that are not units, in bytes.

    Attributes:
        device: the device that holds them.
        budget_bytes: the most they may take.
        resident_bytes: what they take.
    """

    device: str
    budget_bytes: int
    resident_bytes: int

    def check(self) -> None:
        """Refuse a budget that does not hold these weights.

        Raises:
            BudgetError: the budget is too small.
        """
        if self.budget_bytes < self.resident_bytes:
            raise too_small(
                f"what is no unit of this model does not fit on {self.device}",
                where=f"memory_budget of {self.device}",
                minimum_bytes=self.resident_bytes,
                budget_bytes=self.budget_bytes,
                hint='raise it, or load with device_map="cpu"',
            )

    @property
    def row(self) -> tuple[str, int]:
        """A label and the bytes, for printed tables."""
        return f"on {self.device}: all that is no unit", self.resident_bytes
