"""Divide a memory budget over what a model holds."""

from __future__ import annotations

from typing import Any

import torch

from hf_flash.budget.calibration_report import parse_report
from hf_flash.budget.demand import Demand, measured, supposed
from hf_flash.budget.plan import MemoryPlan, plan_memory
from hf_flash.compute.arithmetic import Scratch
from hf_flash.predictors.base import PredictorForm
from hf_flash.predictors.lowrank import VARIANT
from hf_flash.reading.reader import reader_buffer_bytes
from hf_flash.store.layout import META, FlashStore
from hf_flash.store.safetensors_files import read_header


def divide_memory(
    budget: int | str | None,
    resident_bytes: int,
    form: PredictorForm | None,
    dims: tuple[int, int, int],
    dtype: torch.dtype,
    stored: torch.dtype,
    *,
    reader: str,
    io_threads: int,
    demand: Demand | None,
) -> MemoryPlan:
    """Divide a memory budget over what a model holds.

    Args:
        budget: a size, or `None` for most of what is free.
        resident_bytes: of all weights that are not FFN matrices, in the dtype of compute.
        form: the predictor; `None` for none.
        dims: layers, d_ff and d_model.
        dtype: of compute. `stored`: on flash.
        reader, io_threads: as in `FlashOffloadConfig`.
        demand: what tokens need, by which windows are divided; `None`: evenly.

    Raises:
        BudgetError: the budget is below the minimum.
    """
    layers, d_ff, d_model = dims
    buffers = reader_buffer_bytes(d_model, stored, dtype, reader, io_threads)
    return plan_memory(
        budget,
        resident_bytes=resident_bytes,
        predictor_bytes=form.dram_bytes(layers, d_ff, d_model) if form else 0,
        scratch_bytes=Scratch.size(d_ff, d_model, dtype) + buffers,
        layers=layers,
        d_ff=d_ff,
        bundle_bytes=2 * d_model * dtype.itemsize,
        demand=demand,
    )


def stored_report(store: FlashStore) -> dict[str, Any] | None:
    """What `calibrate` returned when it was run on this store, if it was."""
    if store.calibration is None:
        return None
    return parse_report(read_header(store.calibration)[1][META + "calibration"], store.calibration, len(store.layers))


def expected_demand(form: PredictorForm | None, dims: tuple[int, int, int], store: FlashStore | None) -> Demand | None:
    """What tokens need, as calibrated or else assumed; `None`: everything."""
    if form is None:
        return None
    layers, d_ff, _ = dims
    kind = "lowrank" if form.variant == VARIANT else "quantized"
    report = None if store is None else stored_report(store)
    if report is None:
        return supposed(layers, d_ff, kind, None, None, None)
    return measured(report["layers"], form.variant, kind, d_ff)
