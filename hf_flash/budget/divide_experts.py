"""Divide a memory budget over what a mixture of experts holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from hf_flash.budget.expert_plan import ExpertPlan
from hf_flash.compute.expert_products import decoded_rows, decoded_size
from hf_flash.reading.experts import reader_bytes
from hf_flash.store.experts import ExpertLayer

PASSING_SLOTS: Final = 3  # one is computed with, two are read into
_WIDE: Final = 1 << 22  # numbers that rows are widened into, at most, if a row is not longer
_LEAST_WIDE: Final = 1 << 16


def divide_experts(
    budget_bytes: int,
    resident_bytes: int,
    table_bytes: int,
    layers: Sequence[ExpertLayer],
    slot_bytes: Sequence[int],
    dtype: torch.dtype,
    used: int,
    *,
    reader: str,
    io_threads: int,
) -> ExpertPlan:
    """Divide a memory budget. It may be too small for the plan: ask its `minimum_bytes`.

    Args:
        resident_bytes: of all weights that are not experts, in the dtype of compute.
        table_bytes: of these, what may stay on flash.
        slot_bytes: what a slot takes in each layer.
        dtype: of compute.
        used: experts that a token uses in a layer.
        reader, io_threads: as in `FlashOffloadConfig`.
    """
    numbers = (sum(piece.rows * piece.columns for piece in layer.pieces) for layer in layers)
    scratch = 4 * wide_numbers(layers, dtype) + decoded_bytes(layers, dtype) + PASSING_SLOTS * max(slot_bytes)
    return ExpertPlan(
        budget_bytes=budget_bytes,
        all_resident_bytes=resident_bytes,
        table_bytes=table_bytes,
        scratch_bytes=scratch + reader_bytes(reader, io_threads),
        slot_bytes=tuple(slot_bytes),
        experts=tuple(layer.experts for layer in layers),
        expert_bytes=tuple(count * dtype.itemsize for count in numbers),
        used=used,
    )


def decoded_bytes(layers: Sequence[ExpertLayer], dtype: torch.dtype) -> int:
    """Of plain numbers, made of some rows of numbers with scales at a time."""
    scaled = (piece for layer in layers for piece in layer.pieces if piece.scales)
    return max((decoded_rows(piece, dtype) * piece.columns * decoded_size(piece, dtype) for piece in scaled), default=0)


def wide_numbers(layers: Sequence[ExpertLayer], dtype: torch.dtype) -> int:
    """Numbers in the buffer that rows are widened into: a matrix, or some rows; next to nothing where nothing is widened."""
    if dtype == torch.float32:
        return 1
    pieces = [piece for layer in layers for piece in layer.pieces]
    most = min(_WIDE, max(piece.rows * piece.columns for piece in pieces))
    return max(_LEAST_WIDE, most, *(piece.columns for piece in pieces))
