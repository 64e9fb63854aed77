"""`too_small`: the error for a budget that does not hold what has to be in it."""

from __future__ import annotations

from hf_flash.base.sizes import format_bytes
from hf_flash.errors import BudgetError


def too_small(what: str, *, where: str, minimum_bytes: int, budget_bytes: int, hint: str, least: str = "") -> BudgetError:
    """The error to raise.

    Args:
        what: is wrong, for people.
        where: the budget was named.
        minimum_bytes: that it has to hold. budget_bytes: that it holds.
        least: what the minimum is for; or what it consists of, one a line, which then comes below it.
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
