"""The matrices that stay in memory, attention's and the head's: products as fast as memory and processor allow.

With the FFN on flash, these products take most of a token's time: 1.9 GB of OPT-2.7B. torch multiplies them with one row at
half the speed of DRAM on some processors, with eight rows at a fraction of it, and with many rows in 16 bits six times slower
than in 32 where the processor has no 16-bit instructions. So a flash model's `nn.Linear` become [`ResidentLinear`]:

    few tokens, or 16 bits that are slow    compute/dense.py
    otherwise                               torch, as in the stock model: training, autocast, compiling, tracing, other devices,
                                            weights that something has replaced
"""

from __future__ import annotations

from typing import Final

import torch
from torch import nn

from hf_flash.compute import dense
from hf_flash.compute.library import DTYPES
from hf_flash.runtime.engine import SharedByLayers
from hf_flash.runtime.flash_weights import is_in_memory

_WORTH_BYTES: Final = 1 << 19  # for a smaller matrix, calling the compiled part takes as long as torch's product


class ResidentLinear(nn.Linear):
    """An `nn.Linear` of a flash model. Weights, names and shapes stay those of the stock module."""

    engine: SharedByLayers  # rows are widened into its `wide`

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling() or not is_in_memory(x):
            return super().forward(x)
        tokens = x.numel() // self.in_features
        few = dense.few(tokens, x.dtype)
        if not few and not dense.widens(tokens, x.dtype):
            return super().forward(x)
        parameter = self._parameters.get  # faster than attributes, which matters as caches are cold here
        weight, bias = parameter("weight"), parameter("bias")
        if weight is None or not _plain(x, weight, bias):
            return super().forward(x)
        if few:  # needs no lock: it uses no shared buffer
            return dense.linear(x.contiguous(), weight, bias)
        with self.engine.lock:
            return dense.multiply(x.detach().contiguous(), weight, bias, self.engine.wide)

    def __prepare_scriptable__(self) -> nn.Linear:
        """The plain `nn.Linear`, for TorchScript to compile."""
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        plain._parameters = self._parameters
        return plain.train(self.training)


def _plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether this is inference with ordinary tensors and at least one token."""
    return (
        type(weight) is nn.Parameter
        and x.dtype == weight.dtype
        and (bias is None or (type(bias) is nn.Parameter and bias.dtype == x.dtype and bias.is_contiguous()))
        and weight.is_cpu
        and x.shape[-1:] == weight.shape[-1:]
        and x.numel() > 0
        and weight.is_contiguous()
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and not torch.is_autocast_enabled("cpu")
    )


def make_linears_resident(model: nn.Module, engine: SharedByLayers) -> None:
    """Turn a loaded model's `nn.Linear` modules into [`ResidentLinear`], except small ones. Subclasses are left alone."""
    for module in model.modules():
        if type(module) is not nn.Linear or module.weight.dtype not in DTYPES:
            continue
        if module.weight.nbytes >= _WORTH_BYTES and module.in_features <= engine.wide.numel():
            module.__class__ = ResidentLinear
            module.engine = engine  # type: ignore[assignment]
