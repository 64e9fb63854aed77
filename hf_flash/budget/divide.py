"""Divide a memory budget over what a model holds."""

from __future__ import annotations

from typing import Any

import torch

from hf_flash.budget.calibration_report import parse_report
from hf_flash.budget.demand import Demand, measured, supposed
from hf_flash.budget.plan import MemoryPlan, plan_memory
from hf_flash.compute.arithmetic import Arithmetic, block_rows
from hf_flash.compute.device_arithmetic import DeviceArithmetic
from hf_flash.families.base import Shape
from hf_flash.predictors.base import PredictorFormat
from hf_flash.predictors.low_bit import DeviceMatrix
from hf_flash.reading.on_device import DeviceReader
from hf_flash.reading.reader import reader_buffer_bytes
from hf_flash.store.layout import FlashStore
from hf_flash.store.names import META
from hf_flash.store.safetensors_files import read_header
from hf_flash.store.unit import UnitLayout


def divide_memory(
    budget: Any,
    resident_bytes: int,
    fmt: PredictorFormat | None,
    shape: Shape,
    unit: UnitLayout,
    dtype: torch.dtype,
    *,
    reader: str,
    io_threads: int,
    demand: Demand | None,
    device: torch.device | None = None,
    units_here: bool = False,
) -> MemoryPlan:
    """Divide a memory budget over what a model holds.

    Args:
        budget: as `FlashOffloadConfig` takes it; `None`: most of what is free.
        resident_bytes: bytes of all weights that are not FFN matrices, in the compute dtype.
        fmt: the predictor's format; `None`: no predictor.
        shape: the model's width and the neurons of each layer.
        unit: the layout of a neuron on flash.
        dtype: the compute dtype.
        reader, io_threads: as in `FlashOffloadConfig`.
        demand: how many neurons tokens need, which decides how windows are divided; `None`: evenly.
        device: where the model computes; `None`: on the CPU.
        units_here: whether the units compute on the CPU although the model is on a device.

    Raises:
        BudgetError: the budget is below the minimum.
        ConfigError: the budget names a device that holds no part of this model.
    """
    in_memory = unit.as_dtype(dtype)
    scratch, buffers = Arithmetic.size(shape.d_ff, in_memory), reader_buffer_bytes(unit, dtype, reader, io_threads)
    on_device = device is not None and not units_here
    if on_device:
        lanes = DeviceReader.device_bytes(in_memory, block_rows(shape.d_ff, 2))
        widened = 0 if fmt is None else DeviceMatrix.scratch_bytes(shape.d_ff, shape.d_model)
        scratch, buffers = DeviceArithmetic.size(shape.d_ff, in_memory) + lanes + widened, buffers + lanes
    return plan_memory(
        budget,
        resident_bytes=resident_bytes,
        predictor_bytes=fmt.dram_bytes(shape) if fmt else 0,
        scratch_bytes=scratch if on_device else scratch + buffers,
        units_here=units_here,
        device=None if device is None else str(device),
        buffer_bytes=buffers,
        widths=shape.widths,
        bundle_bytes=in_memory.row_bytes,
        demand=demand,
    )


def stored_report(store: FlashStore) -> dict[str, Any] | None:
    """The report that `calibrate` left in this store; `None` if it was never run.

    Raises:
        StoreFormatError: the report is damaged.
    """
    if store.calibration is None:
        return None
    return parse_report(read_header(store.calibration)[1][META + "calibration"], store.calibration, len(store.layers))


def expected_demand(fmt: PredictorFormat | None, shape: Shape, store: FlashStore | None) -> Demand | None:
    """How many neurons tokens need, from the store's calibration if it has one, else from assumed shares.

    `None` without a predictor: every token needs every neuron.
    """
    if fmt is None:
        return None
    report = None if store is None else stored_report(store)
    if report is None:
        return supposed(shape.widths, fmt.kind, None, None, None)
    return measured(report["layers"], fmt.variant, fmt.kind, shape.widths)
