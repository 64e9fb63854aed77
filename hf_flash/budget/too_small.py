"""`too_small`: the error for a budget that does not hold the minimum."""

from __future__ import annotations

from hf_flash.base.sizes import format_bytes
from hf_flash.errors import BudgetError


def too_small(what: str, *, where: str, minimum_bytes: int, budget_bytes: int, hint: str, least: str = "") -> BudgetError:
    """Make the error to raise.

    Args:
        what: what is wrong.
        where: which setting the budget comes from.
        minimum_bytes: the least the budget must be.
        budget_bytes: what it is.
        hint: what to do.
        least: what the minimum is for, a phrase; or its parts, one a line, which are then printed below it.
    """
    parts = least if "\n" not in least else ":\n    " + least.replace("\n", "\n    ")
    return BudgetError(
        what,
        minimum_bytes=minimum_bytes,
        where=where,
        expected=f"at least {format_bytes(minimum_bytes)} ({minimum_bytes} bytes){parts}",
        got=f"{format_bytes(budget_bytes)} ({budget_bytes} bytes)",
        hint=hint,
    )
