"""What this machine does: the times that the cost model of planner.py is made of.

The times of flash come from a [`ModelSlice`], a few layers in the model's real shape. The dense model takes the slice's time
outside the FFN, with torch's own products, plus two matrix-vector products a layer. Of a mixture of experts nothing runs: the
speeds of disk and DRAM are enough.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Final

import numpy as np
import torch
from huggingface_hub.utils import tqdm

from hf_flash.base.buffers import aligned_empty
from hf_flash.base.folders import scratch_file
from hf_flash.base.heap import trim_heap
from hf_flash.compute.arithmetic import arithmetic_for
from hf_flash.compute.dram_speed import dram_gb_per_s
from hf_flash.config_arguments import ARGUMENTS
from hf_flash.machine.disk import disk_curve, rate_at
from hf_flash.planning.model import PlannedModel
from hf_flash.planning.slice import WINDOW_BYTES, ModelSlice
from hf_flash.reading.reader import READERS, open_reader
from hf_flash.runtime.attention import make_attention_resident
from hf_flash.runtime.engine import Engine
from hf_flash.runtime.resident_linear import make_linears_resident
from hf_flash.store.layer_file import LayerStore
from hf_flash.store.layout import FlashStore
from hf_flash.store.unit import UnitLayout

_SCRATCH_BYTES: Final = 128 << 20  # of a file to read from, where there is none
_SLICE_BYTES: Final = 280 << 20  # attention in a slice
_SLICE_LAYERS: Final = 4
_LEAST_FILE: Final = 32 << 20  # to measure a disk with
_DEPTHS: Final = (8, 32)  # reads at a time, as for the experts of a layer


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


def measure(model: PlannedModel, neurons: float, predicted: float, capacity: int, disk: Path, reader: str) -> Measured:
    """Run a slice of the model and time its parts.

    Args:
        neurons: that a token computes in a layer.
        predicted: neurons that are named for one that is active.
        capacity: of the windows, as far as there is memory for them in a slice.
        disk: the folder to read from.
        reader: `"mmap"`, with the files in the page cache, or `"direct"`.
    """
    shape = model.shape
    attention = 4 * shape.d_model * shape.d_model * model.dtype.itemsize
    count = max(1, min(_SLICE_LAYERS, shape.layers, _SLICE_BYTES // attention))
    with _readable(model, disk, count) as store, torch.no_grad():
        times = _run_slice(model, store, neurons, predicted, capacity, reader)
    gc.collect()  # before the next large matrix
    trim_heap()
    dense_s, gb_per_s = _dense_ffn(shape.d_ff, model.unit.as_dtype(model.dtype))
    scale, runs, stock = times.scale, times.runs, times.stock
    io = [1e3 * scale * run["io"] for run in runs]
    typical = {part: 1e3 * float(np.median([run[part] for run in runs])) for part in ("predict", "compute", "rest", "head")}
    return Measured(
        disk=times.disk,
        torch_threads=torch.get_num_threads(),
        neurons=round(neurons),
        misses=times.misses,
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


@dataclass(frozen=True)
class _SliceTimes:
    """What runs of a slice took, in seconds as [`ModelSlice.run`] gives them."""

    disk: str  # what was read, and with what
    scale: float  # neurons of a token, for one in the slice
    misses: tuple[int, ...]  # neurons of a token that were read, by run
    runs: list[dict[str, float]]
    stock: dict[str, float]  # everything outside the FFN as transformers has it


def _run_slice(
    model: PlannedModel, store: FlashStore, neurons: float, predicted: float, capacity: int, reader: str
) -> _SliceTimes:
    """Run a slice with every number of misses."""
    rows, in_memory = store.layers[0].d_ff, model.unit.as_dtype(model.dtype)
    if not READERS[reader].may_be_direct:
        _into_page_cache({layer.path for layer in store.layers})
    arithmetic = arithmetic_for(rows, in_memory, model.family.activation_of(model.config))
    engine = Engine(open_reader(store, reader, ARGUMENTS["io_threads"].default, model.dtype, 0), arithmetic)
    try:
        cut = ModelSlice(model, neurons, predicted, engine, len(store.layers), rows, capacity)
        stock = cut.run(cut.misses[0])
        make_linears_resident(cut.model, engine)
        make_attention_resident(cut.model)
        runs = [cut.run(count) for count in tqdm(cut.misses, desc="Measuring", unit="setting", delay=2)]
    finally:
        engine.close()
    scale = neurons / cut.needed
    disk = f"{store.layers[0].path.parent} ({engine.reader.reads_with})"
    return _SliceTimes(disk, scale, tuple(round(count * scale) for count in cut.misses), runs, stock)


def _dense_ffn(d_ff: int, unit: UnitLayout) -> tuple[float, float]:
    """Seconds that the products of a stock FFN take for one token, out of DRAM, and GB/s."""
    d_model, dtype, first = unit.width, unit.dtype, len(unit.parts) - 1
    size = d_ff * d_model
    copies = max(len(unit.parts), WINDOW_BYTES // (size * dtype.itemsize))
    weights = aligned_empty((copies, size), dtype).fill_(0.01)
    x, hidden = torch.ones(1, d_model, dtype=dtype, device="cpu"), torch.ones(1, d_ff, dtype=dtype, device="cpu")
    times = []
    with torch.no_grad():
        for turn in range(max(6, min(copies, 24))):
            matrices = [weights[(turn * len(unit.parts) + number) % copies] for number in range(len(unit.parts))]
            start = perf_counter()
            for matrix in matrices[:first]:
                torch.nn.functional.linear(x, matrix.view(d_ff, d_model))
            torch.nn.functional.linear(hidden, matrices[first].view(d_model, d_ff))
            times.append(perf_counter() - start)
    typical = float(np.median(times))
    return typical, d_ff * unit.row_bytes / 1e9 / typical


def _into_page_cache(paths: set[Path]) -> None:
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.read(1 << 22):
                pass


@contextmanager
def _readable(model: PlannedModel, disk: Path, layers: int) -> Iterator[FlashStore]:
    """Some layers to read neurons from: the model's own if it is repacked and lies on that disk, else of a scratch file."""
    if model.store is not None and model.folder.resolve() == disk.resolve():
        yield replace(model.store, layers=model.store.layers[:layers])
        return
    unit = model.unit
    rows = max(2, min(model.shape.d_ff, _SCRATCH_BYTES // unit.row_bytes))
    numbers = torch.randn(min(rows, 1024), unit.numbers, dtype=torch.float32, device="cpu").mul_(0.02)
    block = numbers.to(unit.dtype).view(torch.uint8).numpy()
    blocks = (block[: rows - at].data for at in range(0, rows, len(block)))
    with scratch_file(disk, "plan", rows * unit.row_bytes, blocks) as path:
        layer = LayerStore(0, path, 0, "scratch", rows, unit, ("",) * len(unit.parts), "")
        yield FlashStore(tuple(replace(layer, index=index) for index in range(layers)), {}, None, (), {})


# --- a mixture of experts


@dataclass(frozen=True)
class Speeds:
    """What bounds a mixture of experts."""

    disk: str  # where it was measured
    read_size: int  # bytes of a read
    disk_gb_per_s: float
    dram_gb_per_s: float
    torch_threads: int


def measure_speeds(disk: Path, read_size: int) -> Speeds:
    """Measure disk and DRAM.

    Args:
        disk: the folder to read from.
        read_size: bytes of a read, a multiple of 4096.
    """
    with _large_file(disk) as path:
        rate = rate_at(disk_curve(path, sizes=(read_size,), depths=_DEPTHS), read_size)
    return Speeds(str(disk), read_size, rate, dram_gb_per_s(128 << 20, 3), torch.get_num_threads())


@contextmanager
def _large_file(folder: Path) -> Iterator[Path]:
    """A folder with files to measure with; else a scratch file in it."""
    if any(path.stat().st_size >= _LEAST_FILE for path in folder.glob("*.safetensors")):
        yield folder
        return
    noise = (os.urandom(1 << 20) for _ in range(_SCRATCH_BYTES >> 20))
    with scratch_file(folder, "plan", _SCRATCH_BYTES, noise) as path:
        yield path
