"""The matrices that stay in memory, attention's and the head's: products at the speed that memory and processor have.

With the FFN on flash most of a token's time is these: 1.9 GB of OPT-2.7B. torch multiplies them with one row at half of the
speed of DRAM on some processors, with eight rows at a fraction of it, and with many rows in 16 bits six times slower than in
32 where the processor has no instructions for them. So a flash model's `nn.Linear` become [`ResidentLinear`]:

    few tokens    the compiled part fetches every weight once; a token gets the same bits beside others and alone
    many tokens   where 16 bits are slow: rows are widened to fp32, a buffer of them at a time, for an fp32 GEMM
    otherwise     torch, as stock: training, autocast, compiling, tracing, other devices, weights that something has replaced

Sums are made in fp32 and rounded once, as torch's are, up to the order.
"""

from __future__ import annotations

import platform
from functools import lru_cache
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import nn

from hf_flash.compute import library as native
from hf_flash.compute.kernels import linear
from hf_flash.compute.library import DTYPES
from hf_flash.runtime.engine import Engine

_WORTH_BYTES: Final = 1 << 19  # of a matrix; below, calling the compiled part takes as long as torch's product
_FEW: Final = {torch.bfloat16: 16, torch.float16: 16, torch.float32: 8}  # tokens that the compiled part is faster for
_MANY: Final = 96  # tokens that widening is worth where 16 bits are only slower, not slow


class ResidentLinear(nn.Linear):
    """An `nn.Linear` of a flash model. Weights, names and shapes are those of the module it was."""

    engine: Engine  # its `arithmetic.wide` is what rows are widened into

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if type(x) is not torch.Tensor or torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
            return super().forward(x)
        tokens, dtype = x.numel() // self.in_features, x.dtype
        few = tokens <= _FEW.get(dtype, 0) and native.library() is not None
        if not (few or tokens >= _widened_from(dtype)):
            return super().forward(x)
        parameter = self._parameters.get  # a step of Python less than an attribute: caches are cold here
        weight, bias = parameter("weight"), parameter("bias")
        if weight is None or not _plain(x, weight, bias):
            return super().forward(x)
        return linear(x.contiguous(), weight, bias) if few else self._widened(x)

    def __prepare_scriptable__(self) -> nn.Linear:
        """What TorchScript is to compile: the module it was."""
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        plain._parameters = self._parameters
        return plain.train(self.training)

    def _widened(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., columns] times the matrix, in fp32."""
        rows, columns = self.weight.shape
        out, wide = torch.empty(*x.shape[:-1], rows, dtype=x.dtype, device="cpu"), x.detach().float()
        with self.engine.lock:
            room = self.engine.arithmetic.wide.view(-1)
            step = len(room) // columns
            for at in range(0, rows, step):
                part = slice(at, at + step)
                weight = self.weight[part]
                buffer = room[: weight.numel()].view(weight.shape).copy_(weight)
                out[..., part] = F.linear(wide, buffer, None if self.bias is None else self.bias[part].float())
        return out


def _plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether this is inference with ordinary tensors, at least one token of it."""
    return (
        type(weight) is nn.Parameter
        and x.dtype == weight.dtype
        and (bias is None or (type(bias) is nn.Parameter and bias.dtype == x.dtype and bias.is_contiguous()))
        and x.is_cpu
        and weight.is_cpu
        and x.shape[-1:] == weight.shape[-1:]
        and x.numel() > 0
        and weight.is_contiguous()
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and not torch.is_autocast_enabled("cpu")
    )


@lru_cache
def _widened_from(dtype: torch.dtype) -> float:
    """Tokens from which on an fp32 GEMM of widened rows is faster than torch's own product on this processor."""
    if dtype not in (torch.bfloat16, torch.float16) or platform.machine() not in ("x86_64", "AMD64"):
        return float("inf")
    can: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    matrix, vector = ("amx_bf16", "avx512_bf16") if dtype == torch.bfloat16 else ("amx_fp16", "avx512_fp16")
    if not can or can.get(matrix):
        return float("inf")
    if not can.get(vector):
        return _FEW[dtype] + 1
    if dtype == torch.bfloat16 and "AMD" not in str(can.get("cpu_name")):  # Intel's multiply no more at a time than fp32 does
        return _MANY
    return float("inf")


def make_linears_resident(model: nn.Module, engine: Engine) -> None:
    """Turn a loaded model's linear layers into [`ResidentLinear`]. Those of another class are left alone."""
    for module in model.modules():
        if type(module) is not nn.Linear or module.weight.dtype not in DTYPES:
            continue
        if module.weight.nbytes >= _WORTH_BYTES and module.in_features <= engine.arithmetic.wide.numel():
            module.__class__ = ResidentLinear
            module.engine = engine  # type: ignore[assignment]
