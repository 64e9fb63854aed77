"""`hf-flash plan` of a mixture of experts: what a budget holds, and how long a token takes. config.json is enough.

The cost of a decoded token, with what it touches of everything that is not an expert, and the experts that it uses:

    token = touched / DRAM + max(missing / disk, hits / DRAM) + missing / DRAM

Experts in memory, the hits, are multiplied while the missing ones arrive, and those afterwards (runtime/experts.py). DRAM and
disk are measured here. How many experts are missing is *assumed*, in two ways, because the model has not run yet. *Uniform*
routing names every expert as often as any other, whatever came before: that is the pessimist's view. *Typical* routing names
again what it named before, as others have measured it; or, if the mixture was calibrated, as it did on that text.

Where the experts of a checkpoint lie is not known yet, so slots are counted with two pages more for each range of an expert: a
little more than loading takes.

Left out: Python; the prompt; attention over a long context; the page cache, which makes reads faster where memory for that is
left.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from hf_flash.base.files import read_json
from hf_flash.budget.divide_experts import divide_experts
from hf_flash.budget.expert_plan import ExpertPlan, checked_plan
from hf_flash.budget.plan import ceiling_bytes
from hf_flash.budget.routing import Routing, routing_in
from hf_flash.config import ReaderName
from hf_flash.config_arguments import ARGUMENTS
from hf_flash.families.expert_check import check_experts
from hf_flash.families.experts import expert_modules, experts_per_token, first_of, kv_cache_bytes, locate_experts
from hf_flash.families.quantized import as_quantized, quantization_of
from hf_flash.families.recognise import skeleton
from hf_flash.machine.free_memory import available_memory
from hf_flash.planning.budgets import UNLIMITED, budget_to_look_at, suggestion
from hf_flash.planning.measuring import Speeds, measure_speeds
from hf_flash.planning.mixture_report import Expected, ExpertOutlook, ExpertPoint
from hf_flash.planning.model import compute_dtype
from hf_flash.reading.layer_files import PAGE
from hf_flash.runtime.flash_embedding import table_of
from hf_flash.runtime.transformers_model import plain_state, resident_bytes
from hf_flash.store.checkpoint import Checkpoint, resolve_folder
from hf_flash.store.experts import SECOND, ExpertLayer

SHARES: Final = (10, 20, 30, 40, 50, 60, 80)  # percent of the dense model that are looked at, beside all that it can use
_READ_BYTES: Final = 1 << 20  # at once, as reading/experts.py reads


@dataclass(frozen=True)
class PlannedMixture:
    """A mixture of experts as its config.json describes it. Sizes in bytes, in the dtype of compute.

    Attributes:
        layers: those with experts, in the dtype of the checkpoint.
        used: experts that a token uses in a layer.
        resident_bytes: of all other weights. touched_bytes: of these, what a token is multiplied with.
        table_bytes: of these, what may stay on flash.
        kv_bytes: of the KV cache, for a token.
        routing: what was measured of its routers.
    """

    folder: Path
    model_type: str
    dtype: torch.dtype
    layers: tuple[ExpertLayer, ...]
    used: int
    resident_bytes: int
    touched_bytes: int
    table_bytes: int
    kv_bytes: int
    routing: Routing | None

    @property
    def expert_bytes(self) -> int:
        """Of all experts, in the checkpoint."""
        return sum(layer.experts * layer.expert_bytes for layer in self.layers)

    @property
    def active_bytes(self) -> int:
        """Of the experts that a token uses in all layers, in the checkpoint."""
        return sum(min(self.used, layer.experts) * layer.expert_bytes for layer in self.layers)

    @property
    def read_size(self) -> int:
        """Bytes of one of its reads, in whole pages."""
        return min(_READ_BYTES, *(_in_pages(piece.nbytes) for layer in self.layers for piece in layer.pieces))

    def divide(self, budget_bytes: int, reader: ReaderName) -> ExpertPlan:
        """Divide a budget as loading_experts.py does, which may be too small."""
        slots = [layer.expert_bytes + 2 * PAGE * len(layer.ranges) for layer in self.layers]
        sizes = self.resident_bytes, self.table_bytes, self.layers, slots, self.dtype, self.used
        return divide_experts(budget_bytes, *sizes, reader=reader, io_threads=ARGUMENTS["io_threads"].default)


def _in_pages(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE


def open_mixture(source: str | os.PathLike[str], dtype: str | None, **hub: Any) -> PlannedMixture | None:
    """Find a mixture of experts; `None`: the model is none. Of a Hub repository config.json alone is downloaded.

    Args:
        source, dtype, hub: as in [`hf_flash.planning.model.open_model`].

    Raises:
        UnsupportedModelError: transformers has no such model, or its experts cannot be read where they lie.
        ConfigError: the model is quantized in another way, or there is no such dtype.
        StoreError: no config.json.
    """
    folder = resolve_folder(source, config_only=True, **hub)
    model = skeleton(read_json(folder / "config.json"))
    modules = expert_modules(model)
    if not modules:
        return None
    check_experts(model)
    layers = tuple(locate_experts(model, _as_saved(model)))
    for module in modules.values():
        for param in (first_of(module), SECOND):
            delattr(module, param)
    found = compute_dtype(dtype) or model.config.dtype or torch.float32
    model.config.dtype = found
    resident = resident_bytes(model, found)
    return PlannedMixture(
        folder=folder,
        model_type=model.config.model_type,
        dtype=found,
        layers=layers,
        used=experts_per_token(model, layers),
        resident_bytes=resident,
        touched_bytes=resident - _looked_up(model, found),
        table_bytes=table[1].weight.numel() * found.itemsize if (table := table_of(model)) else 0,
        kv_bytes=kv_cache_bytes(model),
        routing=routing_in(folder, [layer.experts for layer in layers]),
    )


def _as_saved(model: Any) -> Checkpoint:
    """The experts of a model in a checkpoint that is not there, as transformers would save them."""
    experts = {
        f"{name}.{param}": value
        for name, module in expert_modules(model).items()
        for param, value in module.named_parameters(recurse=False)
    }
    specs = {name: (value.dtype, tuple(value.shape)) for name, value in plain_state(model, experts).items()}
    quantization = quantization_of(model.config)
    return Checkpoint([], as_quantized(specs, quantization) if quantization else specs)


def _looked_up(model: Any, dtype: torch.dtype) -> int:
    """Bytes of the tables of which a token takes a row; a table that is the head's matrix, too, is none."""
    multiplied = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    tables = {id(module.weight): module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    return sum(table.numel() * dtype.itemsize for key, table in tables.items() if key not in multiplied)


# --- what comes of it --------------------------------------------------------------------------------------------------


def plan_mixture(name: str, found: PlannedMixture, memory: int | str | None, disk: Path, reader: ReaderName) -> ExpertOutlook:
    """Predict how fast a mixture decodes on this machine, and how much memory it should have.

    Args:
        name: for people.
        memory, reader: as in [`hf_flash.planning.planner.plan`].
        disk: the folder whose disk is measured.

    Raises:
        BudgetError, ConfigError, DiskSpaceError, RepackError: as [`hf_flash.planning.planner.plan`].
    """
    most = found.divide(UNLIMITED, reader)
    whole = most.resident_bytes + most.scratch_bytes + most.window_bytes
    budget, free = budget_to_look_at(memory, most.dense_bytes, whole), ceiling_bytes(None)
    wanted = checked_plan(replace(most, budget_bytes=free if budget is None else budget), is_given=memory is not None)
    speeds = measure_speeds(disk, found.read_size)
    shares = {most.dense_bytes * share // 100 for share in SHARES}
    sizes = shares | {most.minimum_bytes, min(free, whole), whole, wanted.budget_bytes}
    plans = [replace(most, budget_bytes=size) for size in sorted(sizes) if size >= most.minimum_bytes]
    points = [_predict(item, found, speeds) for item in plans]
    return ExpertOutlook(
        model=name,
        model_type=found.model_type,
        dtype=str(found.dtype).removeprefix("torch."),
        expert_bytes=max(layer.expert_bytes for layer in found.layers),
        experts_bytes=found.expert_bytes,
        active_bytes=found.active_bytes,
        touched_bytes=found.touched_bytes,
        memory=wanted,
        speeds=speeds,
        point=next(point for point in points if point.budget_bytes == wanted.budget_bytes),
        points=tuple(points),
        free_bytes=available_memory(),
        suggested_bytes=suggestion(points, free),
        kv_cache_bytes_per_token=found.kv_bytes,
        measured_on=found.routing.name if found.routing else None,
    )


def _predict(memory: ExpertPlan, model: PlannedMixture, speeds: Speeds) -> ExpertPoint:
    """The cost model, for one budget."""
    rules = [_by_rule(memory, model, rule) for rule in (typical_hits, uniform_hits)]
    if model.routing:
        rules[0] = [layer.hits[slots] for layer, slots in zip(model.routing.layers, memory.capacities, strict=True)]
    typical, uniform = (_expected(memory, model, speeds, hits) for hits in rules)
    return ExpertPoint(memory.budget_bytes, memory.capacity, typical, uniform)


def _by_rule(memory: ExpertPlan, model: PlannedMixture, rule: HitRate) -> list[float]:
    """The share of a token's experts that is there, in each layer."""
    found = zip(memory.capacities, memory.experts, strict=True)
    return [rule(slots, experts, min(model.used, experts)) for slots, experts in found]


def _expected(memory: ExpertPlan, model: PlannedMixture, speeds: Speeds, hits: Sequence[float]) -> Expected:
    used = [min(model.used, count) for count in memory.experts]
    missing = [count * (1.0 - hit) for count, hit in zip(used, hits, strict=True)]
    read = sum(count * layer.expert_bytes for count, layer in zip(missing, model.layers, strict=True))
    per_ms = 1e6 * speeds.dram_gb_per_s
    return Expected(
        hit_rate=1.0 - sum(missing) / sum(used),
        read_bytes=read,
        resident_ms=model.touched_bytes / per_ms,
        read_ms=read / (1e6 * speeds.disk_gb_per_s),
        hits_ms=(model.active_bytes - read) / per_ms,
        missing_ms=read / per_ms,
    )


# --- how many experts are there ----------------------------------------------------------------------------------------

HitRate = Callable[[int, int, int], float]  # of slots, of experts, of experts a token: the share of these that is there

# Hit rates of decoding by the share of a layer's experts that is in memory, least recently used: the lowest that others report.
# 4.5 %: DeepSeek-V4-Flash (FreeToken #174). 12.5 and 37.5 %: OLMoE-1B-7B, 64 experts, 8 a token (colibri, olmoe-tier-caching).
# Higher are gemma-4-26b (oMLX #2595: 12.5 % 0.45, 25 % 0.67, 50 % 0.89), Qwen3.8-Flash-Next (llama.cpp #27861: 12.5 % 0.67,
# 25 % 0.81), Qwen3.6-35B and Laguna-117B (streamlx: 44 % 0.92, 23 % 0.74).
_IN_MEMORY: Final = (0.0, 0.045, 0.125, 0.375, 1.0)
_HITS: Final = (0.0, 0.08, 0.28, 0.68, 1.0)


def uniform_hits(slots: int, experts: int, used: int) -> float:
    """Where every expert is as likely as any other, for every token."""
    return slots / experts


def typical_hits(slots: int, experts: int, used: int) -> float:
    """As others measured it. Slots that do not hold what one token uses are taken to be of no more use than with uniform
    routing: they keep some of its experts, whichever."""
    if slots < used:
        return uniform_hits(slots, experts, used)
    return float(np.interp(slots / experts, _IN_MEMORY, _HITS))
