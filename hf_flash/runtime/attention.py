"""Attention of a flash model: calls of few tokens go to the compiled part (compute/attention.py), others are transformers' own.

transformers looks an attention function up by name at every call, among those that all models share. `"sdpa"`, which most
models use, is registered anew: for modules of flash models it answers calls of few tokens, and otherwise asks the function that
it replaced.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Final

import torch
from torch import nn

from hf_flash.compute import attention
from hf_flash.compute.library import DTYPES
from hf_flash.runtime.flash_weights import is_in_memory

_MARK: Final = "is_on_flash_model"
_UNKNOWN: Final = ("position_bias", "cache", "softcap")  # what changes the result, and is not computed here
_SDPA: Final = "sdpa"


def make_attention_resident(model: nn.Module) -> None:
    """Let the attention of a loaded model be computed here where it pays."""
    from transformers import AttentionInterface

    stock = AttentionInterface()[_SDPA]
    if getattr(stock, "func", None) is not _attend:
        AttentionInterface.register(_SDPA, partial(_attend, stock))
    for module in model.modules():
        setattr(module, _MARK, True)


def _attend(
    stock: Any, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, Any]:
    """What `sdpa_attention_forward` of transformers' integrations/sdpa_attention.py answers.

    Args:
        stock: that function.
        module: which asks. query, key, value: [batch, heads, tokens, width], key and value with as many heads or fewer.
        attention_mask: boolean, or to be added; `None`: one token sees everything, several only what was before each.
    """
    mine = getattr(module, _MARK, False) and _is_inference(query, key, value) and not kwargs.get("dropout")
    if not mine or any(kwargs.get(name) is not None for name in _UNKNOWN) or not _fits(query, key, value, attention_mask):
        found: tuple[torch.Tensor, Any] = stock(module, query, key, value, attention_mask, **kwargs)
        return found
    scale = kwargs.get("scaling")
    return attention.attend(query, key, value, attention_mask, query.shape[-1] ** -0.5 if scale is None else scale), None


def _is_inference(*tensors: torch.Tensor) -> bool:
    """Whether these are ordinary tensors on the CPU, of which nobody wants gradients or makes a graph."""
    return (
        all(is_in_memory(tensor) and tensor.stride(-1) == 1 for tensor in tensors)
        and not torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
        and not torch.is_autocast_enabled("cpu")
    )


def _fits(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any) -> bool:
    """Whether the compiled part computes this."""
    if not (query.ndim == key.ndim == value.ndim == 4 and query.dtype == key.dtype == value.dtype):
        return False
    batch, heads, tokens, width = query.shape
    length, shared = key.shape[2], key.shape[1]
    if key.shape != (batch, shared, length, width) or value.shape[:3] != key.shape[:3] or not heads * shared * width:
        return False
    if heads % shared:
        return False
    if mask is None:
        return tokens == 1 and attention.few(query, key)
    sizes = zip(mask.shape, (batch, heads, tokens, length), strict=False)
    return (
        is_in_memory(mask)
        and mask.ndim == 4
        and all(mine in (1, wanted) for mine, wanted in sizes)
        and (mask.dtype == torch.bool or mask.dtype in DTYPES)
        and not mask.requires_grad
        and attention.few(query, key)
    )
