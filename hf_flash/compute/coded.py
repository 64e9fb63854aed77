"""Matrices of numbers in 4 or 8 bits with scales, as in checkpoints of mxfp4, and of fp8 in blocks.

For few tokens the compiled part multiplies them in this form. For many tokens some rows at a time become plain numbers. These
are the numbers that transformers makes of such a checkpoint: numbers times scales in fp32, rounded to the compute dtype.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F

from hf_flash.base.arrays import Bytes
from hf_flash.compute import library as native
from hf_flash.compute.library import DTYPES, LinearJob, Scales
from hf_flash.store.experts import E2M1, E4M3, E8M0, Piece, bytes_of

CODES: Final = {**DTYPES, E2M1: 3, E4M3: 4, E8M0: 5}  # in the order of their numbers in native.h
_E2M1_VALUES: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_E2M1_BLOCK: Final = 32  # consecutive numbers of a row that share a scale


def is_known(piece: Piece) -> bool:
    """Whether the compiled part can multiply with this piece in its stored form, with its scales."""
    if piece.scales is None or piece.scales.dtype not in CODES:
        return False
    if piece.dtype == E2M1:
        return (piece.scales.dtype, piece.scales.block_rows, piece.scales.block_columns) == (E8M0, 1, _E2M1_BLOCK)
    return piece.dtype == E4M3


def scales_of(piece: Piece) -> Scales:
    """The structure that describes a piece's scales to the compiled part, without their address."""
    if piece.scales is None:
        return Scales()
    return Scales(0, piece.scales.block_rows, piece.scales.block_columns, piece.grid[1], CODES[piece.scales.dtype])


def decode(piece: Piece, numbers: Bytes, scales: Bytes, rows: slice, dtype: torch.dtype) -> torch.Tensor:
    """Some rows of a piece with scales, as plain numbers.

    Args:
        numbers, scales: the bytes of the whole piece as stored, contiguous.
        rows: begins at a multiple of the rows that share scales.
        dtype: the compute dtype.

    Returns:
        [rows, columns] in `dtype`.
    """
    assert piece.scales is not None
    library = native.library()
    if library is None or not is_known(piece):
        return decode_with_torch(piece, torch.from_numpy(numbers), torch.from_numpy(scales), rows).to(dtype)
    count = rows.stop - rows.start
    first_number, first_scale = _begin(piece, rows)
    out = torch.empty(count, piece.columns, dtype=dtype, device="cpu")
    job = LinearJob(
        weight=numbers.ctypes.data + first_number, out=out.data_ptr(), rows=count, columns=piece.columns,
        scales=scales_of(piece), dtype=DTYPES[dtype], weight_dtype=CODES[piece.dtype], threads=native.threads(),
    )  # fmt: skip
    job.scales.at = scales.ctypes.data + first_scale
    library.hf_decode(ctypes.byref(job))
    return out


def _begin(piece: Piece, rows: slice) -> tuple[int, int]:
    """The byte offsets, in its numbers and in its scales, where these rows begin."""
    assert piece.scales is not None
    first_scale = rows.start // piece.scales.block_rows * piece.grid[1] * piece.scales.dtype.itemsize
    return bytes_of(rows.start * piece.columns, piece.dtype), first_scale


def decode_with_torch(piece: Piece, numbers: torch.Tensor, scales: torch.Tensor, rows: slice) -> torch.Tensor:
    """As [`decode`], but float32 [rows, columns], without the compiled part and on any device.

    Args:
        numbers, scales: uint8, the bytes of the whole piece as stored, contiguous.
    """
    assert piece.scales is not None
    count, (first_number, first_scale) = rows.stop - rows.start, _begin(piece, rows)
    mine = numbers[first_number : first_number + bytes_of(count * piece.columns, piece.dtype)]
    if piece.dtype == E2M1:
        plain = F.embedding(mine.int(), _pairs(numbers.device)).view(count, piece.columns)
    else:
        plain = mine.view(piece.dtype).view(count, piece.columns).float()
    blocks = -(-count // piece.scales.block_rows), piece.grid[1]
    mine = scales[first_scale : first_scale + blocks[0] * blocks[1] * piece.scales.dtype.itemsize]
    grid = mine.view(piece.scales.dtype).view(blocks).float()
    by_row = grid.repeat_interleave(piece.scales.block_rows, 0)[:count]
    whole = piece.columns // piece.scales.block_columns
    if whole * piece.scales.block_columns == piece.columns:
        return plain.view(count, whole, -1).mul_(by_row.unsqueeze(-1)).view(count, -1)
    return plain.mul_(by_row.repeat_interleave(piece.scales.block_columns, 1)[:, : piece.columns])


@lru_cache
def _pairs(device: torch.device) -> torch.Tensor:
    """The two E2M1 numbers in each possible byte, float32 [256, 2]."""
    values = torch.tensor(_E2M1_VALUES, dtype=torch.float32, device="cpu")
    codes = torch.arange(256, dtype=torch.int64, device="cpu")
    return torch.stack([values[codes & 15], values[codes >> 4]], dim=1).to(device)


def are_numbers(piece: Piece, scales: Bytes) -> bool:
    """Whether all scales of a piece are finite numbers.

    Args:
        scales: the bytes of all of them as stored, contiguous.
    """
    assert piece.scales is not None
    if piece.scales.dtype == E8M0:
        return not bool((scales == 0xFF).any())
    return bool(torch.from_numpy(np.ascontiguousarray(scales)).view(piece.scales.dtype).isfinite().all())
