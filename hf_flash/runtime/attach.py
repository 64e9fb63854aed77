"""Bring a loaded model to life."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import nn

from hf_flash.base.buffers import load_into_memory
from hf_flash.base.heap import trim_heap
from hf_flash.budget.plan import MemoryPlan
from hf_flash.compute.arithmetic import Scratch
from hf_flash.config import FlashOffloadConfig
from hf_flash.machine.free_memory import available_memory
from hf_flash.predictors.base import NoPredictor, PredictorForm
from hf_flash.reading.reader import open_reader
from hf_flash.runtime.engine import Engine
from hf_flash.runtime.flash_weights import Matrix
from hf_flash.runtime.layer import FlashFFN
from hf_flash.runtime.model import FlashRuntime
from hf_flash.runtime.resident_linear import adopt
from hf_flash.runtime.swap import DownBias
from hf_flash.runtime.window import ResidentWindow
from hf_flash.store.checkpoint import Checkpoint
from hf_flash.store.layout import FlashStore


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
