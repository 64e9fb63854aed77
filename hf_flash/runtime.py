"""A loaded flash model: what its layers run on, what it did and holds, how it is closed."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from torch import nn

from .budget import MemoryPlan, available_memory, plan_memory
from .checkpoint import Checkpoint
from .compute import Scratch
from .config import FlashOffloadConfig
from .counters import FlashStats
from .demand import Demand, measured, supposed
from .errors import UsageError
from .ffn import DownBias, Engine, FlashFFN
from .header import read_header
from .linear import adopt
from .lowrank import VARIANT
from .matrices import Matrix
from .memory import load_into_memory, trim_heap
from .predictor import NoPredictor, PredictorForm
from .reader import open_reader, reader_buffer_bytes
from .report import parse_report
from .store import META, FlashStore
from .window import ResidentWindow


@dataclass
class FlashRuntime:
    """Everything behind a loaded model but the modules themselves. Reach it with `find_runtime(model)`."""

    config: FlashOffloadConfig
    plan: MemoryPlan
    store: FlashStore
    checkpoint: Checkpoint
    form: PredictorForm | None
    engine: Engine
    ffns: Sequence[FlashFFN]

    def __deepcopy__(self, memo: Any) -> FlashRuntime:
        """A copied model reads the same store through the same windows."""
        return self

    def stats(self) -> FlashStats:
        plan = self.plan
        return FlashStats(
            layers=plan.layers,
            d_ff=plan.d_ff,
            window=self.config.window,
            capacity=plan.capacity,
            predictor=self.form.variant if self.form else "none",
            reader=self.engine.reader.name,
            reads_with=self.engine.reader.source.reads_with,
            budget_bytes=plan.budget_bytes,
            minimum_bytes=plan.minimum_bytes,
            resident_bytes=plan.resident_bytes,
            predictor_bytes=sum(ffn.predictor.nbytes for ffn in self.ffns),
            scratch_bytes=self.engine.scratch_bytes,
            window_bytes=sum(ffn.window.matrix.nbytes for ffn in self.ffns),
            dense_bytes=plan.dense_bytes,
            process_bytes=int(psutil.Process().memory_info().rss),
            kv_cache_bytes_per_token=2 * plan.layers * self.ffns[0].d_model * self.engine.dtype.itemsize,
            counters=replace(self.engine.counters),
        )


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


def attach(
    model: nn.Module,
    config: FlashOffloadConfig,
    plan: MemoryPlan,
    store: FlashStore,
    checkpoint: Checkpoint,
    form: PredictorForm | None,
    ffns: Sequence[FlashFFN],
    dtype: torch.dtype,
) -> None:
    """Bring a model whose other weights are loaded to life: weights into memory, predictors, windows, reader."""
    load_into_memory({id(t): t for t in [*model.parameters(), *model.buffers()]}.values())
    spare_bytes = available_memory() - plan.predictor_bytes - plan.scratch_bytes - plan.window_bytes  # for the page cache
    first = store.layers[0]
    scratch = Scratch(first.d_ff, first.d_model, dtype)
    reader = open_reader(store, config.reader, config.io_threads, dtype, spare_bytes)
    engine = Engine(reader, scratch, dtype, early=config.lookahead != 0)
    predictors = [
        NoPredictor() if form is None else form.load(store, layer, ffn.bias)
        for ffn, layer in zip(ffns, store.layers, strict=True)
    ]
    store.check_unchanged()  # while it was opened, made predictors of and opened for reading
    trim_heap()
    checkpoint.release()
    for ffn, predictor, capacity in zip(ffns, predictors, plan.capacities, strict=True):  # last: they fill the budget
        ffn.attach(engine, ResidentWindow(first.d_ff, first.d_model, capacity, config.window, dtype), predictor)
    for module in model.modules():
        if isinstance(module, FlashFFN | DownBias):
            module.matrix = Matrix(store.layers[module.index], isinstance(module, DownBias), dtype)
    adopt(model, engine)
    runtime = FlashRuntime(config, plan, store, checkpoint, form, engine, ffns)
    model.flash_runtime = runtime  # type: ignore[assignment]
    engine.runtime = weakref.ref(runtime)  # the other way round would be a cycle


def find_runtime(model: Any) -> FlashRuntime:
    """The runtime of a flash model, of a pipeline around one, or of any module that contains one.

    Raises:
        UsageError: there is no flash model in it.
    """
    module = getattr(model, "model", model) if not isinstance(model, nn.Module) else model
    for part in module.modules() if isinstance(module, nn.Module) else ():
        if isinstance(part, FlashFFN) and part.engine is not None:
            runtime = part.engine.runtime()
            if isinstance(runtime, FlashRuntime):
                return runtime
    raise UsageError(
        "not a flash model",
        got=type(model).__name__,
        hint="load it with from_pretrained(..., quantization_config=FlashOffloadConfig())",
    )


def stats(model: Any, *, reset: bool = False) -> FlashStats:
    """What a flash model did since loading, or since the last reset, and what it holds in DRAM.

    Args:
        model: a flash model, or a pipeline around one.
        reset: start the counters again from zero.

    Returns:
        A snapshot; `print` it, or take `to_dict()`.
    """
    runtime = find_runtime(model)
    with runtime.engine.lock:
        snapshot = runtime.stats()
        if reset:
            runtime.engine.counters.reset()
    return snapshot


def close(model: Any) -> None:
    """Close the store's files and give the windows' memory back. May be called twice.

    Neither the model nor any copy of it can run afterwards.
    """
    runtime = find_runtime(model)
    with runtime.engine.lock:
        runtime.engine.close()
        for ffn in runtime.ffns:
            ffn.window.release()
