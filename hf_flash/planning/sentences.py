"""What reports of the planner have in common, in words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

from rich.console import Group

from hf_flash.base.sizes import format_bytes
from hf_flash.base.tables import Paragraph, facts, section

SOURCES: Final = {
    "measured": "Measured by `hf-flash calibrate`",
    "assumed": "Assumed, as the paper has it for OPT-6.7B (`hf-flash calibrate` measures your model)",
    "given": "As you gave it",
}
HEADINGS: Final = "share: of the whole model; hits: of what a token uses, already in memory; each: for a token."
NOT_COUNTED: Final = "Not counted: the prompt, and attention over a long context."
_SAME: Final = 0.02  # budgets that differ by less are the same


def speed(token_ms: float) -> str:
    """Tokens a second."""
    each_s = 1e3 / max(token_ms, 1e-6)
    return f"{each_s:.3g}" if each_s < 1e3 else f"{each_s:.0f}"


def counted(number: int, noun: str) -> str:
    """`1 thread`, `2 threads`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def at_least(nbytes: int) -> str:
    """A size as `FlashOffloadConfig` takes it, not below `nbytes`."""
    digits, unit = next((power - 2, unit) for power, unit in ((9, "GB"), (6, "MB"), (3, "KB")) if nbytes >= 10**power)
    return f"{-(-nbytes // 10**digits) / 100:g}{unit}"


def verdict(model: str, budget_bytes: int, free_bytes: int, token_ms: Sequence[float]) -> str:
    """Whether a model fits, and how fast it will be.

    Args:
        free_bytes: the most that a budget may have on this machine.
        token_ms: one figure, or the least and the most.
    """
    fastest, slowest = min(token_ms), max(token_ms)
    speeds = dict.fromkeys(map(speed, (slowest, fastest)))
    times = dict.fromkeys(f"{ms:.3g}" for ms in (fastest, slowest))
    expected = f"about {' to '.join(speeds)} tokens a second ({' to '.join(times)} ms each)"
    if budget_bytes > free_bytes:
        return (
            f"{model} does not fit here: a budget of {format_bytes(budget_bytes)} is more than the {format_bytes(free_bytes)} "
            f"that are free. With that much memory: {expected}."
        )
    return f"{model} fits: with a budget of {format_bytes(budget_bytes)}, {expected}."


def memory_section(parts: Sequence[tuple[str, int]], kv_bytes: int) -> Group:
    """What takes the memory, within the budget and beyond it."""
    beyond = f"Beyond the budget: about 0.3 GB for Python and its libraries, and {format_bytes(kv_bytes)} of KV cache a token."
    return section("What takes the memory", facts((name, format_bytes(size)) for name, size in parts), Paragraph(beyond))


def budget_advice(
    suggested_bytes: int | None, token_ms: Callable[[float], float], budget_bytes: int, least_bytes: int
) -> Iterator[str]:
    """Which budget to take.

    Args:
        suggested_bytes: `None`: the model needs more than is free.
        token_ms: the time of a token with a budget.
        least_bytes: that the model needs.
    """
    if suggested_bytes is None:
        yield f"The model does not run here: it needs {format_bytes(least_bytes)} at least."
        return
    size = f'memory_budget="{at_least(suggested_bytes)}"'
    if abs(suggested_bytes - budget_bytes) <= _SAME * budget_bytes:
        yield f"{size} is a good budget: the least within a tenth of the best speed."
    else:
        expected = speed(token_ms(suggested_bytes))
        yield f"{size} is the least within a tenth of the best speed: {expected} tokens a second."
