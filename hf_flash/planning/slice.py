"""What this machine does: times of a *slice* of a model, for the cost model of planning/planner.py.

A slice is a few layers in the model's real shape with random weights. It generates through transformers with the real
`FlashFFN`, window, reader and predictor. Only what a token needs is prescribed: so many neurons of which so many are not in
DRAM. So caches are as cold and Python as slow as in the real model, and reads come from the disk as they will, at random, in
batches of a layer's size. The dense model is the slice's time outside the FFN, with torch's own products,
plus two matrix-vector products a layer.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, Final

import numpy as np
import torch
from huggingface_hub.utils import tqdm
from transformers import AutoModelForCausalLM, StoppingCriteria

from hf_flash.base.buffers import aligned_empty
from hf_flash.base.folders import scratch_file
from hf_flash.base.heap import trim_heap
from hf_flash.compute.arithmetic import Scratch
from hf_flash.families.adapters import Adapter
from hf_flash.predictors.base import NoPredictor, PredictorForm
from hf_flash.predictors.lowrank import LowRankFormat, LowRankPredictor, lowrank_specs
from hf_flash.predictors.quantized import QuantizedFormat, QuantizedPredictor
from hf_flash.reading.reader import open_reader
from hf_flash.runtime.engine import Engine
from hf_flash.runtime.layer import FlashFFN
from hf_flash.runtime.resident_linear import adopt
from hf_flash.runtime.window import ResidentWindow
from hf_flash.store.layout import FlashStore, LayerStore
from hf_flash.store.safetensors_files import TensorSpec

_SCRATCH_BYTES: Final = 128 << 20  # of a file to read from, where there is none
_WINDOW_BYTES: Final = 64 << 20  # of a slice's layer
_SLICE_BYTES: Final = 280 << 20  # attention in a slice
_SLICE_LAYERS: Final = 4
_MISSES: Final = (0.0, 1 / 128, 1 / 32, 1 / 8, 1 / 2)  # shares of a token's neurons that are read, in turn
_TOKENS: Final = 9  # timed for each


@dataclass(frozen=True)
class Model:
    """What is known of a model from its config.json, and from its store if it is repacked."""

    folder: Path
    config: Any
    adapter: Adapter
    store: FlashStore | None
    form: PredictorForm | None
    dtype: torch.dtype  # of compute
    stored_dtype: torch.dtype  # on flash

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


def fast_rank(rank: float) -> int:
    """The next rank that torch has a fast product for."""
    return max(16, math.ceil(rank / 16) * 16)


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
    stock_rest_ms: float  # these two as transformers has them
    stock_head_ms: float
    dense_ffn_ms: float  # both products of the stock layer
    dram_gb_per_s: float  # of these

    def at(self, missing: float) -> tuple[float, float]:
        """`io_ms` and `manage_ms` of a layer that reads so many neurons."""
        io = float(np.interp(missing, (0, *self.misses), (0.0, *self.io_ms)))
        beyond = max(1.0, missing / max(1, self.misses[-1]))
        return io * beyond, float(np.interp(missing, self.misses, self.manage_ms))


def measure(model: Model, neurons: float, predicted: float, capacity: int, disk: Path, reader: str) -> Measured:
    """Run a slice of the model and time its parts.

    Args:
        neurons: that a token computes in a layer.
        predicted: neurons that are named for one that is active.
        capacity: of the windows, as far as there is memory for them in a slice.
        disk: the folder to read from.
        reader: `"mmap"`, with the files in the page cache, or `"direct"`.
    """
    layers, d_ff, d_model = model.dims
    attention = 4 * d_model * d_model * model.dtype.itemsize
    count = max(1, min(_SLICE_LAYERS, layers, _SLICE_BYTES // attention))
    with _readable(model, disk, count) as store, torch.no_grad():
        rows = store.layers[0].d_ff
        if reader == "mmap":
            _into_page_cache({layer.path for layer in store.layers})
        engine = Engine(open_reader(store, reader, 16, model.dtype, 0), Scratch(rows, d_model, model.dtype), model.dtype)
        try:
            cut = _Slice(model, neurons, predicted, engine, count, rows, capacity)
            scale = neurons / cut.needed
            stock = cut.run(cut.misses[0])  # everything outside the FFN as transformers has it
            adopt(cut.model, engine)
            runs = [cut.run(count) for count in tqdm(cut.misses, desc="Measuring", unit="setting", delay=2)]
            misses = tuple(round(count * scale) for count in cut.misses)
        finally:
            engine.close()
        disk_used = f"{store.layers[0].path.parent} ({engine.reader.source.reads_with})"
    del cut
    gc.collect()  # before the next large matrix
    trim_heap()
    dense_s, gb_per_s = _dense_ffn(d_ff, d_model, model.dtype)
    io = [1e3 * scale * run["io"] for run in runs]
    typical = {part: 1e3 * float(np.median([run[part] for run in runs])) for part in ("predict", "compute", "rest", "head")}
    return Measured(
        disk=disk_used,
        torch_threads=torch.get_num_threads(),
        neurons=round(neurons),
        misses=misses,
        io_ms=tuple(min(io[at:]) for at in range(len(io))),  # fewer reads that took longer: something disturbed them
        manage_ms=tuple(1e3 * run["manage"] for run in runs),
        predict_ms=typical["predict"],
        compute_ms=scale * typical["compute"],
        rest_ms=typical["rest"],
        head_ms=typical["head"],
        stock_rest_ms=1e3 * stock["rest"],
        stock_head_ms=1e3 * stock["head"],
        dense_ffn_ms=1e3 * dense_s,
        dram_gb_per_s=gb_per_s,
    )


class _Slice:
    """Some layers of a model in its real shape, whose predictors name what they are told to.

    Args:
        engine: reads files of `rows` neurons a layer.
        capacity: of the real model's windows.
    """

    def __init__(
        self, model: Model, neurons: float, predicted: float, engine: Engine, layers: int, rows: int, capacity: int
    ) -> None:
        _, d_ff, d_model = model.dims
        self.engine, self.layers, self.rows, self.all = engine, layers, rows, model.form is None
        self.needed = rows if self.all else max(1, min(round(neurons), rows // 2))
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
                idle = torch.from_numpy(self.generator.random(rows) * max(1.0, predicted) >= 1.0)
                ffn.bias.data = torch.where(idle, -100.0, 100.0).to(model.dtype)

    def run(self, missing: int) -> dict[str, float]:
        """Generate some tokens for which every layer reads `missing` neurons; medians in seconds.

        Returns:
            `io`, `manage`, `predict`, `compute` and `rest` of a layer, `head` of a token.
        """
        clock = _Clock(self, missing)
        tokens = min(_TOKENS + 1, self.model.config.max_position_embeddings - 1)  # and the first, which is not timed
        with clock.watching(self.model.get_decoder().layers):
            start = torch.full((1, 1), 4, dtype=torch.int64, device="cpu")
            self.model.generate(
                start, attention_mask=torch.ones_like(start), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
                num_beams=1, stopping_criteria=[clock],
            )  # fmt: skip
        return {part: float(np.median([token[part] for token in clock.found])) for part in clock.found[0]}

    def prescribe(self, missing: int) -> None:
        """Choose what the next token needs: neurons at random, `missing` of them not in DRAM."""
        for ffn, predictor in zip(self.ffns, self.predictors, strict=True):
            there = ffn.window.slot_of >= 0
            hits = self.generator.permutation(np.flatnonzero(there))[: self.needed - missing]
            new = self.generator.permutation(np.flatnonzero(~there))[:missing]
            predictor.says = torch.zeros(1, self.rows, dtype=torch.bool, device="cpu")
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
        return torch.zeros(len(input_ids), dtype=torch.bool, device="cpu")

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

    bias: torch.Tensor | None = None

    def __init__(self, model: Model, d_ff: int, rows: int) -> None:
        self.says = torch.zeros(1, rows, dtype=torch.bool, device="cpu")
        d_model, form = model.dims[2], model.form
        self._real: QuantizedPredictor | LowRankPredictor | None = None
        if isinstance(form, QuantizedFormat):
            tensors = {name.rpartition(".")[2]: _random(spec) for name, spec in form.shapes("x", d_ff, d_model).items()}
            self._real = QuantizedPredictor(tensors, None, form, tensors["error"])
        elif isinstance(form, LowRankFormat):
            specs = lowrank_specs("x", d_ff, d_model, fast_rank(sum(form.ranks) / len(form.ranks)))
            self._real = LowRankPredictor({name.rpartition(".")[2]: _random(spec) for name, spec in specs.items()})
        self.nbytes = self._real.nbytes if self._real else 0

    def select(self, x: torch.Tensor) -> torch.Tensor:
        if self._real is not None:
            self._real.select(x)
        return self.says


def _random(spec: TensorSpec) -> torch.Tensor:
    dtype, shape = spec
    if dtype.is_floating_point:
        return torch.full(shape, 0.01, dtype=dtype, device="cpu")
    return torch.randint(0, 127, shape, dtype=dtype, device="cpu")


def _dense_ffn(d_ff: int, d_model: int, dtype: torch.dtype) -> tuple[float, float]:
    """Seconds that both products of a stock FFN take for one token, out of DRAM, and GB/s."""
    size = d_ff * d_model
    copies = max(2, _WINDOW_BYTES // (size * dtype.itemsize))
    weights = aligned_empty((copies, size), dtype).fill_(0.01)
    x, hidden, times = torch.ones(1, d_model, dtype=dtype, device="cpu"), torch.ones(1, d_ff, dtype=dtype, device="cpu"), []
    with torch.no_grad():
        for turn in range(max(6, min(copies, 24))):
            up, down = weights[2 * turn % copies].view(d_ff, d_model), weights[(2 * turn + 1) % copies].view(d_model, d_ff)
            start = perf_counter()
            torch.nn.functional.linear(x, up)
            torch.nn.functional.linear(hidden, down)
            times.append(perf_counter() - start)
    typical = float(np.median(times))
    return typical, 2 * size * dtype.itemsize / 1e9 / typical


def _into_page_cache(paths: set[Path]) -> None:
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.read(1 << 22):
                pass


@contextmanager
def _readable(model: Model, disk: Path, layers: int) -> Iterator[FlashStore]:
    """Some layers to read neurons from: the model's own if it is repacked and lies on that disk, else of a scratch file."""
    if model.store is not None and model.folder.resolve() == disk.resolve():
        yield replace(model.store, layers=model.store.layers[:layers])
        return
    _, d_ff, d_model = model.dims
    rows = max(2, min(d_ff, _SCRATCH_BYTES // model.bundle_bytes))
    block = (
        torch.randn(min(rows, 1024), 2 * d_model, dtype=torch.float32, device="cpu")
        .mul_(0.02)
        .to(model.stored_dtype)
        .view(torch.uint8)
        .numpy()
    )
    blocks = (block[: rows - at].data for at in range(0, rows, len(block)))
    with scratch_file(disk, "plan", rows * model.bundle_bytes, blocks) as path:
        layer = LayerStore(0, path, 0, "scratch", rows, d_model, model.stored_dtype, "", "", "")
        yield FlashStore(tuple(replace(layer, index=index) for index in range(layers)), {}, None, (), {})
