"""Lookahead: every layer's FFN begins to read while that layer's attention runs.

The residual stream that enters a layer, passed through the norm in front of the FFN, is close to the FFN's later input. Models
with the norm after the FFN have no such guess.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hf_flash.families.base import Family
from hf_flash.families.decoder import decoder_layers
from hf_flash.runtime.flash_weights import stand_in
from hf_flash.runtime.layer import FlashFFN
from hf_flash.runtime.transformers_model import hidden_of


def add_lookahead(model: nn.Module, family: Family, ffns: Sequence[FlashFFN]) -> None:
    """Make every layer's FFN look ahead, if the family says that this model can."""
    if not family.looks_ahead(model.config):
        return
    for layer, ffn in zip(decoder_layers(model, family), ffns, strict=True):
        layer.register_forward_pre_hook(_LookaheadHook(ffn, getattr(layer, family.norm)), with_kwargs=True)


class _LookaheadHook:
    """A hook before a decoder layer. It acts on single tokens only: several need most neurons, so a guess gains nothing."""

    def __init__(self, ffn: FlashFFN, norm: nn.Module) -> None:
        self.ffn, self.norm = ffn, norm

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = hidden_of(args, kwargs)
        if x.numel() == self.ffn.d_model and x.device.type == "cpu" and not stand_in(x):
            with torch.no_grad():
                self.ffn.look_ahead(self.norm(x.view(1, -1)))
