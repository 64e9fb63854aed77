"""Replace the feed-forward blocks of a model whose parameters are still on the meta device."""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_flash.errors import UnsupportedModelError
from hf_flash.families.base import Family
from hf_flash.runtime.layer import FlashFFN
from hf_flash.runtime.sites import BlockFFN, InlineFFN, LastProjection, PassingActivation, empty_bias
from hf_flash.runtime.transformers_model import decoder_layers


def replace_feed_forwards(model: nn.Module, family: Family) -> list[FlashFFN]:
    """Replace every feed-forward block. Returns the new modules, by layer.

    Raises:
        UnsupportedModelError: a block does not hold what its family describes.
    """
    config: Any = model.config
    shape, activation = family.shape(config), family.activation_of(config)
    found = []
    for index, (layer, d_ff) in enumerate(zip(decoder_layers(model, family), shape.widths, strict=True)):
        sizes = index, d_ff, shape.d_model, activation
        found.append(_replace_inline(layer, family, *sizes) if family.inline else _replace_block(layer, family, *sizes))
    return found


def _replace_block(layer: Any, family: Family, *sizes: Any) -> FlashFFN:
    block = getattr(layer, family.block)
    _check_block(block, family, where=f"layer {sizes[0]}, {family.block}")
    biases = {role: empty_bias(getattr(block, name)) for role, name in family.matrices.items()}
    ffn = BlockFFN(*sizes, names=family.matrices, biases=biases)
    setattr(layer, family.block, ffn)
    return ffn


def _check_block(block: nn.Module, family: Family, where: str) -> None:
    """Refuse a block with other tensors than its matrices and their biases: it would be left out of the computation."""
    held = {name for tensors in (block.named_parameters, block.named_buffers) for name, _ in tensors(remove_duplicate=False)}
    weights, biases = ({f"{name}.{kind}" for name in family.matrices.values()} for kind in ("weight", "bias"))
    if not weights <= held <= weights | biases:
        raise UnsupportedModelError(
            "a feed-forward block does not hold what its family describes",
            where=where,
            expected=f"{', '.join(sorted(weights))}, and perhaps their biases",
            got=", ".join(sorted(held)),
            hint="nothing that reads it from flash would compute what this block does",
        )


def _replace_inline(layer: Any, family: Family, index: int, d_ff: int, d_model: int, activation: Any) -> FlashFFN:
    first, final = family.matrices["up"], family.matrices["down"]
    last = LastProjection(index, d_model, empty_bias(getattr(layer, final)))
    ffn = InlineFFN(index, d_ff, d_model, activation, empty_bias(getattr(layer, first)), last)
    setattr(layer, first, ffn)
    setattr(layer, family.activation, PassingActivation(getattr(layer, family.activation), d_model))
    setattr(layer, final, last)
    return ffn
