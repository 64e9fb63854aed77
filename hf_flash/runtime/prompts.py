"""Which calls are prompts: those that bring more than `MOST_PREDICTED` tokens of one sequence.

The tokens of a prompt use most of a layer's neurons between them. So a predictor spares little of what has to be read, and
predicting takes longer than the product that it replaces. The feed-forward blocks of a prompt are computed whole instead, as
the stock model's are: their answer is exact (contract C3). Up to `MOST_PREDICTED` tokens are predicted: a token of decoding, a
draft, a batch of any size, a short prompt.

A block gets its input flattened in some models, [sequences * tokens, d_model]. So the decoder says how long sequences are, by a
hook that notes it for the thread that runs it.
"""

from __future__ import annotations

import threading
from typing import Any, Final

import torch
from torch import nn

from hf_flash.runtime.transformers_model import sequence_length

MOST_PREDICTED: Final = 16
"""Tokens of one sequence in one call, up to which a predictor chooses what each of them uses."""


class Sequences:
    """How many tokens of one sequence the calls of a model bring.

    Attributes:
        predict_always: whether prompts are predicted too, as decoding is: for measuring what a predictor loses.
    """

    def __init__(self) -> None:
        self.predict_always = False
        self._calls = threading.local()

    def watch(self, decoder: nn.Module) -> None:
        """Note the length of sequences whenever this decoder runs."""
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
