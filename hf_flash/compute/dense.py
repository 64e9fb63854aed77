"""Products of tokens with whole matrices, in the fastest way on this processor: for matrices that stay in memory, and for the
blocks of neurons of a prompt, which uses all of them.

    few tokens    the compiled part fetches every weight once; a token gets the same bits beside others and alone
    many tokens   where 16 bits are slow: rows are widened to fp32, a buffer of them at a time, for an fp32 GEMM
    otherwise     torch

Sums are made in fp32 and rounded once, as torch does, but perhaps in another order.
"""

from __future__ import annotations

import platform
from functools import lru_cache
from typing import Any, Final

import torch
import torch.nn.functional as F

from hf_flash.compute import library as native
from hf_flash.compute.kernels import linear as linear  # for callers that know that their tokens are few

_FEW: Final = {torch.bfloat16: 16, torch.float16: 16, torch.float32: 8}  # up to so many tokens the compiled part is faster;
_FEW_OF_FAST: Final = 12  # up to so many where the processor multiplies 16 bits twice as fast as 32
_MANY: Final = 96  # from so many tokens on, widening pays where 16 bits are no faster than fp32, but not slow


def few(tokens: int, dtype: torch.dtype) -> bool:
    """Whether the compiled part is used for the product of so many tokens with a matrix."""
    return tokens <= _few_of(dtype) and native.library() is not None


def widens(tokens: int, dtype: torch.dtype) -> bool:
    """Whether an fp32 GEMM of widened rows is faster than torch's own product."""
    return tokens >= _widened_from(dtype)


def multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, wide: torch.Tensor) -> torch.Tensor:
    """`x @ weight.T + bias` in the dtype of `x`, in the fastest way.

    Args:
        x: [..., columns], contiguous. All tensors are on the CPU; all but `wide` are in one dtype of `DTYPES`.
        weight: [rows, columns], each row contiguous; the whole contiguous if the tokens are [`few`]. bias: [rows].
        wide: float32, contiguous, with room for at least one row. It is used for many tokens in 16 bits.

    Returns:
        [..., rows].
    """
    tokens = x.numel() // x.shape[-1]
    if few(tokens, x.dtype):
        return linear(x, weight, bias)
    return _widened(x, weight, bias, wide) if widens(tokens, x.dtype) else F.linear(x, weight, bias)


def multiply_turned(x: torch.Tensor, weight: torch.Tensor, wide: torch.Tensor) -> torch.Tensor:
    """`x @ weight` in the dtype of `x`, in the fastest way for many tokens.

    Args:
        x: [tokens, columns]. All tensors are on the CPU.
        weight: [columns, rows] in the dtype of `x`, contiguous.
        wide: float32, contiguous, with room for at least one row of `weight`.

    Returns:
        [tokens, rows].
    """
    if not widens(len(x), x.dtype):
        return x @ weight
    out = torch.zeros(len(x), weight.shape[1], dtype=torch.float32, device="cpu")
    room, x_f32 = wide.view(-1), x.float()
    step = len(room) // weight.shape[1]
    for at in range(0, len(weight), step):
        part = weight[at : at + step]
        out.addmm_(x_f32[:, at : at + step], room[: part.numel()].view(part.shape).copy_(part))
    return out.to(x.dtype)


def add_product(hidden: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, wide: torch.Tensor) -> None:
    """`out += hidden @ weight`, in the fastest way. Where 16 bits are fast, the product is rounded to 16 bits, then added.

    Args:
        hidden: [tokens, rows] in a dtype of `DTYPES`, contiguous. All tensors are on the CPU.
        weight: [rows, columns] in the dtype of `hidden`, each row contiguous.
        out: float32 [tokens, columns].
        wide: float32, contiguous, with room for all of `weight`.
    """
    if weight.dtype == torch.float32:
        out.addmm_(hidden, weight)
    elif _is_fast(weight.dtype):
        out.add_(torch.mm(hidden, weight))
    else:
        out.addmm_(hidden.float(), wide.view(-1)[: weight.numel()].view(weight.shape).copy_(weight))


def _widened(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, wide: torch.Tensor) -> torch.Tensor:
    """The product in fp32, as many rows at a time as `wide` has room for."""
    rows, columns = weight.shape
    out, x_f32, room = torch.empty(*x.shape[:-1], rows, dtype=x.dtype, device="cpu"), x.float(), wide.view(-1)
    step = len(room) // columns
    for at in range(0, rows, step):
        part = weight[at : at + step]
        buffer = room[: part.numel()].view(part.shape).copy_(part)
        out[..., at : at + step] = F.linear(x_f32, buffer, None if bias is None else bias[at : at + step].float())
    return out


@lru_cache
def _few_of(dtype: torch.dtype) -> int:
    """Tokens up to which the compiled part is faster than torch's own product on this processor."""
    return _FEW_OF_FAST if _is_fast(dtype) else _FEW.get(dtype, 0)


def _is_fast(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies this 16-bit dtype faster than fp32, as far as torch reports."""
    return dtype in (torch.bfloat16, torch.float16) and _widened_from(dtype) == float("inf") and bool(_capabilities())


def _capabilities() -> dict[str, Any]:
    """The capabilities of this processor as torch reports them; empty if torch does not."""
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return found


@lru_cache
def _widened_from(dtype: torch.dtype) -> float:
    """Tokens from which on an fp32 GEMM of widened rows is faster than torch's own product on this processor."""
    if dtype not in (torch.bfloat16, torch.float16) or platform.machine() not in ("x86_64", "AMD64"):
        return float("inf")
    can = _capabilities()
    matrix, vector = ("amx_bf16", "avx512_bf16") if dtype == torch.bfloat16 else ("amx_fp16", "avx512_fp16")
    if not can or can.get(matrix):
        return float("inf")
    if not can.get(vector):
        return _FEW[dtype] + 1
    if dtype == torch.bfloat16 and "AMD" not in str(can.get("cpu_name")):  # Intel's bf16 is no faster than its fp32
        return _MANY
    return float("inf")
