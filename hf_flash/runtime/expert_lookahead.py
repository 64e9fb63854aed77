"""Reads of experts ahead of time: a layer's router is asked before the layer's attention runs.

A layer's input is close to what its router will get, so the router already names most of the experts. They are read while
attention computes, when the disk has nothing else to do. The guess never decides what is computed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import nn

from hf_flash.runtime.experts import FlashExperts
from hf_flash.runtime.flash_weights import stand_in
from hf_flash.runtime.transformers_model import hidden_of

_LAYER: Final = re.compile(r"(?P<layer>.*\.\d+)\.(?P<block>.+)\.[^.]+")  # matches the name of a module of experts
_NORMS: Final = ("pre_feedforward_layernorm", "pre_mlp_layernorm", "post_attention_layernorm", "ffn_norm")


def add_expert_lookahead(model: nn.Module, ffns: Sequence[FlashExperts], used: int) -> int:
    """Read ahead in every layer whose norm and router are found; returns the number of such layers.

    Args:
        model: the model.
        ffns: its layers of experts.
        used: experts that a token uses in a layer.
    """
    count = 0
    for ffn in ffns:
        match = _LAYER.fullmatch(ffn.layer.name)
        if match is None:
            continue
        layer, block = model.get_submodule(match["layer"]), model.get_submodule(f"{match['layer']}.{match['block']}")
        norm = next((found for name in _NORMS if isinstance(found := getattr(layer, name, None), nn.Module)), None)
        routers = [
            weight
            for name, weight in block.named_parameters()
            if tuple(weight.shape) == (ffn.layer.experts, ffn.layer.width) and not name.startswith("experts.")
        ]
        if norm is not None and len(routers) == 1:
            layer.register_forward_pre_hook(_Guess(ffn, norm, routers[0], used), with_kwargs=True)
            count += 1
    return count


class _Guess:
    """A hook before a decoder layer: gives the layer's own input to its router, and reads the experts that this names."""

    def __init__(self, ffn: FlashExperts, norm: Any, router: torch.Tensor, used: int) -> None:
        self._ffn, self._norm, self._router, self._used = ffn, norm, router, used

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = hidden_of(args, kwargs)
        if hidden.numel() != self._ffn.layer.width or hidden.device.type != "cpu" or stand_in(hidden):
            return  # several tokens use most experts anyway; a traced input has no values
        with torch.no_grad():
            x = self._norm.forward(hidden.view(1, -1)).to(self._router.dtype)
            logits = torch.nn.functional.linear(x, self._router)
            self._ffn.look_ahead(torch.topk(logits, self._used).indices.numpy())
