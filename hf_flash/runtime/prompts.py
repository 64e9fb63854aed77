"""Which calls are prompts: those with more than `MOST_PREDICTED` tokens of one sequence.

Together, the tokens of a prompt use most of a layer's neurons. So a predictor saves few reads, and predicting takes longer than
the product that it replaces. The feed-forward blocks of a prompt are computed whole instead, like the stock model's: their
answer is exact (contract C3). Up to `MOST_PREDICTED` tokens are predicted: a token of decoding, a draft, a batch of any size, a
short prompt.

Some models flatten the input of a block to [sequences * tokens, d_model]. So a hook on the decoder records how long sequences
are, for the thread that runs it.
"""

from __future__ import annotations

import threading
from typing import Any, Final

import torch
from torch import nn

from hf_flash.runtime.transformers_model import sequence_length

MOST_PREDICTED: Final = 16
"""The most tokens of one sequence in a call for which a predictor chooses the neurons that each of them uses."""


class Sequences:
    """How many tokens of one sequence a model's current call has.

    Attributes:
        predict_always: whether prompts are predicted like decoding: to measure how much quality a predictor costs.
    """

    def __init__(self) -> None:
        self.predict_always = False
        self._calls = threading.local()

    def watch(self, decoder: nn.Module) -> None:
        """Record the length of sequences whenever this decoder runs."""
        decoder.register_forward_pre_hook(self._begin, with_kwargs=True)
        decoder.register_forward_hook(self._end, always_call=True)

    def __deepcopy__(self, memo: Any) -> Sequences:
        return self

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _begin(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._calls.length = sequence_length(args, kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _end(self, *args: Any) -> None:
        self._calls.length = None

    def is_prompt(self, x: torch.Tensor) -> bool:
        """Whether the input of a feed-forward block, [..., tokens, d_model], belongs to a prompt."""
        if self.predict_always:
            return False
        length = getattr(self._calls, "length", None)
        if length is None:  # the block is called by itself
            length = x.shape[-2] if x.dim() > 1 else 1
        return length > MOST_PREDICTED
