"""`Beside`: what of a model is on another device than its units are, where these compute on the CPU and the rest on a GPU."""

from __future__ import annotations

from dataclasses import dataclass

from hf_flash.budget.too_small import too_small


@dataclass(frozen=True)
class Beside:
    """Everything that is no unit, in bytes.

    Attributes:
        device: where it is.
        budget_bytes: at most.
        resident_bytes: it takes.
    """

    device: str
    budget_bytes: int
    resident_bytes: int

    def check(self) -> None:
        """Refuse a budget that does not hold it.

        Raises:
            BudgetError: it is too small.
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
        """A name and bytes, for people."""
        return f"on {self.device}: all that is no unit", self.resident_bytes
