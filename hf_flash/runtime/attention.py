"""Attention of a flash model: calls of few tokens go to the compiled part (compute/attention.py), all others to transformers.

transformers looks up an attention function by name at every call, in a table that all models share. The entry `"sdpa"`, which
most models use, is replaced: the new function computes calls of few tokens for modules of flash models, and passes every other
call to the function that it replaced.
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
_UNKNOWN: Final = ("position_bias", "cache", "softcap")  # arguments that change the result and are not supported here
_SDPA: Final = "sdpa"


def make_attention_resident(model: nn.Module) -> None:
    """Make a loaded model's attention use the compiled part where that is faster."""
    from transformers import AttentionInterface

    stock = AttentionInterface()[_SDPA]
    if getattr(stock, "func", None) is not _attend:
        AttentionInterface.register(_SDPA, partial(_attend, stock))
    for module in model.modules():
        setattr(module, _MARK, True)


def _attend(
    stock: Any, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, Any]:
    """The result of `sdpa_attention_forward` in transformers' integrations/sdpa_attention.py.

    Args:
        stock: that function.
        module: the attention module that calls.
        query, key, value: [batch, heads, tokens, width]; key and value may have fewer heads.
        attention_mask: boolean, or to be added; `None`: a single token sees everything, several see only what precedes each.
    """
    mine = getattr(module, _MARK, False) and _is_inference(query, key, value) and not kwargs.get("dropout")
    if not mine or any(kwargs.get(name) is not None for name in _UNKNOWN) or not _fits(query, key, value, attention_mask):
        found: tuple[torch.Tensor, Any] = stock(module, query, key, value, attention_mask, **kwargs)
        return found
    scale = kwargs.get("scaling")
    return attention.attend(query, key, value, attention_mask, query.shape[-1] ** -0.5 if scale is None else scale), None


def _is_inference(*tensors: torch.Tensor) -> bool:
    """Whether these are ordinary tensors on the CPU, used without gradients, autocast or compilation."""
    return (
        all(is_in_memory(tensor) and tensor.stride(-1) == 1 for tensor in tensors)
        and not torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
        and not torch.is_autocast_enabled("cpu")
    )


def _fits(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any) -> bool:
    """Whether the compiled part supports these shapes, dtypes and this mask."""
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
