"""`hf-flash plan MODEL --assistant DRAFT`: speculative decoding with both models on flash, under one memory budget.

A round is some tokens of the assistant and one call of the model that checks them. What one of the two has of the budget the
other has not, so the division is looked for that makes a round shortest, by the times that [`plan`] predicts for each:

    round(share) = draft_tokens * assistant(share) + model(budget - share)

How many of the drafts are right does not depend on it. A call that checks several tokens needs what they use together, which is
more than is said here, and more so with less room; so the model is rather given too little than too much.

Of a mixture of experts that error is too large: several tokens use nearly as many experts together as one after the other. So
mixtures are refused.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from rich.console import Group
from rich.text import Text

from hf_flash.base.sizes import format_bytes, parse_share
from hf_flash.base.tables import facts, section
from hf_flash.budget.plan import MemoryPlan, ceiling_bytes
from hf_flash.errors import BudgetError, ConfigError
from hf_flash.planning.planner import needs, plan
from hf_flash.planning.report import Plan

DRAFT_TOKENS: Final = 4  # the paper's lambda
_OPENING: Final = ("dtype", "token", "cache_dir", "local_files_only")  # options that say how both models are found
_STEPS: Final = 64  # divisions that are looked at
_NEARLY: Final = 1.01  # as short as the shortest: the smallest share of the assistant that is


@dataclass(frozen=True)
class Pair:
    """How two models should share a budget. Sizes in bytes, times in milliseconds."""

    target: Plan
    assistant: Plan
    target_bytes: int
    assistant_bytes: int
    draft_tokens: int
    draft_token_ms: float  # the assistant's, with its share
    call_ms: float  # the model's, with the rest

    @property
    def round_ms(self) -> float:
        return self.draft_tokens * self.draft_token_ms + self.call_ms

    @property
    def worth_from(self) -> float:
        """Tokens a round must bring to be faster than the model alone with all of the budget."""
        return self.round_ms / self.target.token_ms(self.target_bytes + self.assistant_bytes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        figures = {name: getattr(self, name) for name in (
            "target_bytes", "assistant_bytes", "draft_tokens", "draft_token_ms", "call_ms", "round_ms", "worth_from",
        )}  # fmt: skip
        return figures | {"target": self.target.to_dict(), "assistant": self.assistant.to_dict()}

    def describe(self) -> Group:
        """What people read, to be printed by rich."""
        drafts = f"{self.draft_tokens} x {self.draft_token_ms:.1f}"
        target, assistant = (
            format_size(size, plan.memory.minimum_bytes)
            for size, plan in ((self.target_bytes, self.target), (self.assistant_bytes, self.assistant))
        )
        together = format_bytes(self.target_bytes + self.assistant_bytes)
        return Group(
            Text("The model", style="bold underline"),
            self.target.describe(),
            Text("\nThe assistant", style="bold underline"),
            self.assistant.describe(),
            section(
                f"Together in {together}",
                facts(
                    [
                        ("the model", f'memory_budget="{target}"'),
                        (
                            "the assistant",
                            f'memory_budget="{assistant}"',
                        ),
                        ("a round", f"{drafts} + {self.call_ms:.1f} = {self.round_ms:.1f} ms"),
                        ("worth it", f"where a round brings more than {self.worth_from:.1f} tokens"),
                    ]
                ),
            ),
        )


def format_size(nbytes: int, least: int) -> str:
    """As `FlashOffloadConfig` takes it, not above `nbytes` and not below `least`."""
    power, unit = (6, "MB") if nbytes >= 10**8 else (3, "KB")
    rounded = nbytes // 10**power
    return f"{rounded}{unit}" if rounded * 10**power >= least else f"{nbytes}B"


def plan_pair(
    model: str | os.PathLike[str],
    assistant: str | os.PathLike[str],
    *,
    memory: int | str | None = None,
    draft_tokens: int = DRAFT_TOKENS,
    **options: Any,
) -> Pair:
    """Divide a memory budget between a model and the one that drafts for it (`generate(assistant_model=...)`).

    Args:
        model, assistant: as in [`plan`].
        memory: for both, a size or a share of both dense models. Default: most of what is free.
        draft_tokens: that the assistant proposes for one call of the model. Paper: section 5.2 has 4.
        options: of [`plan`], for the model; `dtype`, `disk`, `reader`, and the Hub's but `revision`, for both.

    Raises:
        BudgetError: the two do not fit into it together. ConfigError: one is a mixture of experts. Otherwise as [`plan`].
    """
    if draft_tokens < 1:
        raise ConfigError("no drafts", where="draft_tokens", expected="at least 1", got=draft_tokens)

    def given(*names: str) -> dict[str, Any]:
        return {name: options[name] for name in (*_OPENING, *names) if name in options}

    whole = _needs(model, **given("predictor", "reader", "revision")), _needs(assistant, **given("reader"))
    least = [each.minimum_bytes for each in whole]
    total = ceiling_bytes(None) if memory is None else parse_share(memory, sum(each.dense_bytes for each in whole))
    if total < sum(least):
        raise BudgetError(
            "the memory budget is too small for both models",
            minimum_bytes=sum(least),
            where="memory",
            expected=f"at least {format_bytes(sum(least))}: {format_bytes(least[0])} and {format_bytes(least[1])}",
            got=format_bytes(total),
        )
    target = plan(model, memory=total - least[1], **options)
    draft = plan(assistant, memory=total - least[0], **given("disk", "reader"))
    assert isinstance(target, Plan)  # `_needs` has refused what is not
    assert isinstance(draft, Plan)
    shares = np.linspace(least[1], min(total - least[0], max(least[1], whole[1].dense_bytes)), _STEPS + 1).astype(int)
    rounds = [draft_tokens * draft.token_ms(share) + target.token_ms(total - share) for share in shares.tolist()]
    chosen = next(share for share, ms in zip(shares.tolist(), rounds, strict=True) if ms <= _NEARLY * min(rounds))
    return Pair(
        target, draft, total - chosen, chosen, draft_tokens, draft.token_ms(chosen), target.token_ms(total - chosen)
    )  # fmt: skip


def _needs(source: str | os.PathLike[str], **options: Any) -> MemoryPlan:
    """What a model of neurons holds."""
    found = needs(source, **options)
    if not isinstance(found, MemoryPlan):
        raise ConfigError(
            "a mixture of experts cannot be planned together with an assistant",
            where=source,
            expected="two models that are no mixtures",
            got=f"{max(found.experts)} experts a layer",
            hint="plan each of the two by itself",
        )
    return found
