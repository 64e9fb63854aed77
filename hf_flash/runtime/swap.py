"""Swap."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from hf_flash.errors import UsageError
from hf_flash.runtime.flash_weights import OnFlash
from hf_flash.runtime.layer import (
    _ON_FLASH,
)


class FlashActivation(nn.Module):
    """Stands where the activation stood, and passes on what [`FlashFFN`] has activated already.

    If somebody has put a plain up projection in its place, what comes is as wide as that, and is activated here.
    """

    def __init__(self, activation: Callable[[torch.Tensor], torch.Tensor], d_model: int) -> None:
        super().__init__()
        self.activation, self.d_model = activation, d_model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.shape[-1] == self.d_model else self.activation(x)


class DownBias(OnFlash):
    """Stands where the down projection stood: adds its bias to the fp32 sum and rounds once to the dtype of compute.

    Keeps the parameter name `bias` of the module it replaces.
    """

    def __init__(self, index: int, d_model: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.index, self.d_model, self.dtype = index, d_model, dtype
        self.bias = nn.Parameter(torch.empty(d_model, dtype=torch.float32, device="cpu"), requires_grad=False) if bias else None

    def extra_repr(self) -> str:
        return _ON_FLASH

    def forward(self, total: torch.Tensor) -> torch.Tensor:
        if total.shape[-1] != self.d_model:
            raise UsageError(
                "the up projection in front was replaced by something that is not on flash, this one was not",
                where=f"FFN of layer {self.index}",
                expected=f"the sum of the layer, [tokens, {self.d_model}]",
                got=list(total.shape),
                hint="replace both projections of the layer",
            )
        return (total if self.bias is None else total + self.bias.float()).to(self.dtype)
