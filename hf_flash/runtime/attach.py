"""Set up a loaded model: weights in memory of our own, predictors, windows, reader."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import nn

from hf_flash.base.buffers import load_into_memory
from hf_flash.base.heap import trim_heap
from hf_flash.budget.plan import MemoryPlan
from hf_flash.compute.activation import Activation
from hf_flash.compute.arithmetic import arithmetic_for, block_rows
from hf_flash.compute.device_arithmetic import DeviceArithmetic
from hf_flash.compute.transfers import Transfers
from hf_flash.config import FlashOffloadConfig
from hf_flash.errors import ConfigError
from hf_flash.families.base import Family
from hf_flash.families.decoder import decoder_of
from hf_flash.machine.free_memory import available_memory
from hf_flash.predictors.base import NoPredictor, Predictor, PredictorFormat
from hf_flash.reading.on_device import DeviceReader
from hf_flash.reading.reader import open_reader, open_source
from hf_flash.runtime.attention import make_attention_resident
from hf_flash.runtime.engine import Engine
from hf_flash.runtime.flash_weights import Matrix, OnFlash
from hf_flash.runtime.layer import FlashFFN
from hf_flash.runtime.model import FlashRuntime
from hf_flash.runtime.resident_linear import make_linears_resident
from hf_flash.runtime.sites import WeightOnFlash
from hf_flash.runtime.window import ResidentWindow
from hf_flash.store.checkpoint import Checkpoint
from hf_flash.store.layout import FlashStore
from hf_flash.store.unit import UnitLayout


def attach(
    model: nn.Module,
    config: FlashOffloadConfig,
    family: Family,
    plan: MemoryPlan,
    store: FlashStore,
    checkpoint: Checkpoint,
    fmt: PredictorFormat | None,
    ffns: Sequence[FlashFFN],
    device: torch.device | None,
    units_on: torch.device | None,
) -> None:
    """Give the feed-forward blocks of a model their engine, windows and predictors, once its other weights are loaded.

    Args:
        model: the model, with the blocks replaced.
        config: its configuration.
        family: its family.
        plan: how the memory budget is divided.
        store: the neurons on flash.
        checkpoint: where the other weights came from.
        fmt: the predictor's format; `None`: every neuron is used.
        ffns: the blocks that were replaced, by layer.
        device: where the model is; `None`: in this machine's memory.
        units_on: where the blocks compute; `None`: on the CPU.

    Raises:
        ConfigError: the predictor does not compute on `units_on`.
    """
    load_into_memory({id(t): t for t in [*model.parameters(), *model.buffers()]}.values())
    shape, dtype = family.shape(model.config), model.config.dtype
    in_memory = store.unit.as_dtype(dtype)  # type: ignore[arg-type]
    engine = _engine(config, plan, store, in_memory, ffns[0].activation, units_on)
    engine.device = device or engine.device
    load = None if fmt is None else _loader(fmt, units_on)
    predictors = [
        NoPredictor() if load is None else load(store, layer, ffn.projections[in_memory.deciding].bias)
        for ffn, layer in zip(ffns, store.layers, strict=True)
    ]
    store.check_unchanged()  # since it was opened: predictors and reader have opened the files again
    trim_heap()
    checkpoint.release()
    matrices = engine.arithmetic.matrices(plan.capacities)  # last: they fill the budget
    for ffn, predictor, matrix in zip(ffns, predictors, matrices, strict=True):
        ffn.attach(engine, ResidentWindow(ffn.d_ff, matrix, config.window), predictor)
    for module in model.modules():
        if isinstance(module, OnFlash):
            module.place = engine.device
        if isinstance(module, WeightOnFlash):
            layer = store.layers[module.index]
            module.put(Matrix(layer, layer.name(module.role), in_memory.dtype))
    if device is None:
        make_linears_resident(model, engine)
        make_attention_resident(model)
    if fmt is not None:
        engine.sequences.watch(decoder_of(model))
    runtime = FlashRuntime(config, plan, store, checkpoint, fmt, shape, engine, ffns)
    model.flash_runtime = runtime  # type: ignore[assignment]
    engine.runtime = weakref.ref(runtime)  # the other way round would be a cycle


def _loader(fmt: PredictorFormat, device: torch.device | None) -> Callable[..., Predictor]:
    """The function that loads the predictor of a layer, on a device if one is given.

    Raises:
        ConfigError: predictors of this format do not compute on a device.
    """
    if device is None:
        return fmt.load
    if "device" not in inspect.signature(fmt.load).parameters:
        raise ConfigError(
            "this predictor does not compute on a device",
            where="predictor",
            got=fmt.kind,
            hint='predictor="none", units_on="cpu", or device_map="cpu"',
        )
    return functools.partial(fmt.load, device=device)


def _engine(
    config: FlashOffloadConfig,
    plan: MemoryPlan,
    store: FlashStore,
    unit: UnitLayout,
    activation: Activation,
    device: torch.device | None,
) -> Engine:
    """The engine that layers share, with reader and arithmetic for the CPU or for a device."""
    if device is None:
        spare_bytes = available_memory() - plan.predictor_bytes - plan.scratch_bytes - plan.window_bytes  # for the page cache
        reader = open_reader(store, config.reader, config.io_threads, unit.dtype, spare_bytes)
        return Engine(reader, arithmetic_for(plan.d_ff, unit, activation), fills_next=config.lookahead != 0)
    assert plan.host is not None
    source = open_source(store, config.reader, config.io_threads, available_memory() - plan.host.nbytes)
    transfers = Transfers(device)
    on_device = DeviceReader(store, source, unit.dtype, transfers, block_rows(plan.d_ff, 2), plan.host.slots)
    engine = Engine(on_device, DeviceArithmetic(plan.d_ff, unit, activation, device), fills_next=config.lookahead != 0)
    engine.turn = transfers.turn
    return engine
