"""Which memory budgets a plan looks at, and which one it suggests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

from hf_flash.base.sizes import parse_share
from hf_flash.budget.plan import ceiling_bytes

ENOUGH: Final = 1.1  # a suggested budget may be so many times slower than the fastest
UNLIMITED: Final = 1 << 59  # a budget that nothing fills


class Timed(Protocol):
    """What to expect of one budget."""

    @property
    def budget_bytes(self) -> int: ...

    @property
    def token_ms(self) -> float: ...


def budget_to_look_at(memory: int | str | None, dense_bytes: int, whole_bytes: int) -> int | None:
    """The budget to look at; `None`: most of what is free, where the whole model does not fit into that.

    Args:
        memory: a size, or a share of the dense model.
        whole_bytes: the least budget that holds all of the model.
    """
    if memory is not None:
        return parse_share(memory, dense_bytes)
    return None if ceiling_bytes(None) < whole_bytes else whole_bytes


def suggestion(points: Sequence[Timed], most: int) -> int | None:
    """The smallest budget that is nearly as fast as the fastest of those that fit; `None`: none fits.

    Args:
        points: by budget, ascending.
        most: bytes that a budget may have.
    """
    fit = [point for point in points if point.budget_bytes <= most]
    best = min((point.token_ms for point in fit), default=0.0)
    return next((point.budget_bytes for point in fit if point.token_ms <= ENOUGH * best), None)
