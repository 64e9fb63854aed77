"""`hf-flash plan`: how fast a model will be here, and with how much memory, before anything is downloaded or repacked.

The cost of a decoded token, in the paper's frame (sections 2 and 3, table 3), L layers:

    token = head + sum over the layers of (rest + predict + manage(f) + io(f) + compute)
    f     = neurons that a token needs and the layer's window does not hold

f follows from the budget, which is divided as loading divides it (budget/plan.py), and from what tokens need (budget/demand.py): *measured*
on text, for every layer, if the model was calibrated. Otherwise *assumed*, from the paper's figures for OPT-6.7B: 3 % of the
neurons active, of which 24 % were not used in the 4 tokens before; or *given*. These two say little of windows that hold more
than 4 tokens, and what they leave open is taken for the worse. Reports say which it was.

Measured, on this machine (planning/slice.py): all times, in a few layers of the model's real shape, for some f; between them they are
interpolated.

Left out: the prompt (it is computed, not read, most of the time); attention over a long context; lookahead, which hides reads
where a core is free; what the disk adds before the page cache holds the store, where memory for that is left.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from transformers import AutoConfig

from hf_flash.base.sizes import format_bytes, parse_share
from hf_flash.budget.demand import Demand, everything, measured, supposed
from hf_flash.budget.divide import divide_memory, expected_demand, stored_report
from hf_flash.budget.plan import MemoryPlan, ceiling_bytes
from hf_flash.config import FlashOffloadConfig, ReaderName
from hf_flash.errors import ConfigError
from hf_flash.families.adapters import Adapter, adapter_for
from hf_flash.machine.free_memory import available_memory
from hf_flash.packing.flash_cache import cache_folder
from hf_flash.planning.slice import Measured, Model, fast_rank, measure
from hf_flash.predictors.base import PredictorForm
from hf_flash.predictors.choice import fresh_form, stored_form
from hf_flash.predictors.lowrank import LowRankFormat
from hf_flash.store.checkpoint import resolve_folder
from hf_flash.store.layout import FlashStore, read_json

SHARES: Final = (30, 40, 50, 60, 70, 80, 100)  # percent of the dense model that are looked at
ENOUGH: Final = 1.1  # a suggested budget may be so many times slower than the fastest


# --- what a model needs ------------------------------------------------------------------------------------------------


def _open(source: str | os.PathLike[str], predictor: str | None, dtype: str | None, **hub: Any) -> Model:
    """What is known of a model before its weights are there."""
    folder = resolve_folder(source, config_only=True, **hub)
    plain = read_json(folder / "config.json")
    adapter = adapter_for(plain)
    stored = plain.pop("quantization_config", None) or {}
    if stored and stored.get("quant_method") != "flash":
        raise ConfigError("the model is quantized in another way", where=folder, got=stored.get("quant_method"))
    config = AutoConfig.for_model(**plain)
    wish = FlashOffloadConfig.from_dict(stored)
    if predictor is not None:
        wish.predictor = predictor
    store = FlashStore.open_folder(folder) if stored and any(folder.glob("*.safetensors")) else None
    own = store.layers[0].dtype if store else config.dtype or torch.float32
    form = _form(wish, adapter, config, store)
    return Model(folder, config, adapter, store, form, _dtype(dtype) or config.dtype or own, own)


def _memory(found: Model, budget: int | str | None, demand: Demand) -> MemoryPlan:
    """Divide a budget as loading does. Raises `BudgetError`."""
    layers, d_ff, _ = found.dims
    model, _ = found.skeleton(layers, d_ff)
    weights = [*model.parameters(), *model.buffers()]
    resident = sum(w.nbytes for w in weights)
    kinds = found.dtype, found.stored_dtype
    need = demand if found.form else None
    return divide_memory(budget, resident, found.form, found.dims, *kinds, reader="auto", io_threads=16, demand=need)


def needs(source: str | os.PathLike[str], predictor: str | None = None, dtype: str | None = None, **hub: Any) -> MemoryPlan:
    """What a model holds in memory where it gets all it can use; its minimum. config.json is enough.

    Args:
        source, predictor, dtype, hub: as in [`plan`].

    Raises:
        ConfigError, UnsupportedModelError, StoreError: as [`plan`].
    """
    found = _open(source, predictor, dtype, **hub)
    return _memory(found, 1 << 59, expected_demand(found.form, found.dims, found.store) or everything(*found.dims[:2]))


def _dtype(name: str | None) -> torch.dtype | None:
    names = ("float32", "bfloat16", "float16")
    if name is not None and name not in names:
        raise ConfigError("no such dtype of compute", where="dtype", expected=" or ".join(names), got=repr(name))
    found: torch.dtype | None = getattr(torch, name) if name else None
    return found


def _form(wish: FlashOffloadConfig, adapter: Adapter, config: Any, store: FlashStore | None) -> PredictorForm | None:
    """The predictor that is meant: stored, or as repacking or calibrating would make it."""
    if wish.predictor != "lowrank":
        return fresh_form(wish, adapter, config)
    if store is not None and LowRankFormat.of(store) is not None:
        return stored_form(wish, adapter, config, store)
    fresh_form(FlashOffloadConfig(predictor="quantized"), adapter, config)  # an error if nothing can be predicted
    layers, _, d_model = adapter.dims(config)
    wide = layers // 8  # the paper's ranks: 128, in the last 4 of 32 layers 1024, at d_model 4096
    return LowRankFormat((fast_rank(d_model // 32),) * (layers - wide) + (fast_rank(d_model // 4),) * wide)


def _demand(
    model: Model, active: float | None, fresh: float | None, predicted: float | None, report: dict[str, Any] | None
) -> Demand:
    """What its tokens need: from what was given, else from a calibration, else from the paper."""
    for name, value, most in (("active", active, 1.0), ("fresh", fresh, 1.0), ("predicted", predicted, 1000.0)):
        if value is not None and not 0 < value <= most:
            raise ConfigError(f"{name} is out of range", where="plan", expected=f"more than 0, at most {most:g}", got=value)
    layers, d_ff, _ = model.dims
    if model.form is None:
        return everything(layers, d_ff)
    if report is not None and active is None and fresh is None:
        return measured(report["layers"], model.form.variant, model.predictor, d_ff, predicted)
    return supposed(layers, d_ff, model.predictor, active, fresh, predicted)


# --- what comes of it --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """What to expect of one budget. Times in milliseconds per decoded token."""

    budget_bytes: int
    capacity: int  # neurons that a layer's window holds, on average
    hit_rate: float
    read_bytes: float  # per token
    io_ms: float
    manage_ms: float
    predict_ms: float
    compute_ms: float
    rest_ms: float  # attention, head, Python

    @property
    def token_ms(self) -> float:
        return self.io_ms + self.manage_ms + self.predict_ms + self.compute_ms + self.rest_ms


def _predict(memory: MemoryPlan, model: Model, demand: Demand, found: Measured, seen: tuple[int, int] | None) -> Point:
    """The cost model, for one budget."""
    layers, missing = memory.layers, demand.misses(memory.capacities, seen)
    times = [found.at(count) for count in missing]
    return Point(
        budget_bytes=memory.budget_bytes,
        capacity=memory.capacity,
        hit_rate=1.0 - sum(missing) / layers / max(demand.selected, 1e-9),
        read_bytes=sum(missing) * model.bundle_bytes,
        io_ms=sum(io for io, _ in times),
        manage_ms=sum(manage for _, manage in times),
        predict_ms=layers * found.predict_ms,
        compute_ms=layers * found.compute_ms,
        rest_ms=layers * found.rest_ms + found.head_ms,
    )


@dataclass(frozen=True)
class Plan:
    """What [`plan`] says. Sizes in bytes, times in milliseconds per decoded token."""

    model: str
    model_type: str
    dtype: str
    predictor: str
    memory: MemoryPlan  # of the budget that was asked about
    activity: Demand
    measured: Measured
    point: Point  # that budget
    points: tuple[Point, ...]  # it and others, ascending
    free_bytes: int
    dense_token_ms: float
    suggested_bytes: int | None  # `None`: the model needs more than is free

    @property
    def dense_fits(self) -> bool:
        """Whether the whole model fits into what is free."""
        return self.memory.dense_bytes <= ceiling_bytes(None)

    @property
    def kv_cache_bytes_per_token(self) -> int:
        return self.memory.layers * self.memory.bundle_bytes

    def token_ms(self, budget_bytes: float) -> float:
        """The time of a token with another budget, between those that were looked at."""
        sizes = [point.budget_bytes for point in self.points]
        return float(np.interp(budget_bytes, sizes, [point.token_ms for point in self.points]))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, derived ones included."""
        plain = replace(self.memory, demand=None)
        found = asdict(replace(self, memory=plain))
        found["memory"].pop("demand")
        found["activity"] = {name: getattr(self.activity, name) for name in ("source", "active", "predicted", "selected")}
        derived = ("minimum_bytes", "window_bytes", "capacity", "dense_bytes")
        found["memory"] |= {name: getattr(self.memory, name) for name in derived}
        found["point"]["token_ms"] = self.point.token_ms
        for point, plain in zip(self.points, found["points"], strict=True):
            plain["token_ms"] = point.token_ms
        return found | {"dense_fits": self.dense_fits, "kv_cache_bytes_per_token": self.kv_cache_bytes_per_token}

    def describe(self) -> str:
        """What people read."""
        return "\n".join([*self._head(), "", self.memory.describe(), "", *self._table(), "", *self._advice()])

    def _head(self) -> Iterator[str]:
        size, act, here = self.memory, self.activity, self.measured
        yield (
            f"{self.model}: {self.model_type}, {size.layers} layers, d_ff {size.d_ff}, {self.dtype}, "
            f"{format_bytes(size.dense_bytes)} in all; predictor {self.predictor}"
        )
        yield (
            f"activations ({act.source}): {act.active:.1%} of a layer active, {act.predicted:.2f} predicted for one, "
            f"{act.selected:.0f} neurons a token"
        )
        yield (
            f"machine (measured): {here.disk}; stock FFN {here.dram_gb_per_s:.1f} GB/s with {here.torch_threads} threads; "
            f"{format_bytes(self.free_bytes)} free"
        )
        reads = ", ".join(f"{count}: {ms:.2f}" for count, ms in zip(here.misses, here.io_ms, strict=True))
        yield f"reading neurons of a layer takes, in ms: {reads}"

    def _table(self) -> Iterator[str]:
        yield "predicted:  budget  of dense  neurons   hits %  MB read    ms a token = I/O + manage + predict + compute + rest"
        for p in self.points:
            share = p.budget_bytes / self.memory.dense_bytes
            yield (
                f"{'>' if p is self.point else ' ':<7}{format_bytes(p.budget_bytes):>11}{share:>10.0%}{p.capacity:>9}"
                f"{p.hit_rate:>9.1%}{p.read_bytes / 1e6:>9.1f}{p.token_ms:>14.1f} ={p.io_ms:>6.1f}{p.manage_ms:>9.1f}"
                f"{p.predict_ms:>10.1f}{p.compute_ms:>10.1f}{p.rest_ms:>7.1f}"
            )
        yield f"       {format_bytes(self.memory.dense_bytes):>11}{'the dense model':>28}{self.dense_token_ms:>23.1f}"

    def _advice(self) -> Iterator[str]:
        yield f"on top of a budget come about 0.3 GB and {format_bytes(self.kv_cache_bytes_per_token)} of KV cache a token"
        if shortage := self.memory.shortage(FlashOffloadConfig().window):
            yield shortage
        fastest = min(p.token_ms for p in self.points)
        if self.suggested_bytes is None:
            yield f"the model does not run here: it needs {format_bytes(self.memory.minimum_bytes)} at least"
        else:
            yield f'suggested: memory_budget="{self.suggested_bytes / 1e9:.2f}GB", the least within a tenth of the best speed'
        if self.dense_fits:
            verdict = "and would be faster" if self.dense_token_ms < fastest else "but would not be faster"
            yield f"the dense model fits into what is free, {verdict}"


def plan(
    model: str | os.PathLike[str],
    *,
    memory: int | str | None = None,
    predictor: str | None = None,
    dtype: str | None = None,
    disk: str | os.PathLike[str] | None = None,
    active: float | None = None,
    fresh: float | None = None,
    predicted: float | None = None,
    tokens: int | None = None,
    prompt_tokens: int = 16,
    reader: ReaderName = "auto",
    **hub: Any,
) -> Plan:
    """Predict how fast a model decodes on this machine, and how much memory it should have. Paper: sections 2 and 3.

    Needs config.json only; nothing is repacked, and of a Hub repository nothing else is downloaded. Takes some seconds.

    Args:
        model: a repacked folder, a plain checkpoint, a folder with config.json alone, or the name of a Hub repository.
        memory: the budget to look at, a size or a share of the dense model such as `"50%"`. Default: most of what is free.
        predictor: `"quantized"`, `"lowrank"` or `"none"`. Default: the stored one, else as `FlashOffloadConfig` chooses.
        dtype: of compute, such as `"bfloat16"`. Default: the checkpoint's.
        disk: the folder whose disk is measured. Default: a repacked model's own, else that of the flash cache.
        active: share of a layer's neurons that a token leaves non-zero. Default: as calibrated, else 0.03.
        fresh: share of them that the 4 tokens before did not use. Default: as calibrated, else 0.24. Where one of these two is
            given, all layers are taken for alike and a calibration is left aside.
        predicted: neurons that the predictor names for one that is active. Default: as calibrated, else 1.5 or, low rank, 3.
        tokens: predict the mean of so many tokens after a prompt of `prompt_tokens`, while the windows fill. Default: the
            long run.
        prompt_tokens: see `tokens`.
        reader: as in `FlashOffloadConfig`; `"auto"` goes through the page cache where the whole store fits into free memory.
        hub: `revision`, `token`, `cache_dir`, `local_files_only`, as in `from_pretrained`.

    Raises:
        BudgetError: the budget is below the minimum; the message lists what takes it.
        ConfigError: an argument is out of range. UnsupportedModelError: no adapter for this architecture.
        StoreError: no config.json, or a damaged store. DiskSpaceError, RepackError: no scratch file can be written.
    """
    if tokens is not None and (tokens < 1 or prompt_tokens < 1):
        raise ConfigError("no tokens", where="tokens, prompt_tokens", expected="at least 1", got=(tokens, prompt_tokens))
    found = _open(model, predictor, dtype, **hub)
    demand = _demand(found, active, fresh, predicted, stored_report(found.store) if found.store else None)
    empty = _memory(found, 1 << 59, demand)
    whole = max(empty.dense_bytes, empty.minimum_bytes)  # buffers are more than the FFN of a tiny model
    scarce = memory is None and ceiling_bytes(None) < whole
    wanted = _memory(found, None if scarce else whole if memory is None else parse_share(memory, empty.dense_bytes), demand)
    free = available_memory()
    place = Path(disk) if disk is not None else found.folder if found.store else cache_folder(None)
    if reader == "auto":  # as `open_reader` will decide
        spare = free - wanted.minimum_bytes - wanted.window_bytes
        reader = "mmap" if wanted.layers * wanted.d_ff * found.bundle_bytes <= spare else "direct"
    times = measure(found, demand.selected, demand.predicted, wanted.capacity, _existing(place, disk is not None), reader)
    seen = None if tokens is None else (prompt_tokens, prompt_tokens + tokens - 1)
    sizes = {empty.dense_bytes * share // 100 for share in SHARES} | {wanted.minimum_bytes, wanted.budget_bytes}
    plans = [replace(wanted, budget_bytes=size) for size in sorted(sizes) if size >= wanted.minimum_bytes]
    points = [_predict(item, found, demand, times, seen) for item in plans]
    return Plan(
        model=found.folder.name if Path(model).is_dir() else str(model),
        model_type=found.adapter.model_type,
        dtype=str(found.dtype).removeprefix("torch."),
        predictor=found.predictor,
        memory=wanted,
        activity=demand,
        measured=times,
        point=next(point for point in points if point.budget_bytes == wanted.budget_bytes),
        points=tuple(points),
        free_bytes=free,
        dense_token_ms=wanted.layers * (times.stock_rest_ms + times.dense_ffn_ms) + times.stock_head_ms,
        suggested_bytes=_suggestion(points, ceiling_bytes(None)),
    )


def _suggestion(points: Sequence[Point], most: int) -> int | None:
    """The smallest budget that is nearly as fast as the fastest of those that fit."""
    fit = [point for point in points if point.budget_bytes <= most]
    best = min((point.token_ms for point in fit), default=0.0)
    return next((point.budget_bytes for point in fit if point.token_ms <= ENOUGH * best), None)


def _existing(folder: Path, named: bool) -> Path:
    """The folder; of one that will be made later, the nearest that is there already."""
    if named and not folder.is_dir():
        raise ConfigError("not a folder", where="disk", got=str(folder))
    return next(part for part in [folder, *folder.absolute().parents] if part.is_dir())
