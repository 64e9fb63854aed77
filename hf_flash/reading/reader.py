"""`BundleReader`: reads neurons into rows. Coalesces, converts, counts; the bytes come from reading/layer_files.py.

A reader gets neurons (sorted ids), and the rows that they go to, anywhere in the caller's matrix. If the compute dtype differs
from the store's, rows are read into a staging buffer and converted from there.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Final, Protocol

import numpy as np
import torch

from hf_flash.base.arrays import Bytes, Ids
from hf_flash.base.buffers import aligned_empty
from hf_flash.config_arguments import AUTO, DIRECT, MMAP
from hf_flash.errors import StoreReadError
from hf_flash.reading.chunks import Chunks, chunked, torn
from hf_flash.reading.layer_files import PAGE, FileSource, StepFile, bounce_bytes, direct_alignment
from hf_flash.store.layer_file import LayerStore
from hf_flash.store.layout import FlashStore
from hf_flash.store.unit import UnitLayout

logger = logging.getLogger("hf_flash")

_STAGING_ROWS: Final = 128
_SAMPLE: Final = 256  # reads with which `gap` is measured: as many as are under way at once
_SMALL: Final = 128  # with fewer neurons in a layer, `gap` is not measured


@dataclass
class ReadCount:
    """The cost of reads.

    Attributes:
        nbytes: bytes requested from the disk, rounding included.
        chunks: number of chunks; for experts, of orders.
        host_hits: units for a device that were in this machine's memory already.
        bus_bytes: bytes copied to the device.
    """

    nbytes: int = 0
    chunks: int = 0
    host_hits: int = 0
    bus_bytes: int = 0

    def add(self, other: ReadCount) -> None:
        """Add another count to this one."""
        self.nbytes += other.nbytes
        self.chunks += other.chunks
        self.host_hits += other.host_hits
        self.bus_bytes += other.bus_bytes


class Reading(Protocol):
    """Bundles that are being read; [`BundleReader.start`] returns it."""

    def wait(self) -> ReadCount:
        """Wait until the rows are filled.

        Raises:
            StoreReadError: the disk failed, or the file has changed.
        """


class _Reading:
    """Reads bundles directly into the caller's rows."""

    def __init__(self, layer: LayerStore, chunks: Chunks, source: FileSource, out: Bytes, background: bool) -> None:
        self._layer, self._chunks = layer, chunks
        with self._errors():
            self._pending = source.start(layer.index, chunks, out, background=background)

    def wait(self) -> ReadCount:
        with self._errors():
            return ReadCount(self._pending.wait(), len(self._chunks))

    @contextmanager
    def _errors(self) -> Iterator[None]:
        layer = self._layer
        try:
            yield
        except OSError as error:
            raise StoreReadError(
                "reading neurons from flash failed",
                where=f"{layer.path}, layer {layer.index}",
                expected=f"{len(self._chunks.rows)} bundles of {layer.bundle_bytes} bytes",
                got=error.strerror or str(error),
                hint="check the disk and run `hf-flash inspect --check` on the folder",
            ) from error


@dataclass
class _Converting:
    """Reads bundles through a staging buffer, some rows at a time, during `wait`."""

    reader: BundleReader
    staging: torch.Tensor
    layer: int
    ids: Ids
    out: torch.Tensor
    rows: Ids

    def wait(self) -> ReadCount:
        total = ReadCount()
        for at in range(0, len(self.ids), len(self.staging)):
            part = self.ids[at : at + len(self.staging)]
            count = self.reader.start_here(self.layer, part, self.staging, np.arange(len(part))).wait()
            rows = torch.from_numpy(self.rows[at : at + len(part)])
            self.out.index_copy_(0, rows, self.staging[: len(part)].to(self.out.dtype))
            total.add(count)
        return total


class BundleReader:
    """Reads neurons into rows: coalesces, converts, counts.

    Args:
        store: the store that holds the bundles.
        source: its files, with the queue that reads them.
        dtype: the dtype of the rows that callers pass.
    """

    def __init__(self, store: FlashStore, source: FileSource, dtype: torch.dtype) -> None:
        self.layers, self.source = store.layers, source
        self.gap: int | None = None  # the most neurons that are read faster than skipped; measured when first needed
        self._pieces = 0  # how many reads a bundle is torn into; 0: neighbours are one read
        unit = store.unit
        self._staging = None if unit.dtype == dtype else aligned_empty((_STAGING_ROWS, unit.numbers), unit.dtype)
        self.buffer_bytes = source.buffer_bytes + _staging_bytes(unit, dtype)  # DRAM of its own

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def where(self) -> Path:
        """The folder of the files."""
        return self.layers[0].path.parent

    @property
    def reads_with(self) -> str:
        """How it reads, in words for users."""
        return self.source.reads_with

    def tear_bundles(self, *, parts: bool) -> None:
        """From now on read every bundle, or each of its `parts`, separately, to measure what coalescing and bundling save."""
        self._pieces = len(self.layers[0].unit.parts) if parts else 1

    @property
    def converts(self) -> bool:
        """Whether rows are converted after reading. Then reading begins only with `wait`."""
        return self._staging is not None

    def step_file(self, layer: int) -> StepFile | None:
        """What the compiled part needs to read rows of this layer by itself; `None` if it cannot."""
        return None if self.converts or self._pieces else self.source.step_file(layer)

    def start(self, layer: int, ids: Ids, out: torch.Tensor, rows: Ids, *, background: bool = False) -> Reading:
        """Begin to fill `out[rows[j]]` with the bundle of neuron `ids[j]`.

        Args:
            layer: index of the layer.
            ids: neurons, ascending.
            out: contiguous [any, unit.numbers] in the compute dtype.
            rows: different rows of `out`, as many as `ids`.
            background: whether the caller has something else to do before it waits.
        """
        return self.start_here(layer, ids, out, rows, background=background)

    def start_here(self, layer: int, ids: Ids, out: torch.Tensor, rows: Ids, *, background: bool = False) -> Reading:
        """The same, but always into rows in this machine's memory."""
        store = self.layers[layer]
        if self._staging is not None and out is not self._staging:
            return _Converting(self, self._staging, layer, ids, out, rows)
        if out.dtype != store.dtype:
            raise TypeError(f"the store holds {store.dtype}, the rows {out.dtype}")
        target: Bytes = out.view(torch.uint8).numpy()
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(target)):  # the kernel would write beyond `out`
            raise IndexError(f"rows from {rows.min()} to {rows.max()} of {len(target)}")
        if store.place is not None:
            at = store.place[ids].astype(np.int64)
            order = np.argsort(at)
            ids, rows = at[order], rows[order]
        return _Reading(store, self._chunks(store, ids, rows), self.source, target, background)

    def _chunks(self, store: LayerStore, places: Ids, rows: Ids) -> Chunks:
        if self._pieces:
            return torn(places, rows, store.offset, store.bundle_bytes, self._pieces)
        return chunked(places, rows, store.offset, store.bundle_bytes)

    def through_gaps(self, layer: int, ids: Ids, first: int, last: int, buffer: torch.Tensor) -> Ids:
        """`ids`, and the neurons between them on flash if reading these is faster than skipping them.

        Args:
            ids: neurons, ascending, from `first` to before `last`.
            buffer: unused rows in the compute dtype, overwritten if the gap has not been measured yet.
        """
        store = self.layers[layer]
        if self.gap is None:
            self.gap = self._measured_gap(store, buffer) if store.d_ff >= _SMALL else 0
        if not self.gap or len(ids) < 2:
            return ids
        at = ids
        if store.place is not None:
            placed = store.place[first:last]
            if placed.min() < first or placed.max() >= last:  # a store may have its neurons in any order
                return ids
            at = np.sort(placed[ids - first])
        steps = np.diff(at)
        lengths = np.append(np.where(steps <= self.gap + 1, steps, 1), 1)
        ends = np.cumsum(lengths)
        every: Ids = np.arange(ends[-1]) + np.repeat(at - (ends - lengths), lengths)
        return every if store.place is None else np.sort(np.argsort(placed)[every - first] + first)

    def _measured_gap(self, store: LayerStore, buffer: torch.Tensor) -> int:
        """How many bundles within a long read take the additional time of one separate read."""
        target: Bytes = (buffer if self._staging is None else self._staging).view(torch.uint8).numpy()
        many = min(len(target), store.d_ff)
        some = min(_SAMPLE, many, store.d_ff // 2)
        apart = store.d_ff // some

        def seconds(at: Ids) -> float:
            """Seconds per neuron. The first time is slower: the pages or the kernel's threads may be missing."""
            start = perf_counter()
            chunks = chunked(at, np.arange(len(at)), store.offset, store.bundle_bytes)
            _Reading(store, chunks, self.source, target, True).wait()  # as a prompt does
            return (perf_counter() - start) / len(at)

        together = min(seconds(np.arange(many) + turn * (store.d_ff - many) // 2) for turn in range(3))
        alone = min(seconds(np.arange(some) * apart + turn % apart) for turn in range(3))
        found = max(0, int((alone - together) / together))
        logger.info(
            "hf_flash: gaps of up to %d neurons are read through (%.1f us against %.1f)", found, 1e6 * alone, 1e6 * together
        )
        return found

    def settle(self) -> None:
        """Wait until no read that was ever started writes to memory any more."""
        self.source.settle()

    def forget(self) -> None:
        """The same after an interruption: drops all reads, none of which may be waited for afterwards."""
        self.source.forget()

    def close(self) -> None:
        self.source.close()


def _staging_bytes(unit: UnitLayout, dtype: torch.dtype) -> int:
    """Bytes of DRAM for conversion: the staging rows, and as many converted rows."""
    return 0 if unit.dtype == dtype else _STAGING_ROWS * (unit.row_bytes + unit.as_dtype(dtype).row_bytes)


# --- which way to read ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReaderKind:
    """A way to read that `FlashOffloadConfig(reader=...)` names.

    Attributes:
        may_be_direct: whether it may read past the page cache.
        caches_what_fits: whether it still uses the page cache for a store that fits in free memory.
    """

    may_be_direct: bool
    caches_what_fits: bool = False

    def wants_direct(self, nbytes: int, spare_bytes: int) -> bool:
        """Whether to read a store past the page cache.

        Args:
            nbytes: bytes of its bundles.
            spare_bytes: bytes of memory that nothing else claims.
        """
        return self.may_be_direct and not (self.caches_what_fits and nbytes <= spare_bytes)


READERS: Final[Mapping[str, ReaderKind]] = {
    AUTO: ReaderKind(may_be_direct=True, caches_what_fits=True),
    MMAP: ReaderKind(may_be_direct=False),
    DIRECT: ReaderKind(may_be_direct=True),
}
"""By name."""


def reader_buffer_bytes(unit: UnitLayout, dtype: torch.dtype, name: str, threads: int) -> int:
    """The most DRAM that a reader's own buffers take, known before a store exists.

    Args:
        unit: the layout of a unit on flash.
        dtype: the compute dtype.
        name, threads: as in [`open_reader`].
    """
    can_be_direct = READERS[name].may_be_direct and hasattr(os, "O_DIRECT")
    return _staging_bytes(unit, dtype) + (bounce_bytes(unit.row_bytes, threads, PAGE) if can_be_direct else 0)


def open_reader(store: FlashStore, name: str, threads: int, dtype: torch.dtype, spare_bytes: int) -> BundleReader:
    """Open the reader that `name` requests, for rows in this machine's memory (on a device: on_device.py).

    `"auto"` takes the page cache if the whole store fits into `spare_bytes`, bytes of memory that nothing else claims, and
    direct I/O otherwise. If the system does not offer direct I/O, it falls back to mmap and logs the reason once.

    Args:
        threads: how many threads read directly where io_uring cannot be used.
        dtype: the compute dtype, which the rows have.
    """
    return BundleReader(store, open_source(store, name, threads, spare_bytes), dtype)


def open_source(store: FlashStore, name: str, threads: int, spare_bytes: int) -> FileSource:
    """Open the files of a store with the reader that `name` requests; see [`open_reader`]."""
    return FileSource(store, chosen_alignment(store.layers[0].path, store.nbytes, name, spare_bytes), threads)


def chosen_alignment(path: Path, nbytes: int, name: str, spare_bytes: int) -> int:
    """The alignment of direct reads in bytes; 0: all files are read through the page cache.

    Args:
        path: one of the files.
        nbytes: total bytes that may be read.
        name, spare_bytes: as in [`open_reader`].
    """
    kind = READERS[name]
    direct = kind.wants_direct(nbytes, spare_bytes)
    align, refused = direct_alignment(path) if direct else (0, "")
    if kind.caches_what_fits:
        reason = refused or f"the store {'does not fit' if direct else 'fits'} in free memory"
        logger.info("hf_flash: reader %r takes %r: %s", name, DIRECT if align else MMAP, reason)
    elif refused:
        logger.warning("hf_flash: reader=%r falls back to %r: %s", name, MMAP, refused)
    return align
