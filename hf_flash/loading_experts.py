"""What happens while transformers loads a mixture of experts. loading.py decides when.

Experts are read in place, from the files that transformers found: nothing is written and nothing is copied. Their parameters
are removed from the model before weights are loaded, so they never take memory. Everything else is loaded as usual.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from hf_flash.base.buffers import allocate_pages, load_into_memory
from hf_flash.base.heap import trim_heap
from hf_flash.budget.beside import Beside
from hf_flash.budget.ceilings import ceilings_of
from hf_flash.budget.divide_experts import (
    PASSING_SLOTS,
    RING_SLOTS,
    divide_experts,
    divide_experts_on_device,
    wide_numbers,
)
from hf_flash.budget.expert_plan import ExpertPlan, checked_plan
from hf_flash.config import AUTO, FlashOffloadConfig
from hf_flash.errors import ConfigError, StoreFormatError
from hf_flash.families.expert_check import check_experts
from hf_flash.families.experts import experts_per_token, kv_cache_bytes, locate_experts
from hf_flash.families.quantized import quantization_of
from hf_flash.machine.free_memory import available_memory
from hf_flash.reading.experts import ExpertPlaces, ExpertReader
from hf_flash.runtime.attention import make_attention_resident
from hf_flash.runtime.device_experts import DeviceExperts, SharedOnDevice
from hf_flash.runtime.engine import ExpertEngine
from hf_flash.runtime.expert_lookahead import add_expert_lookahead
from hf_flash.runtime.expert_slots import ExpertSlots, PassingSlots
from hf_flash.runtime.expert_weights import ExpertStack
from hf_flash.runtime.experts import FlashExperts, put_on_flash
from hf_flash.runtime.flash_embedding import FlashEmbedding, Table, put_table_on_flash, table_to_leave
from hf_flash.runtime.model import ExpertRuntime
from hf_flash.runtime.resident_linear import make_linears_resident
from hf_flash.runtime.transformers_model import ignore_on_load, loaded_dtypes, resident_bytes
from hf_flash.store.checkpoint import Checkpoint
from hf_flash.store.experts import SECOND


@dataclass
class ExpertLoading:
    """What is known about a mixture between the two steps."""

    checkpoint: Checkpoint
    places: ExpertPlaces
    plan: ExpertPlan
    layers: list[FlashExperts]
    dtypes: dict[str, torch.dtype]  # of the other weights, if the checkpoint is quantized
    table: tuple[FlashEmbedding, Table] | None  # the table of embeddings, if it stays on flash
    device: torch.device | None  # where the model is, if that is not this machine's memory
    units_on: torch.device | None  # where experts compute, likewise

    def finish(self, model: Any, config: FlashOffloadConfig) -> None:
        """Do everything that follows the loading of the other weights."""
        _as_built(model, self.dtypes)
        load_into_memory({id(t): t for t in [*model.parameters(), *model.buffers()]}.values())
        plan, dtype = self.plan, model.config.dtype
        taken = plan.scratch_bytes + plan.window_bytes if plan.host is None else plan.host.nbytes
        spare_bytes = available_memory() - taken  # for the page cache
        reader = ExpertReader(self.places, config.reader, config.io_threads, spare_bytes)
        self.checkpoint.check_unchanged()  # since it was opened
        trim_heap()
        wide = torch.empty(wide_numbers(self.places.layers, dtype), dtype=torch.float32, device="cpu")
        engine = ExpertEngine(reader, dtype, wide)
        engine.device = self.device or engine.device
        if self.units_on is None:
            self._attach(engine, wide)
        else:
            self._attach_on_device(engine, self.units_on)
        for layer in self.layers:
            layer.flash_weights = {
                param: ExpertStack(layer.layer, param, self.checkpoint, bool(layer.is_transposed), dtype)
                for param in (layer.layer.first, SECOND)
            }
            layer.place = engine.device
        if self.table is not None:
            self.table[0].attach(engine, self.table[1])
            self.table[0].place = engine.device
        if self.device is None:
            make_linears_resident(model, engine)
            make_attention_resident(model)
            if config.lookahead:
                add_expert_lookahead(model, self.layers, plan.used)
        table = self.table[0] if self.table else None
        runtime = ExpertRuntime(config, plan, self.checkpoint, engine, self.layers, table, kv_cache_bytes(model))
        model.flash_runtime = runtime
        engine.runtime = weakref.ref(runtime)  # weak, since the runtime holds the engine

    def _attach(self, engine: ExpertEngine, wide: torch.Tensor) -> None:
        """Give layers slots in this machine's memory."""
        plan = self.plan
        windows = [
            ExpertSlots(layer.experts, _memory(count, size))
            for layer, count, size in zip(self.places.layers, plan.capacities, plan.slot_bytes, strict=True)
        ]
        passing = PassingSlots(_memory(PASSING_SLOTS, max(plan.slot_bytes)), windows)
        for layer, mine in zip(self.layers, windows, strict=True):
            layer.attach(engine, mine, passing, wide)

    def _attach_on_device(self, engine: ExpertEngine, device: torch.device) -> None:
        """Give layers slots on a device, and behind them the slots that the budget leaves in this machine's memory."""
        plan, host = self.plan, self.plan.host
        assert host is not None
        shared = SharedOnDevice(
            device, max(plan.slot_bytes), max(self.places.slot_bytes), passing=PASSING_SLOTS, ring=RING_SLOTS
        )
        sizes = [count * size for count, size in zip(plan.capacities, plan.slot_bytes, strict=True)]
        whole = torch.empty(sum(sizes), dtype=torch.uint8, device=device)  # in one piece: a device's allocator rounds up
        memories = [part.view(-1, size) for part, size in zip(torch.split(whole, sizes), plan.slot_bytes, strict=True)]
        found = [
            DeviceExperts(layer, index, engine, shared, memory, on_host)
            for index, (layer, memory, on_host) in enumerate(zip(self.places.layers, memories, host.slots, strict=True))
        ]
        engine.on_device = shared
        tiers = [slots for layer in found for slots in (layer.tiers.device, layer.tiers.host)]
        interrupted = PassingSlots(np.empty((0, 0), np.uint8), [*tiers, shared.ring])
        for layer, mine in zip(self.layers, found, strict=True):
            layer.attach_on_device(engine, mine, interrupted)


def prepare_experts(
    model: Any, config: FlashOffloadConfig, checkpoint: Checkpoint, device: torch.device | None
) -> ExpertLoading:
    """Do everything that precedes the loading of weights.

    Args:
        device: where the model computes, if that is not this machine's processor.

    Raises:
        UnsupportedModelError, ConfigError, BudgetError, StoreError: the model cannot be loaded, or not with these arguments.
    """
    if config.predictor not in (None, "none"):
        raise ConfigError(
            "a mixture of experts has a router, and needs no predictor",
            where="predictor",
            expected="None, or 'none'",
            got=repr(config.predictor),
            hint="leave it out: every answer is exact",
        )
    check_experts(model)
    places = ExpertPlaces(locate_experts(model, checkpoint), checkpoint)
    layers = [put_on_flash(model.get_submodule(layer.name), index, layer) for index, layer in enumerate(places.layers)]
    left = table_to_leave(model, checkpoint)
    plan = _divide(model, config, places, left[0] if left else None, device)
    table = None
    if left and plan.is_table_on_flash:
        table = put_table_on_flash(model, left[0]), Table(*left, checkpoint, model.config.dtype)
        ignore_on_load(model, [rf"^{re.escape(left[0])}$"])
    ignore_on_load(model, [rf"(^|\.){re.escape(layer.name)}\.({layer.first}|{SECOND})$" for layer in places.layers])
    dtypes = {} if quantization_of(model.config) is None else loaded_dtypes(model, model.config.dtype)
    return ExpertLoading(checkpoint, places, plan, layers, dtypes, table, device, None if config.units_on == "cpu" else device)


def _as_built(model: Any, dtypes: Mapping[str, torch.dtype]) -> None:
    """Give the other weights of a quantized checkpoint their dtypes: transformers leaves those without scales as in the file.

    Raises:
        StoreFormatError: a weight still has quantized numbers, for which the checkpoint has no scales.
    """
    for name, weight in model.named_parameters():
        wanted = dtypes.get(name, weight.dtype)
        if weight.dtype == wanted:
            continue
        if weight.dtype.itemsize == 1 or not weight.is_floating_point():
            raise StoreFormatError(
                "the checkpoint has no scales for quantized numbers", where=name, expected=wanted, got=weight.dtype
            )
        weight.data = weight.data.to(wanted)


def _divide(
    model: Any, config: FlashOffloadConfig, places: ExpertPlaces, table: str | None, device: torch.device | None
) -> ExpertPlan:
    """Divide the memory budget. Raises `BudgetError`.

    Args:
        table: the name of the parameter that may stay on flash.
    """
    here = config.units_on == "cpu"
    ceilings = ceilings_of(None if config.memory_budget == AUTO else config.memory_budget, device, units_here=here)
    dtype, used = model.config.dtype, experts_per_token(model, places.layers)
    table_bytes = model.get_parameter(table).numel() * dtype.itemsize if table else 0
    sizes, reading = (resident_bytes(model, dtype), table_bytes), {"reader": config.reader, "io_threads": config.io_threads}
    if device is not None and not here:
        plan = divide_experts_on_device(ceilings, *sizes, places, dtype, used, **reading)
    elif device is not None:
        beside = Beside(str(device), ceilings.device_bytes, sizes[0])
        plan = divide_experts(ceilings.host_bytes or 0, 0, 0, places.layers, places.slot_bytes, dtype, used, **reading)
        plan = replace(plan, beside=beside)
    else:
        plan = divide_experts(ceilings.host_bytes or 0, *sizes, places.layers, places.slot_bytes, dtype, used, **reading)
    return checked_plan(plan, is_given=ceilings.is_given)


def _memory(count: int, nbytes: int) -> Any:
    """Allocate slots, uint8 [count, nbytes], that begin on a page boundary."""
    if not count:
        return np.empty((0, nbytes), np.uint8)
    return np.frombuffer(allocate_pages(count * nbytes), np.uint8).reshape(count, nbytes)
