"""What happens while transformers loads a flash model. The quantizer (quantizer.py) decides when.

prepare   before weights are loaded: open or make the store, replace the feed-forward blocks (their parameters are still on
          the meta device), divide the budget
finish    after the other weights are loaded: predictors, windows, reader, lookahead, saving
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from hf_flash.base.sizes import format_bytes
from hf_flash.budget.divide import divide_memory, expected_demand
from hf_flash.budget.plan import MemoryPlan
from hf_flash.compute.library import DTYPES
from hf_flash.config import AUTO, FlashOffloadConfig
from hf_flash.errors import BudgetError, ConfigError, UnsupportedModelError
from hf_flash.families import family_of
from hf_flash.families.base import Family
from hf_flash.families.experts import expert_modules
from hf_flash.hub.saving import give_flash_class
from hf_flash.loading_experts import ExpertLoading, prepare_experts
from hf_flash.machine.about import usable_cores
from hf_flash.packing.bundling import plain_layers
from hf_flash.packing.flash_cache import cached_store
from hf_flash.predictors.base import PredictorFormat, find_predictor
from hf_flash.predictors.choice import fresh_format, stored_choice, stored_format
from hf_flash.runtime.attach import attach
from hf_flash.runtime.devices import stay_there
from hf_flash.runtime.layer import FlashFFN
from hf_flash.runtime.lookahead import add_lookahead
from hf_flash.runtime.swap import replace_feed_forwards
from hf_flash.runtime.transformers_model import ignore_on_load, resident_bytes
from hf_flash.store.checkpoint import Checkpoint, given_files
from hf_flash.store.layout import FlashStore
from hf_flash.store.unit import Part, UnitLayout, parts_text

logger = logging.getLogger("hf_flash")
Format = TypeVar("Format", bound=PredictorFormat)


@dataclass
class Loading:
    """What is known about a model between the two steps.

    Attributes:
        checkpoint: the files that the other weights come from.
        fmt: the predictor; `None`: every neuron is used.
        ffns: the replaced blocks, by layer.
        device: the device that holds the model; `None`: this machine's memory.
        units_on: the device on which the blocks compute; `None`: this machine's processor.
    """

    family: Family
    checkpoint: Checkpoint
    store: FlashStore
    plan: MemoryPlan
    fmt: PredictorFormat | None
    ffns: Sequence[FlashFFN]
    device: torch.device | None
    units_on: torch.device | None

    def finish(self, model: Any, config: FlashOffloadConfig) -> None:
        """Do everything that follows the loading of the other weights."""
        attach(
            model, config, self.family, self.plan, self.store, self.checkpoint, self.fmt, self.ffns, self.device, self.units_on
        )
        ahead = config.lookahead
        if ahead and self.units_on is not None:
            logger.warning("hf_flash: lookahead does nothing on a device: it would have to wait for the device once more")
        if ahead is None:
            spare_core = usable_cores() > torch.get_num_threads()  # if all are busy, it costs what it hides
            ahead = int(spare_core and self.device is None)  # on a device it would add a wait
        if ahead and self.fmt is not None:
            add_lookahead(model, self.family, self.ffns)


def prepare(
    model: Any, config: FlashOffloadConfig, files: Sequence[str] | None, *, repacked: bool, device: torch.device | None = None
) -> Loading | ExpertLoading:
    """Do everything that precedes the loading of weights.

    Args:
        files: the files that transformers found for the checkpoint.
        repacked: whether the checkpoint has a store; otherwise one is made in the flash cache.
        device: where the model computes, if that is not this machine's processor.

    Raises:
        UnsupportedModelError, ConfigError, BudgetError, StoreError: the model cannot be loaded, or not with these arguments.
    """
    if model.config.dtype not in DTYPES:
        raise UnsupportedModelError("no such compute dtype", where="dtype", expected=list(DTYPES), got=model.config.dtype)
    if not files:
        raise ConfigError(
            "hf_flash needs checkpoint files: there is nothing on disk to read neurons from",
            where="from_pretrained",
            got="a state_dict",
            hint="save the checkpoint and load the folder",
        )
    found = given_files(str(model.config.name_or_path), files)
    checkpoint = Checkpoint.open(found)
    if expert_modules(model):
        return prepare_experts(model, config, checkpoint, device)
    return _prepare_neurons(model, config, checkpoint, found, device, repacked=repacked)


def _prepare_neurons(
    model: Any,
    config: FlashOffloadConfig,
    checkpoint: Checkpoint,
    found: list[Path],
    device: torch.device | None,
    *,
    repacked: bool,
) -> Loading:
    if config.checkpoint_quantization is not None:
        raise UnsupportedModelError(
            "only mixtures of experts are read from a checkpoint that is quantized already",
            where=model.config.name_or_path,
            got=config.checkpoint_quantization.get("quant_method"),
            hint="take the checkpoint in bf16",
        )
    family = family_of(model.config, model)
    store = FlashStore.open(found) if repacked else None
    if store is not None:
        store.check_others()
    unit, widths = (store.unit, store.widths) if store else plain_layers(checkpoint, family)
    _check_shape(family, model, unit, widths)
    ffns = replace_feed_forwards(model, family)
    fmt: PredictorFormat | None
    if store is not None:
        wanted = stored_format(config, family, model.config, store)
        plan, fmt = _divide(model, config, family, unit, store, wanted, device)
    else:
        plan, copied = _divide(model, config, family, unit, None, fresh_format(config, family, model.config), device)
        store, fmt = cached_store(checkpoint, family, copied, config.cache_dir), copied
    if fmt is not None:
        find_predictor(store, fmt)
    config.remember(**stored_choice(fmt))
    ignore_on_load(model, family.store_keys)
    return Loading(family, checkpoint, store, plan, fmt, ffns, device, None if config.units_on == "cpu" else device)


def finish(model: Any, config: FlashOffloadConfig, loading: Loading | ExpertLoading) -> None:
    """Do everything that follows the loading of the other weights."""
    plan = loading.plan
    loading.finish(model, config)
    give_flash_class(model)
    stay_there(model)
    logger.info(
        "hf_flash: memory budget %s%s\n%s",
        format_bytes(plan.budget_bytes),
        " (most of what is free)" if config.memory_budget in (None, AUTO) else "",
        plan.describe(),
    )
    if shortage := plan.shortage(config.window):
        logger.warning("hf_flash: %s", shortage)


def _divide(
    model: Any,
    config: FlashOffloadConfig,
    family: Family,
    unit: UnitLayout,
    store: FlashStore | None,
    fmt: Format | None,
    device: torch.device | None,
) -> tuple[MemoryPlan, Format | None]:
    """Divide the memory budget. If `fmt` does not fit and nobody asked for that predictor, it is left out: `None`."""
    shape, dtype = family.shape(model.config), model.config.dtype
    budget = None if config.memory_budget == AUTO else config.memory_budget
    resident = resident_bytes(model, dtype)

    def plan(fmt: PredictorFormat | None) -> MemoryPlan:
        demand = expected_demand(fmt, shape, store)
        reading: Any = {"reader": config.reader, "io_threads": config.io_threads, "device": device}
        reading["units_here"] = config.units_on == "cpu"
        return divide_memory(budget, resident, fmt, shape, unit, dtype, demand=demand, **reading)

    try:
        return plan(fmt), fmt
    except BudgetError:
        if fmt is None or config.predictor is not None:
            raise
        without = plan(None)
        logger.warning(
            "hf_flash: the memory budget is too small for the %s predictor, which needs %s in all; loading with "
            "predictor='none': every neuron is read for every token, which is much slower",
            fmt.kind,
            format_bytes(without.minimum_bytes + fmt.dram_bytes(shape)),
        )
        return without, None


def _check_shape(family: Family, model: Any, unit: UnitLayout, widths: tuple[int, ...]) -> None:
    """Refuse weights that do not fit the model's config.

    Args:
        unit, widths: the layout of a neuron in the files, and how many neurons each layer has there.
    """
    shape = family.shape(model.config)
    wanted, found = (family.parts, shape.d_model, shape.widths), (unit.parts, unit.width, widths)
    if wanted != found:
        raise UnsupportedModelError(
            "the weights do not fit the model's config",
            where=model.config.name_or_path,
            expected=_sizes(*wanted),
            got=_sizes(*found),
            hint="load them with the config that they were saved with, or repack the checkpoint",
        )


def _sizes(parts: Sequence[Part], d_model: int, widths: tuple[int, ...]) -> str:
    d_ff = widths[0] if len(set(widths)) == 1 else list(widths)
    return f"{len(widths)} layers, d_ff {d_ff}, d_model {d_model}, {parts_text(parts)}"
