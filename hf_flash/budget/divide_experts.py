"""Divide a memory budget over what a mixture of experts holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import torch

from hf_flash.budget.ceilings import Ceilings
from hf_flash.budget.expert_plan import ExpertPlan
from hf_flash.budget.host_tier import HostTier
from hf_flash.compute.expert_products import decoded_rows, decoded_size
from hf_flash.reading.experts import ExpertPlaces, reader_bytes
from hf_flash.store.experts import ExpertLayer

PASSING_SLOTS: Final = 3  # for experts that do not stay: one is computed with while two are read into
RING_SLOTS: Final = 5  # slots in host memory for experts on the way to a device: four are read into, one is copied
_WIDE: Final = 1 << 22  # most numbers in the buffer that rows are widened into, unless a single row is longer
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
    """Divide a memory budget over a mixture. Nothing is refused: compare the plan's `minimum_bytes`, or call `checked_plan`.

    Args:
        budget_bytes: the budget.
        resident_bytes: bytes of all weights that are not experts, in the compute dtype.
        table_bytes: how many of these are the table of embeddings, which may stay on flash.
        layers: the layers with experts.
        slot_bytes: size of a slot in each of these layers.
        dtype: the compute dtype.
        used: experts that a token uses in a layer.
        reader, io_threads: as in `FlashOffloadConfig`.
    """
    scratch = 4 * wide_numbers(layers, dtype) + decoded_bytes(layers, dtype) + PASSING_SLOTS * max(slot_bytes)
    plan = _plan(budget_bytes, resident_bytes, table_bytes, layers, slot_bytes, dtype, used)
    return replace(plan, scratch_bytes=scratch + reader_bytes(reader, io_threads))


def _plan(
    budget_bytes: int,
    resident_bytes: int,
    table_bytes: int,
    layers: Sequence[ExpertLayer],
    slot_bytes: Sequence[int],
    dtype: torch.dtype,
    used: int,
) -> ExpertPlan:
    """A plan without scratch buffers; arguments as in [`divide_experts`]."""
    numbers = (sum(piece.rows * piece.columns for piece in layer.pieces) for layer in layers)
    return ExpertPlan(
        budget_bytes=budget_bytes,
        all_resident_bytes=resident_bytes,
        table_bytes=table_bytes,
        scratch_bytes=0,
        slot_bytes=tuple(slot_bytes),
        experts=tuple(layer.experts for layer in layers),
        expert_bytes=tuple(count * dtype.itemsize for count in numbers),
        used=used,
    )


def divide_experts_on_device(
    ceilings: Ceilings,
    resident_bytes: int,
    table_bytes: int,
    places: ExpertPlaces,
    dtype: torch.dtype,
    used: int,
    *,
    reader: str,
    io_threads: int,
) -> ExpertPlan:
    """Divide a memory budget for a device, and one for this machine. Nothing is refused: `checked_plan` does that.

    Args:
        ceilings: both budgets.
        places: where the layers' experts lie on flash.
        resident_bytes, table_bytes, dtype, used, reader, io_threads: as in [`divide_experts`].
    """
    layers = places.layers
    slot_bytes = [layer.packed_bytes for layer in layers]
    plan = replace(
        _plan(ceilings.device_bytes, resident_bytes, table_bytes, layers, slot_bytes, dtype, used),
        scratch_bytes=PASSING_SLOTS * max(slot_bytes) + _converted_bytes(layers, dtype),
        device=ceilings.device or "cpu",
    )
    buffers = RING_SLOTS * max(places.slot_bytes) + reader_bytes(reader, io_threads)
    return replace(plan, host=_host_tier(ceilings.host_bytes, buffers, plan))


def _host_tier(budget_bytes: int | None, buffer_bytes: int, plan: ExpertPlan) -> HostTier:
    """Slots in host memory for experts that do not fit on the device: equally many for each layer, one of them always free."""
    if budget_bytes is None:
        return HostTier(None, buffer_bytes, (0,) * plan.layers, plan.slot_bytes)
    each = max(0, budget_bytes - buffer_bytes) // sum(plan.slot_bytes)
    rest = (experts - there for experts, there in zip(plan.experts, plan.capacities, strict=True))
    slots = tuple(min(each, left + 1) if min(each, left) else 0 for left in rest)
    slots = tuple(count if count > 1 else 0 for count in slots)  # a single slot, always free, would hold nothing
    return HostTier(budget_bytes, buffer_bytes, slots, plan.slot_bytes)


def decoded_bytes(layers: Sequence[ExpertLayer], dtype: torch.dtype) -> int:
    """Size of the buffer in which some rows at a time of numbers with scales become plain numbers."""
    scaled = (piece for layer in layers for piece in layer.pieces if piece.scales)
    return max((decoded_rows(piece, dtype) * piece.columns * decoded_size(piece, dtype) for piece in scaled), default=0)


def _converted_bytes(layers: Sequence[ExpertLayer], dtype: torch.dtype) -> int:
    """Scratch to convert the largest piece on a device to the compute dtype; with scales, for its codes and fp32 values."""
    pieces = (piece for layer in layers for piece in layer.pieces if piece.dtype != dtype)
    return max((p.rows * p.columns * (dtype.itemsize + (8 if p.scales else 0)) for p in pieces), default=0)


def wide_numbers(layers: Sequence[ExpertLayer], dtype: torch.dtype) -> int:
    """Numbers in the buffer that rows are widened into: a matrix, or some rows of it; 1 in fp32, where nothing is widened."""
    if dtype == torch.float32:
        return 1
    pieces = [piece for layer in layers for piece in layer.pieces]
    most = min(_WIDE, max(piece.rows * piece.columns for piece in pieces))
    return max(_LEAST_WIDE, most, *(piece.columns for piece in pieces))
