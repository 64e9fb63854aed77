"""`hf-flash plan`: how fast a model will be here, and with how much memory, before anything is downloaded or repacked.

The cost of a decoded token, in the paper's frame (sections 2 and 3, table 3), L layers:

    token    = head + sum over the layers of (rest + predict + manage(f) + io(f) + compute)
    f        = s(k + 1) - s(k)     neurons that a token needs and the last k tokens did not use
    k        from s(k) = capacity  the window keeps as many tokens as there is room for
    capacity = (budget - embeddings, attention, predictor, scratch) / (L * bundle)

s(k) is the *aggregated use*: how many different neurons of a layer the last k tokens were predicted to use (paper: figure 4a).

Measured, on this machine (machine.py): all times, in a few layers of the model's real shape, for some f; between them they are
interpolated.

Measured, on text, if the model was calibrated: s(1) to s(16) of every layer, beyond that a power law through the last of them;
and how many neurons are predicted for one that is active. Otherwise assumed, from the paper's figures for OPT-6.7B: 3 % active,
of which 24 % were not used in the 4 tokens before, which makes s(k) = s(1) * k^0.51. Reports say which it was.

Left out: the prompt (it is computed, not read, most of the time); attention over a long context; lookahead, which hides reads
where a core is free; the page cache, where the store fits into what memory is left: all but the first two make it faster than
said here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoConfig

from .adapters import Adapter, adapter_for
from .budget import MemoryPlan, available_memory, ceiling_bytes, format_bytes, parse_share
from .calibration import stored_report
from .checkpoint import resolve_folder
from .config import FlashOffloadConfig
from .errors import ConfigError
from .lowrank import LowRankFormat
from .machine import Measured, Model, fast_rank, measure
from .predictor import PredictorForm
from .repack import cache_folder, fresh_form, stored_form
from .runtime import divide_memory
from .store import FlashStore, read_json

Curve = npt.NDArray[np.floating[Any]]

SHARES: Final = (30, 40, 50, 60, 70, 80, 100)  # percent of the dense model that are looked at
ENOUGH: Final = 1.1  # a suggested budget may be so many times slower than the fastest
_ACTIVE, _FRESH = 0.03, 0.24  # OPT-6.7B, in the paper
_PREDICTED: Final = {"quantized": 1.5, "lowrank": 3.0, "none": 1.0}  # neurons named for one that is active
_LONGEST: Final = 4096  # tokens that s(k) is continued to
_WORD_OF_4: Final = 4  # tokens that `fresh` looks back


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


def _memory(found: Model, budget: int | str | None) -> MemoryPlan:
    """Divide a budget as loading does. Raises `BudgetError`."""
    layers, d_ff, _ = found.dims
    model, _ = found.skeleton(layers, d_ff)
    weights = [*model.parameters(), *model.buffers()]
    resident = sum(w.nbytes for w in weights)
    kinds = found.dtype, found.stored_dtype
    return divide_memory(budget, resident, found.form, found.dims, *kinds, reader="auto", io_threads=16)


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


# --- what its neurons do -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Activity:
    """What tokens need of a layer.

    Attributes:
        source: `"measured"` (a calibration), `"assumed"` (the paper's figures) or `"given"`.
        active: share of the neurons that a token leaves non-zero.
        predicted: neurons that are named for one that is active.
        use: aggregated use of *named* neurons, one curve or one a layer, at k = 0 to 4096 tokens.
    """

    source: str
    active: float
    predicted: float
    use: tuple[Curve, ...]

    @property
    def selected(self) -> float:
        """Neurons that a token computes in a layer."""
        return float(np.mean([curve[1] for curve in self.use]))

    def misses(self, capacity: int, seen: tuple[int, int] | None) -> list[float]:
        """Neurons a token has to read in each layer whose window holds `capacity`.

        Args:
            seen: how many tokens came before: first and last. `None`: as many as it takes.
        """
        found = []
        for curve in self.use:
            room = float(np.interp(capacity, curve, np.arange(len(curve))))  # tokens that fit
            before = np.full(1, room) if seen is None else np.minimum(room, np.arange(seen[0], seen[1] + 1))
            at = np.arange(len(curve))
            found.append(float(np.mean(np.interp(before + 1, at, curve) - np.interp(before, at, curve))))
        return found


def _activity(
    model: Model, active: float | None, fresh: float | None, predicted: float | None, report: dict[str, Any] | None
) -> Activity:
    """From what was given, else from a calibration, else from the paper."""
    for name, value, most in (("active", active, 1.0), ("fresh", fresh, 1.0), ("predicted", predicted, 1000.0)):
        if value is not None and not 0 < value <= most:
            raise ConfigError(f"{name} is out of range", where="plan", expected=f"more than 0, at most {most:g}", got=value)
    _, d_ff, _ = model.dims
    kind = model.predictor
    if kind == "none":
        everything = np.full(_LONGEST + 1, float(d_ff))
        everything[0] = 0.0
        return Activity("given", 1.0, 1.0, (everything,))
    if report is not None and active is None and fresh is None:
        key = "lowrank" if model.form is None or kind == "lowrank" else model.form.variant
        layers = report["layers"]
        over = [predicted or layer.get(key, {}).get("selected") or _PREDICTED[kind] for layer in layers]
        uses = [np.array(layer["use"]["mean"]) * more for layer, more in zip(layers, over, strict=True)]
        share = float(np.mean([layer["active"] for layer in layers])) / d_ff
        return Activity("measured", share, float(np.mean(over)), tuple(_curve(use, d_ff) for use in uses))
    source = "assumed" if active is None and fresh is None else "given"
    share, over_all = active or _ACTIVE, predicted or _PREDICTED[kind]
    grid = np.linspace(1e-6, 1.0, 10_001)
    power = float(np.interp(fresh or _FRESH, (_WORD_OF_4 + 1.0) ** grid - _WORD_OF_4**grid, grid))
    return Activity(source, share, over_all, (_curve(share * over_all * d_ff * np.arange(1, 17) ** power, d_ff),))


def _curve(use: Curve, d_ff: int) -> Curve:
    """s(0) to s(4096) from s(1), s(2) ...: continued by a power law through the last points, concave, at most d_ff."""
    count, last = len(use), max(float(use[-1]), 1e-9)
    back = max(0, count - 5)
    power = np.log(last / max(float(use[back]), 1e-9)) / np.log(count / (back + 1)) if count > 1 else 0.5
    rest = last * (np.arange(count + 1, _LONGEST + 1) / count) ** float(np.clip(power, 0.0, 1.0))
    steps = np.diff(np.concatenate(([0.0], use, rest)))
    smooth: Curve = np.minimum(np.cumsum(np.minimum.accumulate(np.maximum(steps, 0.0))), d_ff)
    return np.concatenate(([0.0], smooth))


# --- what comes of it --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """What to expect of one budget. Times in milliseconds per decoded token."""

    budget_bytes: int
    capacity: int  # neurons that a layer's window holds
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


def _predict(memory: MemoryPlan, model: Model, activity: Activity, found: Measured, seen: tuple[int, int] | None) -> Point:
    """The cost model, for one budget."""
    layers = memory.layers
    missing = activity.misses(memory.capacity, seen) * (layers // len(activity.use))
    times = [found.at(count) for count in missing]
    return Point(
        budget_bytes=memory.budget_bytes,
        capacity=memory.capacity,
        hit_rate=1.0 - sum(missing) / layers / max(activity.selected, 1e-9),
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
    activity: Activity
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

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, derived ones included."""
        found = asdict(self)
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
        fresh: share of them that the 4 tokens before did not use. Default: as calibrated, else 0.24.
        predicted: neurons that the predictor names for one that is active. Default: as calibrated, else 1.5 or, low rank, 3.
        tokens: predict the mean of so many tokens after a prompt of `prompt_tokens`, while the windows fill. Default: the
            long run.
        prompt_tokens: see `tokens`.
        hub: `revision`, `token`, `cache_dir`, `local_files_only`, as in `from_pretrained`.

    Raises:
        BudgetError: the budget is below the minimum; the message lists what takes it.
        ConfigError: an argument is out of range. UnsupportedModelError: no adapter for this architecture.
        StoreError: no config.json, or a damaged store. DiskSpaceError, RepackError: no scratch file can be written.
    """
    if tokens is not None and (tokens < 1 or prompt_tokens < 1):
        raise ConfigError("no tokens", where="tokens, prompt_tokens", expected="at least 1", got=(tokens, prompt_tokens))
    found = _open(model, predictor, dtype, **hub)
    report = stored_report(found.store) if found.store else None
    activity = _activity(found, active, fresh, predicted, report)
    empty = _memory(found, 1 << 59)
    whole = max(empty.dense_bytes, empty.minimum_bytes)  # buffers are more than the FFN of a tiny model
    scarce = memory is None and ceiling_bytes(None) < whole
    wanted = _memory(found, None if scarce else whole if memory is None else parse_share(memory, empty.dense_bytes))
    free = available_memory()
    place = Path(disk) if disk is not None else found.folder if found.store else cache_folder(None)
    measured = measure(found, activity.selected, activity.predicted, wanted.capacity, _existing(place, disk is not None))
    seen = None if tokens is None else (prompt_tokens, prompt_tokens + tokens - 1)
    sizes = {empty.dense_bytes * share // 100 for share in SHARES} | {wanted.budget_bytes}
    plans = [replace(wanted, budget_bytes=size) for size in sorted(sizes) if size >= wanted.minimum_bytes]
    points = [_predict(item, found, activity, measured, seen) for item in plans]
    layers, head = wanted.layers, measured.head_ms
    return Plan(
        model=found.folder.name if Path(model).is_dir() else str(model),
        model_type=found.adapter.model_type,
        dtype=str(found.dtype).removeprefix("torch."),
        predictor=found.predictor,
        memory=wanted,
        activity=activity,
        measured=measured,
        point=next(point for point in points if point.budget_bytes == wanted.budget_bytes),
        points=tuple(points),
        free_bytes=free,
        dense_token_ms=layers * (measured.rest_ms + measured.dense_ffn_ms) + head,
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
