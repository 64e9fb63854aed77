"""`hf-flash plan`: how fast a model will be here, and with how much memory, before anything is downloaded or repacked.

The cost of a decoded token, in the paper's frame (sections 2 and 3, table 3), L layers:

    token    = head + sum over the layers of (rest + predict + manage(f) + io(f) + compute)
    f        = s(k + 1) - s(k)     neurons that a token needs and the last k tokens did not use
    k        from s(k) = capacity  the window keeps as many tokens as there is room for
    capacity = (budget - embeddings, attention, predictor, scratch) / (L * bundle)

s(k) is the *aggregated use*: how many different neurons of a layer the last k tokens were predicted to use (paper: figure 4a).

Measured, on this machine: all times. A *slice* of the model, a few layers of its real shape with random weights, generates
through transformers with the real `FlashFFN`, window, reader and predictor. Only what a token needs is prescribed: so many
neurons of which so many are not in DRAM. So caches are as cold and Python as slow as in the real model, and reads come from the
disk as they will, at random, in batches of a layer's size, past the page cache. Between the measured f times are interpolated.
The dense model is the slice's time outside the FFN plus two matrix-vector products a layer.

Measured, on text, if the model was calibrated: s(1) to s(16) of every layer, beyond that a power law through the last of them;
and how many neurons are predicted for one that is active. Otherwise assumed, from the paper's figures for OPT-6.7B: 3 % active,
of which 24 % were not used in the 4 tokens before, which makes s(k) = s(1) * k^0.51. Reports say which it was.

Left out: the prompt (it is computed, not read, most of the time); attention over a long context; lookahead, which hides reads
where a core is free; the page cache, where the store fits into what memory is left: all but the first two make it faster than
said here.
"""

from __future__ import annotations

import gc
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from huggingface_hub.utils import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, StoppingCriteria

from .adapters import Adapter, adapter_for
from .budget import MemoryPlan, available_memory, ceiling_bytes, format_bytes, parse_share
from .calibration import stored_report
from .checkpoint import resolve_folder
from .compute import Scratch
from .config import FlashOffloadConfig
from .errors import ConfigError
from .ffn import Engine, FlashFFN
from .folders import check_room
from .lowrank import LowRankFormat, LowRankPredictor, lowrank_specs
from .memory import aligned_empty, trim_heap
from .predictor import NoPredictor, PredictorForm
from .quantized import QuantizedFormat, QuantizedPredictor
from .reader import open_reader
from .repack import cache_folder, fresh_form, stored_form
from .runtime import divide_memory
from .store import FlashStore, LayerStore, TensorSpec, read_json
from .window import ResidentWindow
from .writer import writing

Curve = npt.NDArray[np.floating[Any]]

SHARES: Final = (30, 40, 50, 60, 70, 80, 100)  # percent of the dense model that are looked at
ENOUGH: Final = 1.1  # a suggested budget may be so many times slower than the fastest
_ACTIVE, _FRESH = 0.03, 0.24  # OPT-6.7B, in the paper
_PREDICTED: Final = {"quantized": 1.5, "lowrank": 3.0, "none": 1.0}  # neurons named for one that is active
_LONGEST: Final = 4096  # tokens that s(k) is continued to
_WORD_OF_4: Final = 4  # tokens that `fresh` looks back

_SCRATCH_BYTES: Final = 128 << 20  # of a file to read from, where there is none
_WINDOW_BYTES: Final = 64 << 20  # of a slice's layer
_SLICE_BYTES: Final = 280 << 20  # attention in a slice
_SLICE_LAYERS: Final = 4
_MISSES: Final = (0.0, 1 / 128, 1 / 32, 1 / 8, 1 / 2)  # shares of a token's neurons that are read, in turn
_TOKENS: Final = 9  # timed for each


# --- what a model needs ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Model:
    """What is known of a model from its config.json, and from its store if it is repacked."""

    folder: Path
    config: Any
    adapter: Adapter
    store: FlashStore | None
    form: PredictorForm | None
    dtype: torch.dtype  # of compute
    stored_dtype: torch.dtype  # on flash

    @classmethod
    def open(cls, source: str | os.PathLike[str], predictor: str | None, dtype: str | None, **hub: Any) -> _Model:
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
        return cls(folder, config, adapter, store, form, _dtype(dtype) or config.dtype or own, own)

    @property
    def dims(self) -> tuple[int, int, int]:
        """layers, d_ff, d_model."""
        return self.adapter.dims(self.config)

    @property
    def bundle_bytes(self) -> int:
        """Of a neuron on flash."""
        return 2 * self.dims[2] * self.stored_dtype.itemsize

    @property
    def predictor(self) -> str:
        return "none" if self.form is None else "lowrank" if isinstance(self.form, LowRankFormat) else "quantized"

    def skeleton(self, layers: int, d_ff: int) -> tuple[Any, list[FlashFFN]]:
        """The model without memory, cut to some layers, and its FFNs."""
        config = type(self.config).from_dict(self.config.to_dict())
        config.num_hidden_layers, config.dtype = layers, self.dtype
        setattr(config, self.adapter.d_ff_key, d_ff)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=self.dtype)
            ffns = self.adapter.swap(model, self.dtype)
        return model.to(self.dtype), ffns  # the new biases too

    def memory(self, budget: int | str | None) -> MemoryPlan:
        """Divide a budget as loading does. Raises `BudgetError`."""
        layers, d_ff, _ = self.dims
        model, _ = self.skeleton(layers, d_ff)
        weights = [*model.parameters(), *model.buffers()]
        resident = sum(w.nbytes for w in weights)
        kinds = self.dtype, self.stored_dtype
        return divide_memory(budget, resident, self.form, self.dims, *kinds, reader="auto", io_threads=16)


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
    return LowRankFormat((_step(d_model // 32),) * (layers - wide) + (_step(d_model // 4),) * wide)


def _step(rank: float) -> int:
    """The next rank that torch has a fast product for."""
    return max(16, math.ceil(rank / 16) * 16)


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
    model: _Model, active: float | None, fresh: float | None, predicted: float | None, report: dict[str, Any] | None
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


# --- what this machine does --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """Medians of the slice, in milliseconds of a layer and a token unless said otherwise."""

    disk: str  # what was read, and with what
    torch_threads: int
    neurons: int  # computed
    misses: tuple[int, ...]  # neurons read, of these
    io_ms: tuple[float, ...]  # by `misses`
    manage_ms: tuple[float, ...]
    predict_ms: float
    compute_ms: float
    rest_ms: float  # attention, norms, Python
    head_ms: float  # a token: embeddings, last norm and head, choosing the token
    dense_ffn_ms: float  # both products of the stock layer
    dram_gb_per_s: float  # of these

    def at(self, missing: float) -> tuple[float, float]:
        """`io_ms` and `manage_ms` of a layer that reads so many neurons."""
        io = float(np.interp(missing, (0, *self.misses), (0.0, *self.io_ms)))
        beyond = max(1.0, missing / max(1, self.misses[-1]))
        return io * beyond, float(np.interp(missing, self.misses, self.manage_ms))


def _measure(model: _Model, capacity: int, activity: Activity, disk: Path) -> Measured:
    """Run a slice of the model and time its parts.

    Args:
        capacity: of the windows, as far as there is memory for them in a slice.
    """
    layers, d_ff, d_model = model.dims
    attention = 4 * d_model * d_model * model.dtype.itemsize
    count = max(1, min(_SLICE_LAYERS, layers, _SLICE_BYTES // attention))
    with _readable(model, disk, count) as store, torch.no_grad():
        rows = store.layers[0].d_ff
        engine = Engine(open_reader(store, "direct", 16, model.dtype, 0), Scratch(rows, d_model, model.dtype), model.dtype)
        try:
            cut = _Slice(model, activity, engine, count, rows, capacity)
            scale = activity.selected / cut.needed
            runs = [cut.run(count) for count in tqdm(cut.misses, desc="Measuring", unit="setting", delay=2)]
            misses = tuple(round(count * scale) for count in cut.misses)
        finally:
            engine.close()
        disk_used = f"{store.layers[0].path.parent} ({engine.reader.source.means})"
    del cut
    gc.collect()  # before the next large matrix
    trim_heap()
    dense_s, gb_per_s = _dense_ffn(d_ff, d_model, model.dtype)
    io = [1e3 * scale * run["io"] for run in runs]
    typical = {part: 1e3 * float(np.median([run[part] for run in runs])) for part in ("predict", "compute", "rest", "head")}
    return Measured(
        disk=disk_used,
        torch_threads=torch.get_num_threads(),
        neurons=round(activity.selected),
        misses=misses,
        io_ms=tuple(min(io[at:]) for at in range(len(io))),  # fewer reads that took longer: something disturbed them
        manage_ms=tuple(1e3 * run["manage"] for run in runs),
        predict_ms=typical["predict"],
        compute_ms=scale * typical["compute"],
        rest_ms=typical["rest"],
        head_ms=typical["head"],
        dense_ffn_ms=1e3 * dense_s,
        dram_gb_per_s=gb_per_s,
    )


class _Slice:
    """Some layers of a model in its real shape, whose predictors name what they are told to.

    Args:
        engine: reads files of `rows` neurons a layer.
        capacity: of the real model's windows.
    """

    def __init__(self, model: _Model, activity: Activity, engine: Engine, layers: int, rows: int, capacity: int) -> None:
        _, d_ff, d_model = model.dims
        self.engine, self.layers, self.rows, self.all = engine, layers, rows, model.form is None
        self.needed = rows if self.all else max(1, min(round(activity.selected), rows // 2))
        self.misses = [rows] if self.all else sorted({0, 1, *(round(share * self.needed) for share in _MISSES)})
        room = max(2 * self.needed, min(capacity, _WINDOW_BYTES // model.bundle_bytes))
        room = 0 if self.all else min(room, rows - self.needed)
        self.model, self.ffns = model.skeleton(layers, rows)
        self.model.to_empty(device="cpu")
        self.model.tie_weights()
        self.model.eval()
        for tensor in {id(t): t for t in [*self.model.parameters(), *self.model.buffers()]}.values():
            tensor.data = aligned_empty(tuple(tensor.shape), tensor.dtype).fill_(0.01)
        self.generator = np.random.default_rng(0)
        self.predictors = [_Told(model, d_ff, rows) for _ in self.ffns]
        for ffn, predictor in zip(self.ffns, self.predictors, strict=True):
            window = ResidentWindow(rows, d_model, room, 5, model.dtype)
            window.matrix.fill_(0.01)
            ids = np.sort(self.generator.permutation(rows)[:room])
            window.commit(ids, window.reserve(room))
            ffn.attach(engine, window, NoPredictor() if self.all else predictor)
            if ffn.bias is not None:  # large beside anything that is added to it: so many are active and no more
                idle = torch.from_numpy(self.generator.random(rows) * max(1.0, activity.predicted) >= 1.0)
                ffn.bias.data = torch.where(idle, -100.0, 100.0).to(model.dtype)

    def run(self, missing: int) -> dict[str, float]:
        """Generate some tokens for which every layer reads `missing` neurons; medians in seconds.

        Returns:
            `io`, `manage`, `predict`, `compute` and `rest` of a layer, `head` of a token.
        """
        clock = _Clock(self, missing)
        tokens = min(_TOKENS + 1, self.model.config.max_position_embeddings - 1)  # and the first, which is not timed
        with clock.watching(self.model.get_decoder().layers):
            self.model.generate(
                torch.full((1, 1), 4), attention_mask=torch.ones(1, 1, dtype=torch.long), max_new_tokens=tokens,
                min_new_tokens=tokens, do_sample=False, num_beams=1, stopping_criteria=[clock],
            )  # fmt: skip
        return {part: float(np.median([token[part] for token in clock.found])) for part in clock.found[0]}

    def prescribe(self, missing: int) -> None:
        """Choose what the next token needs: neurons at random, `missing` of them not in DRAM."""
        for ffn, predictor in zip(self.ffns, self.predictors, strict=True):
            there = ffn.window.slot_of >= 0
            hits = self.generator.permutation(np.flatnonzero(there))[: self.needed - missing]
            new = self.generator.permutation(np.flatnonzero(~there))[:missing]
            predictor.says = torch.zeros(1, self.rows, dtype=torch.bool)
            predictor.says[0, torch.from_numpy(np.concatenate([hits, new]))] = True


class _Clock(StoppingCriteria):
    """Takes a token's times where it is chosen, and prescribes the next one's neurons outside of them. Never stops a run."""

    def __init__(self, cut: _Slice, missing: int) -> None:
        self._cut, self._missing, self.found = cut, missing, list[dict[str, float]]()
        self._start, self._entered, self._in_layers, self._first = 0.0, 0.0, 0.0, True
        cut.prescribe(missing)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        whole, count, layers = perf_counter() - self._start, self._cut.engine.counters, self._cut.layers
        if not self._first:  # that one had the prompt's work in it
            parts = {name: getattr(count, f"{name}_s") / layers for name in ("io", "manage", "predict", "compute")}
            rest = self._in_layers / layers - sum(parts.values())
            self.found.append(parts | {"rest": rest, "head": whole - self._in_layers})
        self._first = False
        self._cut.prescribe(self._missing)
        count.reset()
        self._start = perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool)

    @contextmanager
    def watching(self, layers: Any) -> Iterator[None]:
        """Take the time from the first layer's beginning to the last one's end."""

        def enter(*args: Any) -> None:
            self._entered = perf_counter()

        def leave(*args: Any) -> None:
            self._in_layers = perf_counter() - self._entered

        handles = [layers[0].register_forward_pre_hook(enter), layers[-1].register_forward_hook(leave)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Told:
    """A real predictor of the model's shape, with random weights, that answers what it was told to."""

    def __init__(self, model: _Model, d_ff: int, rows: int) -> None:
        self.says = torch.zeros(1, rows, dtype=torch.bool)
        d_model, form = model.dims[2], model.form
        self._real: QuantizedPredictor | LowRankPredictor | None = None
        if isinstance(form, QuantizedFormat):
            tensors = {name.rpartition(".")[2]: _random(spec) for name, spec in form.shapes("x", d_ff, d_model).items()}
            self._real = QuantizedPredictor(tensors, None, form, tensors["error"])
        elif isinstance(form, LowRankFormat):
            specs = lowrank_specs("x", d_ff, d_model, _step(sum(form.ranks) / len(form.ranks)))
            self._real = LowRankPredictor({name.rpartition(".")[2]: _random(spec) for name, spec in specs.items()})
        self.nbytes = self._real.nbytes if self._real else 0

    def select(self, x: torch.Tensor) -> torch.Tensor:
        if self._real is not None:
            self._real.select(x)
        return self.says


def _random(spec: TensorSpec) -> torch.Tensor:
    dtype, shape = spec
    if dtype.is_floating_point:
        return torch.full(shape, 0.01, dtype=dtype)
    return torch.randint(0, 127, shape, dtype=dtype)


def _dense_ffn(d_ff: int, d_model: int, dtype: torch.dtype) -> tuple[float, float]:
    """Seconds that both products of a stock FFN take for one token, out of DRAM, and GB/s."""
    size = d_ff * d_model
    copies = max(2, _WINDOW_BYTES // (size * dtype.itemsize))
    weights = aligned_empty((copies, size), dtype).fill_(0.01)
    x, hidden, times = torch.ones(1, d_model, dtype=dtype), torch.ones(1, d_ff, dtype=dtype), []
    with torch.no_grad():
        for turn in range(max(6, min(copies, 24))):
            up, down = weights[2 * turn % copies].view(d_ff, d_model), weights[(2 * turn + 1) % copies].view(d_model, d_ff)
            start = perf_counter()
            torch.nn.functional.linear(x, up)
            torch.nn.functional.linear(hidden, down)
            times.append(perf_counter() - start)
    typical = float(np.median(times))
    return typical, 2 * size * dtype.itemsize / 1e9 / typical


@contextmanager
def _readable(model: _Model, disk: Path, layers: int) -> Iterator[FlashStore]:
    """Some layers to read neurons from: the model's own if it is repacked and lies on that disk, else of a scratch file."""
    if model.store is not None and model.folder.resolve() == disk.resolve():
        yield replace(model.store, layers=model.store.layers[:layers])
        return
    _, d_ff, d_model = model.dims
    rows = max(2, min(d_ff, _SCRATCH_BYTES // model.bundle_bytes))
    check_room(disk, rows * model.bundle_bytes)
    with writing(disk):
        place = tempfile.TemporaryDirectory(prefix=".hf-flash-plan-", dir=disk)
    with place as folder:
        path = Path(folder) / "scratch"
        with writing(path, needed=rows * model.bundle_bytes), open(path, "wb") as file:
            block = torch.randn(min(rows, 1024), 2 * d_model).mul_(0.02).to(model.stored_dtype).view(torch.uint8).numpy()
            for at in range(0, rows, len(block)):
                file.write(block[: rows - at].data)
            file.flush()
            os.fsync(file.fileno())
        layer = LayerStore(0, path, 0, "scratch", rows, d_model, model.stored_dtype, "", "", "")
        yield FlashStore(tuple(replace(layer, index=index) for index in range(layers)), {}, None, (), {})


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


def _predict(memory: MemoryPlan, model: _Model, activity: Activity, found: Measured, seen: tuple[int, int] | None) -> Point:
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
    found = _Model.open(model, predictor, dtype, **hub)
    report = stored_report(found.store) if found.store else None
    activity = _activity(found, active, fresh, predicted, report)
    empty = found.memory(1 << 59)
    whole = max(empty.dense_bytes, empty.minimum_bytes)  # buffers are more than the FFN of a tiny model
    scarce = memory is None and ceiling_bytes(None) < whole
    wanted = found.memory(None if scarce else whole if memory is None else parse_share(memory, empty.dense_bytes))
    free = available_memory()
    place = Path(disk) if disk is not None else found.folder if found.store else cache_folder(None)
    measured = _measure(found, wanted.capacity, activity, _existing(place, disk is not None))
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
