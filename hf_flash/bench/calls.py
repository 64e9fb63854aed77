"""How long calls of several tokens take: rows of a batch, drafts that a model checks, prompts.

Calls are named "rows x tokens": 8x1 is a step of a batch of 8, 1x4 a draft of 4 tokens, 1x256 a prompt of 256.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from time import perf_counter
from typing import Any, Final

import numpy as np
import torch

from hf_flash.bench.clock import SLOW_S
from hf_flash.bench.device import finish

_WARM: Final = 2  # calls of a kind that are not timed
_TIMED: Final = 5
_SEED: Final = 1


def time_calls(model: Any, calls: Sequence[Sequence[int]], prompt_tokens: int, given: Sequence[int] = ()) -> dict[str, float]:
    """The median milliseconds of calls, by name.

    Args:
        model: a causal language model.
        calls: rows and tokens of each kind. Up to `prompt_tokens` tokens continue sequences that began with a prompt of so
            many, and one another; more are prompts themselves.
        prompt_tokens: as above.
        given: the tokens of a sequence, over and over again; a second row begins elsewhere in it. None: random ones.
    """
    return {f"{rows}x{tokens}": _median_ms(model, _Text(model, rows, given), tokens, prompt_tokens) for rows, tokens in calls}


class _Text:
    """What the rows of a batch are made of; arguments as in [`time_calls`]."""

    def __init__(self, model: Any, rows: int, given: Sequence[int]) -> None:
        self._random, self._vocabulary = torch.Generator().manual_seed(_SEED), model.config.get_text_config().vocab_size
        self._given, self._at = np.asarray(given, np.int64), np.arange(rows)[:, None] * len(given) // rows

    def next(self, tokens: int) -> torch.Tensor:
        """The next ids, int64 [rows, tokens]."""
        if not len(self._given):
            shape = (len(self._at), tokens)
            return torch.randint(4, self._vocabulary, shape, generator=self._random, dtype=torch.int64, device="cpu")
        places = self._at + np.arange(tokens)
        self._at = self._at + tokens
        return torch.from_numpy(self._given[places % len(self._given)])


def _median_ms(model: Any, text: _Text, tokens: int, prompt_tokens: int) -> float:
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}

    def call(tokens: int, past: Any, **arguments: Any) -> Any:
        with torch.no_grad():
            return model(text.next(tokens).to(device), past_key_values=past, use_cache=True, **arguments).past_key_values

    device = getattr(model, "device", torch.device("cpu"))
    is_prompt, ms = tokens > prompt_tokens, list[float]()
    past = None if is_prompt else call(prompt_tokens, None, **last_only)
    for _ in range(_WARM + _TIMED):
        start = perf_counter()
        after = call(tokens, past, **(last_only if is_prompt else {}))
        finish(device)
        ms.append(1e3 * (perf_counter() - start))
        past = None if is_prompt else after
        if len(ms) > _WARM and ms[-1] > 1e3 * SLOW_S:
            break
    return float(np.median(ms[_WARM:]))
