"""Replace the feed-forward blocks of a model whose parameters are still on the meta device."""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_flash.families.arithmetic_check import check_arithmetic
from hf_flash.families.base import Family
from hf_flash.families.decoder import decoder_layers, replace_module
from hf_flash.runtime.layer import FlashFFN
from hf_flash.runtime.sites import BlockFFN, InlineFFN, LastProjection, PassingActivation, ResidualBlockFFN, empty_bias


def replace_feed_forwards(model: nn.Module, family: Family) -> list[FlashFFN]:
    """Replace every feed-forward block. Returns the new modules, by layer.

    Args:
        model: the model, with its parameters on the meta device.
        family: its family.

    Raises:
        UnsupportedModelError: a block has other modules than its family describes, or computes something else.
    """
    config: Any = model.config
    shape, activation = family.shape(config), family.activation_of(config)
    found = []
    for index, layer in enumerate(decoder_layers(model, family)):
        down = layer.get_submodule(".".join(filter(None, (family.block, family.matrices["down"])))).weight
        d_ff = down.shape[0] if "down" not in family.columns else down.shape[1]
        sizes = index, d_ff, shape.d_model, activation
        check_arithmetic(layer, family, activation, where=f"{family.layers}.{index} of {type(model).__name__}")
        found.append(_replace_inline(layer, family, *sizes) if family.inline else _replace_block(layer, family, *sizes))
    return found


def _replace_block(layer: Any, family: Family, *sizes: Any) -> FlashFFN:
    block = layer.get_submodule(family.block)
    biases = {role: empty_bias(getattr(block, name)) for role, name in family.matrices.items()}
    kind = ResidualBlockFFN if family.adds_residual else BlockFFN
    ffn = kind(*sizes, names=family.matrices, biases=biases)
    replace_module(layer, family.block, ffn)
    return ffn


def _replace_inline(layer: Any, family: Family, index: int, d_ff: int, d_model: int, activation: Any) -> FlashFFN:
    first, final = family.matrices["up"], family.matrices["down"]
    last = LastProjection(index, d_model, empty_bias(layer.get_submodule(final)))
    ffn = InlineFFN(index, d_ff, d_model, activation, empty_bias(layer.get_submodule(first)), last)
    replace_module(layer, family.activation, PassingActivation(activation.function, d_model))
    replace_module(layer, first, ffn)
    replace_module(layer, final, last)
    return ffn
