"""Matrices in 8 and 4 bits, which predictors hold in DRAM, and their products with a few tokens.

    8 bits   symmetric, `w = code * scale`, one scale per row
    4 bits   asymmetric, `w = (code - 8) * scale + zero`, for each group of columns the range with the smallest squared error

The store keeps plain codes, so that a file made on one machine serves on every other. The compiled part (compute/kernels.py)
multiplies plain codes; without it torch multiplies, and its 4-bit layout is made at loading. If torch has no fast product for a
shape or a machine either, plain codes are widened some rows at a time, which is logged once.

In all cases a token's sums do not depend on the number of tokens beside it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, Protocol

import torch
import torch.nn.functional as F

from hf_flash.compute import library as native
from hf_flash.compute.kernels import Product, quantize
from hf_flash.compute.library import GROUP_STEP

logger = logging.getLogger("hf_flash")

_ROWS: Final = 1024  # rows packed or widened at a time
_INT8_COLUMNS: Final = 16  # torch's int8 product takes columns in steps of a vector register, at most 16 floats
_TOKENS: Final = 256  # tokens multiplied at a time
_WIDENED: Final = 1 << 24  # numbers that a device widens at a time
_WIDENING_BYTES: Final = 7  # the most temporary bytes for each of these: float32, and unpacked 4-bit codes
_SHRINK: Final = (1.0, 0.95, 0.9, 0.85, 0.8)  # candidate scales, as shares of the full range of a group


def quantize_rows(w: torch.Tensor, bits: int, group: int) -> dict[str, torch.Tensor]:
    """Quantize the rows of a matrix.

    Args:
        w: [rows, columns], any floating dtype.
        bits: 4 or 8.
        group: columns that share a scale; all of them in 8 bits.

    Returns:
        `codes` (4 bits: uint8 [rows, columns / 2], two codes per byte; 8 bits: int8 [rows, columns]), `scales` and, in 4 bits,
        `zeros` (bfloat16 [rows, groups]), and `error`, float32 [rows]: the norm of a row's rounding error. The bits are the
        same with and without the compiled part. A weight that is NaN gets the lowest code (in 4 bits, so does its group), and
        the error of its row is NaN.
    """
    if native.library() is not None and w.device.type == "cpu":
        w = w if w.dtype in native.DTYPES else w.float()
        return quantize(w if w.stride(1) == 1 else w.contiguous(), bits, group)
    return _quantize_with_torch(w.float().reshape(len(w), -1, group), bits)


def _quantize_with_torch(w: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
    """[`quantize_rows`] of `w` float32 [rows, groups, group]. quantize.c takes the same steps: change both or neither."""
    if bits == 8:
        scale = _safe_scale(w.abs().amax(-1, keepdim=True) / 127)
        code = (w / scale).round_().clamp_(-127, 127).nan_to_num_(nan=-127)
        loss = _sum_of_eighths((code * scale).sub_(w).square_())
        return {
            "codes": code.flatten(1).to(torch.int8),
            "scales": scale[..., 0].bfloat16(),
            "error": _root(_sum_of_eighths(loss)),
        }
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    best: tuple[torch.Tensor, ...] | None = None
    for shrink in _SHRINK:
        scale = _safe_scale((high - low) * shrink / 15)
        zero = ((high + low + scale * (high > low)) / 2).bfloat16().float()
        code = (w - zero).div_(scale).round_().clamp_(-8, 7)
        loss = _sum_of_eighths((code * scale).add_(zero).sub_(w).square_()).unsqueeze(-1)
        if best is None:
            best = loss, code, scale, zero
        else:
            better = loss < best[0]
            best = tuple(torch.where(better, new, old) for new, old in zip((loss, code, scale, zero), best, strict=True))
    assert best is not None
    loss, code, scale, zero = best
    nibbles = code.nan_to_num_(nan=-8).add_(8).flatten(1).to(torch.uint8)
    return {
        "codes": nibbles[:, 0::2] | nibbles[:, 1::2] << 4,
        "scales": scale[..., 0].bfloat16(),
        "zeros": zero[..., 0].bfloat16(),
        "error": _root(_sum_of_eighths(loss[..., 0])),
    }


def _sum_of_eighths(x: torch.Tensor) -> torch.Tensor:
    """Sums over the last axis, in the same order on every machine: eight partial sums, each over every eighth number."""
    padded = F.pad(x, (0, -x.shape[-1] % 8))
    first, *others = padded.view(*padded.shape[:-1], -1, 8).unbind(-2)
    sums: torch.Tensor = first.clone()
    for other in others:
        sums += other
    for half in (4, 2, 1):
        sums = sums[..., :half] + sums[..., half:]
    return sums[..., 0]


def _root(x: torch.Tensor) -> torch.Tensor:
    """The correctly rounded square root of float32: torch's own is off by one bit for every sixth number."""
    return x.double().sqrt_().float()


def _safe_scale(scale: torch.Tensor) -> torch.Tensor:
    """Scales, rounded to the stored dtype; 1 if the group is constant, or the scale is NaN."""
    scale = scale.bfloat16().float()
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def widen(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
    """The matrix, float32 [rows, columns], from the tensors of [`quantize_rows`]."""
    if zeros is None:
        return codes.float() * scales.float()
    rows, groups = scales.shape
    grouped = (_nibbles(codes) - 8).float().view(rows, groups, -1)
    return (grouped * scales.float().unsqueeze(-1) + zeros.float().unsqueeze(-1)).view(rows, -1)


def _nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Unpack uint8 [rows, columns / 2] to int32 [rows, columns], from 0 to 15."""
    return torch.stack([codes & 15, codes >> 4], dim=-1).view(codes.shape[0], -1).to(torch.int32)


class LowBitMatrix(Protocol):
    """A matrix [rows, columns] in DRAM that multiplies tokens."""

    nbytes: int
    compiled: Product | None

    def __call__(self, x: torch.Tensor, shift: torch.Tensor | None = None) -> torch.Tensor:
        """The product with `x`, bfloat16 or float32 [tokens, columns], plus `shift`, float32 [rows].

        Returns:
            [tokens, rows], bfloat16 or float32.
        """
        ...


class Int8Matrix:
    """8 bits, one scale per row. Args: `codes` int8 [rows, columns], `scales` bfloat16 [rows, 1]; both are copied."""

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor) -> None:
        self._codes, self._scales = codes.clone(), scales.reshape(-1).clone()
        self.nbytes = self._codes.nbytes + self._scales.nbytes
        self.compiled: Product | None = Product(self._codes, self._scales, None) if native.library() else None
        self.packed = False
        if self.compiled is None:
            whole = codes.shape[1] % _INT8_COLUMNS == 0  # torch does not check, and reads beyond the matrix
            self.packed = whole and _works(lambda: self._packed(_probe(codes.shape[1])))
            if not self.packed:
                _warn_slow("int8", codes.shape[1])

    def __call__(self, x: torch.Tensor, shift: torch.Tensor | None = None) -> torch.Tensor:
        if self.compiled is not None:
            return self.compiled(x, shift)
        return _sum(self._packed(x.bfloat16()) if self.packed else self.plain(x.bfloat16()), shift)

    def _packed(self, x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.ops.aten._weight_int8pack_mm(x, self._codes, self._scales)
        return product

    def plain(self, x: torch.Tensor) -> torch.Tensor:
        """The product from plain codes."""
        return _plain_product(x, lambda rows: widen(self._codes[rows], self._scales[rows, None], None), len(self._codes))


class Int4Matrix:
    """4 bits in groups. Args: `codes`, `scales`, `zeros` as [`quantize_rows`] returns them; `group` columns share a scale."""

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, group: int) -> None:
        self._group, columns = group, 2 * codes.shape[1]
        self._codes, self._scales, self._zeros = codes, scales, zeros
        self.compiled: Product | None = None
        self.packed = False
        compiles = native.library() is not None and group % GROUP_STEP == 0
        if compiles or not self._pack(columns):
            self._codes, self._scales, self._zeros = codes.clone(), scales.clone(), zeros.clone()
            if compiles:
                self.compiled = Product(self._codes, self._scales, self._zeros)
            else:
                _warn_slow("int4", columns)
        self.nbytes = self._codes.nbytes + scales.nbytes + zeros.nbytes

    def _pack(self, columns: int) -> bool:
        """Convert the codes to the layout of torch's product; returns whether torch has one that works."""
        codes = self._codes
        try:
            slices = [
                torch.ops.aten._convert_weight_to_int4pack_for_cpu(_nibbles(codes[at : at + _ROWS]), 1)
                for at in range(0, len(codes), _ROWS)
            ]
        except (RuntimeError, AttributeError):
            return False
        self._pairs = torch.stack([self._scales, self._zeros], dim=-1).transpose(0, 1).contiguous()  # [groups, rows, 2]
        self._codes = torch.cat(slices)
        self.packed = _works(lambda: self._packed(_probe(columns)))
        if not self.packed:
            self._codes = codes
        return self.packed

    def __call__(self, x: torch.Tensor, shift: torch.Tensor | None = None) -> torch.Tensor:
        if self.compiled is not None:
            return self.compiled(x, shift)
        return _sum(self._packed(x.bfloat16()) if self.packed else self.plain(x.bfloat16()), shift)

    def _packed(self, x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self._codes, self._group, self._pairs)
        return product

    def plain(self, x: torch.Tensor) -> torch.Tensor:
        """The product from plain codes; only valid without a packed layout."""

        def rows_of(rows: slice) -> torch.Tensor:
            return widen(self._codes[rows], self._scales[rows], self._zeros[rows])

        return _plain_product(x, rows_of, len(self._codes))


class DeviceMatrix:
    """8 or 4 bits on a device, widened some rows at a time by torch's own operators.

    Args:
        codes, scales, zeros: as [`quantize_rows`] returns them; `zeros` is `None` in 8 bits.
        device: the device that the copies are on.
    """

    compiled: Product | None = None

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, device: torch.device) -> None:
        self._codes, self._scales = codes.to(device, copy=True), scales.to(device, copy=True)
        self._zeros = None if zeros is None else zeros.to(device, copy=True)
        self._columns = codes.shape[1] * (1 if zeros is None else 2)
        self.nbytes = codes.nbytes + scales.nbytes + (0 if zeros is None else zeros.nbytes)

    @staticmethod
    def scratch_bytes(rows: int, columns: int) -> int:
        """The most temporary bytes that a product takes on the device."""
        return _WIDENING_BYTES * columns * min(rows, _widened_rows(columns))

    def __call__(self, x: torch.Tensor, shift: torch.Tensor | None = None) -> torch.Tensor:
        tokens = torch.split(x.float(), 1)  # each by itself, so that the tokens beside it change no bits
        found = []
        for at in range(0, len(self._codes), _widened_rows(self._columns)):
            multiply = self._product(slice(at, at + _widened_rows(self._columns)))
            found.append(torch.cat([multiply(token) for token in tokens]))
        return _sum(torch.cat(found, dim=1), shift)

    def _product(self, rows: slice) -> Callable[[torch.Tensor], torch.Tensor]:
        """A function that multiplies a token, float32 [1, columns], with some rows, to [1, rows]; codes are widened once."""
        scales = self._scales[rows].float()
        if self._zeros is None:
            codes = self._codes[rows].float()
            return lambda token: F.linear(token, codes) * scales.view(1, -1)
        groups = scales.shape[1]
        nibbles = self._codes[rows]
        codes = torch.stack([nibbles & 15, nibbles >> 4], dim=-1).float().view(len(nibbles), groups, -1)
        zeros = self._zeros[rows].float() - 8 * scales

        def multiply(token: torch.Tensor) -> torch.Tensor:
            """For each group: scale * (codes . inputs) + (sum of inputs) * (value of code 0)."""
            parts = token.view(groups, -1)
            sums = torch.bmm(codes.transpose(0, 1), parts.unsqueeze(2)).squeeze(2)  # [groups, rows]
            return ((sums.T * scales).sum(1) + zeros @ parts.sum(1)).unsqueeze(0)

        return multiply


def matrix_in(
    device: torch.device, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, group: int
) -> LowBitMatrix:
    """A matrix in 4 bits, or in 8 bits if `zeros` is `None`, of the fastest kind for a device; arguments as in `Int4Matrix`."""
    if device != torch.device("cpu"):
        return DeviceMatrix(codes, scales, zeros, device)
    return Int8Matrix(codes, scales) if zeros is None else Int4Matrix(codes, scales, zeros, group)


def _widened_rows(columns: int) -> int:
    return max(1, _WIDENED // columns)


def _sum(product: torch.Tensor, shift: torch.Tensor | None) -> torch.Tensor:
    return product if shift is None else product + shift


@dataclass(frozen=True)
class Scores:
    """The scores that a predictor gives tokens: `matrix @ x + shift + bias`.

    Attributes:
        matrix: [neurons, columns].
        shift: float32 [neurons], multiplied by `shift_scale` before it is added.
        bias: [neurons], any floating dtype.
        first: another matrix, with which `x` is multiplied before.
    """

    matrix: LowBitMatrix
    shift: torch.Tensor
    bias: torch.Tensor | None = None
    first: LowBitMatrix | None = None

    def __call__(self, x: torch.Tensor, shift_scale: torch.Tensor | None = None) -> torch.Tensor:
        """The scores, [tokens, neurons] in float32 or bfloat16.

        Args:
            x: bfloat16 [tokens, columns].
            shift_scale: float32 [tokens]; `None`: 1.
        """
        x = x if self.first is None else self.first(x)
        if shift_scale is None:
            scores = self.matrix(x, self.shift)
        else:
            scores = self.matrix(x) + shift_scale[:, None] * self.shift
        return scores if self.bias is None else scores + self.bias

    def called_active(self, x: torch.Tensor, shift_scale: torch.Tensor | None = None) -> torch.Tensor:
        """Where the score is above zero, or NaN, so that a NaN is computed: bool [tokens, neurons]."""
        first = None if self.first is None else self.first.compiled
        if self.matrix.compiled is None or (first is None) != (self.first is None):
            return ~(self(x, shift_scale) <= 0)
        return self.matrix.compiled.active(x, self.shift, shift_scale=shift_scale, bias=self.bias, first=first)


def by_tokens(x: torch.Tensor, compute: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """`compute` over some tokens at a time, which bounds its temporary memory."""
    parts = [compute(x[at : at + _TOKENS]) for at in range(0, x.shape[0], _TOKENS)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _plain_product(x: torch.Tensor, rows_of: Callable[[slice], torch.Tensor], count: int) -> torch.Tensor:
    """The product in float64, then rounded, so that a token's sums do not depend on the number of tokens beside it."""
    wide = x.double()
    parts = [F.linear(wide, rows_of(slice(at, at + _ROWS)).double()).float() for at in range(0, count, _ROWS)]
    return torch.cat(parts, dim=1)


def _probe(columns: int) -> torch.Tensor:
    return torch.zeros(1, columns, dtype=torch.bfloat16, device="cpu")


def _works(call: Callable[[], Any]) -> bool:
    try:
        call()
    except (RuntimeError, AttributeError):
        return False
    return True


@lru_cache
def _warn_slow(kind: str, columns: int) -> None:
    """Log once that torch has no fast product here."""
    logger.warning(
        "hf_flash: torch has no packed %s product for %d columns on this machine; predicting takes the slow path", kind, columns
    )
