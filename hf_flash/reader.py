"""Readers: how bundles get from flash into a caller's buffer.

A reader is asked for neurons (sorted ids) and told the rows they go to. Neighbours, on flash and in the target, become one
*chunk*: one contiguous read.

    mmap     the store as a memory map. Pages are asked for (madvise WILLNEED) before any of them is touched, because a page
             fault per bundle is 28 times slower; then copied. Uses the page cache, so it is the fast one when the store
             fits in free memory. Works everywhere; without madvise the pages are faulted in.
    direct   O_DIRECT reads by a pool of threads, past the page cache: what memory there is stays with the model. Chunks
             whose offset, length or target is not aligned go through a small bounce buffer.

When the dtype of compute differs from the store's, rows are read into a staging buffer and converted on the way.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import torch

from .errors import StoreReadError
from .memory import aligned_empty, anonymous
from .store import FlashStore, LayerStore
from .window import Ids

logger = logging.getLogger("hf_flash")

PAGE: Final = mmap.PAGESIZE
_CHUNK_BYTES: Final = 1 << 20  # longer runs are split, so that several threads share them
_BOUNCE_BYTES: Final = 1 << 16
_STAGING_ROWS: Final = 128


@dataclass(frozen=True)
class Chunk:
    """One contiguous read: `nbytes` at `offset` of the layer's file, to byte `target` of the caller's buffer."""

    offset: int
    nbytes: int
    target: int


@dataclass
class ReadCount:
    """What a read cost: bytes asked of the disk, rounding included, and the number of chunks."""

    nbytes: int = 0
    chunks: int = 0


class ByteReader(Protocol):
    """The part that differs: fetch chunks of one layer's file into a byte buffer."""

    name: str
    buffer_bytes: int  # DRAM that it holds itself

    def fetch(self, layer: int, chunks: list[Chunk], buffer: memoryview) -> ReadCount: ...
    def close(self) -> None: ...


class BundleReader:
    """Neurons in, rows out: coalesces, converts, counts.

    Args:
        store: where the bundles lie.
        source: how bytes get into memory.
        dtype: dtype of the rows that callers pass.
    """

    def __init__(self, store: FlashStore, source: ByteReader, dtype: torch.dtype) -> None:
        self.layers, self.source = store.layers, source
        first = store.layers[0]
        self._staging = None if first.dtype == dtype else aligned_empty((_STAGING_ROWS, 2 * first.d_model), first.dtype)
        self.buffer_bytes = source.buffer_bytes + _staging_bytes(first.d_model, first.dtype, dtype)  # DRAM of its own

    @property
    def name(self) -> str:
        return self.source.name

    def read(self, layer: int, ids: Ids, out: torch.Tensor, rows: Ids) -> ReadCount:
        """Fill `out[rows[j]]` with the bundle of neuron `ids[j]`.

        Args:
            layer: index of the layer.
            ids: neurons, ascending.
            out: contiguous [any, 2 * d_model] in the dtype of compute.
            rows: ascending rows of `out`, as many as `ids`.

        Raises:
            StoreReadError: the disk failed, or the file is shorter than it was.
        """
        if self._staging is None:
            return self._read_rows(self.layers[layer], ids, out, rows)
        total = ReadCount()
        for at in range(0, len(ids), len(self._staging)):
            part = ids[at : at + len(self._staging)]
            count = self._read_rows(self.layers[layer], part, self._staging, np.arange(len(part)))
            out.index_copy_(0, torch.from_numpy(rows[at : at + len(part)]), self._staging[: len(part)].to(out.dtype))
            total.nbytes += count.nbytes
            total.chunks += count.chunks
        return total

    def _read_rows(self, layer: LayerStore, ids: Ids, out: torch.Tensor, rows: Ids) -> ReadCount:
        chunks = list(coalesce(ids, rows, layer.offset, layer.bundle_bytes))
        buffer = memoryview(out.view(-1).view(torch.uint8).numpy().data)
        try:
            return self.source.fetch(layer.index, chunks, buffer)
        except OSError as error:
            raise StoreReadError(
                "reading neurons from flash failed",
                where=f"{layer.path}, layer {layer.index}",
                expected=f"{len(ids)} bundles of {layer.bundle_bytes} bytes",
                got=error.strerror or str(error),
                hint="check the disk and run `hf-flash inspect --check` on the folder",
            ) from error

    def close(self) -> None:
        self.source.close()


def _staging_bytes(d_model: int, stored: torch.dtype, dtype: torch.dtype) -> int:
    """DRAM that converting on the way takes: the staging rows, and as many converted ones."""
    return 0 if stored == dtype else _STAGING_ROWS * 2 * d_model * (stored.itemsize + dtype.itemsize)


def coalesce(ids: Ids, rows: Ids, offset: int, bundle_bytes: int) -> Iterator[Chunk]:
    """Chunks for neurons `ids` that go to `rows`: as few as the neighbourhoods allow, none over `_CHUNK_BYTES` much."""
    if not len(ids):
        return
    longest = max(1, _CHUNK_BYTES // bundle_bytes)
    breaks = np.flatnonzero((np.diff(ids) != 1) | (np.diff(rows) != 1)) + 1
    starts = np.concatenate(([0], breaks)).tolist()
    for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
        for at in range(start, stop, longest):
            n = min(longest, stop - at)
            yield Chunk(offset + int(ids[at]) * bundle_bytes, n * bundle_bytes, int(rows[at]) * bundle_bytes)


class MmapReader:
    """Through the page cache, pages asked for before they are touched."""

    name = "mmap"
    buffer_bytes = 0

    def __init__(self, store: FlashStore) -> None:
        self._maps: list[mmap.mmap] = []
        for layer in store.layers:
            with open(layer.path, "rb") as file:
                item = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._maps.append(item)
            if hasattr(mmap, "MADV_RANDOM"):
                item.madvise(mmap.MADV_RANDOM)
        self._can_advise = hasattr(mmap, "MADV_WILLNEED")
        if not self._can_advise:
            logger.warning("hf_flash: this system has no madvise; the mmap reader faults pages in one by one, which is slow")

    def fetch(self, layer: int, chunks: list[Chunk], buffer: memoryview) -> ReadCount:
        source, count = self._maps[layer], ReadCount(chunks=len(chunks))
        if source.size() < len(source):  # touching the lost pages would kill the process
            raise OSError(errno.EIO, "the file is shorter than when it was opened")
        for chunk in chunks:
            first = chunk.offset // PAGE * PAGE
            length = -(-(chunk.offset + chunk.nbytes) // PAGE) * PAGE - first
            count.nbytes += length
            if self._can_advise:
                source.madvise(mmap.MADV_WILLNEED, first, length)
        view = memoryview(source)
        for chunk in chunks:
            buffer[chunk.target : chunk.target + chunk.nbytes] = view[chunk.offset : chunk.offset + chunk.nbytes]
        return count

    def close(self) -> None:
        for item in self._maps:
            item.close()
        self._maps = []


class DirectReader:
    """O_DIRECT, several threads. `align` is what the disk wants offsets, lengths and addresses to be multiples of."""

    name = "direct"

    def __init__(self, store: FlashStore, threads: int, align: int) -> None:
        self._align = align
        self._fds = [os.open(layer.path, os.O_RDONLY | os.O_DIRECT) for layer in store.layers]
        self._threads = threads
        self._start_threads()
        self.buffer_bytes = self.bounce_bytes(store.layers[0].bundle_bytes, threads, align)

    @staticmethod
    def bounce_bytes(bundle_bytes: int, threads: int, align: int) -> int:
        """DRAM for bounce buffers: none when bundles are aligned by themselves."""
        return (threads + 1) * _BOUNCE_BYTES if bundle_bytes % align else 0

    def fetch(self, layer: int, chunks: list[Chunk], buffer: memoryview) -> ReadCount:
        if os.getpid() != self._pid:  # a forked worker: threads do not survive a fork
            self._finalize.detach()
            self._start_threads()
        fd, base = self._fds[layer], np.frombuffer(buffer, dtype=np.uint8).ctypes.data
        lanes = min(self._threads, -(-len(chunks) // 2))
        if lanes <= 1:
            nbytes = self._fetch_lane(fd, chunks, buffer, base)
        else:
            jobs: list[Future[int]] = []
            try:
                for i in range(lanes):
                    jobs.append(self._pool.submit(self._fetch_lane, fd, chunks[i::lanes], buffer, base))
            finally:
                _wait_for_all(jobs)
            nbytes = sum(job.result() for job in jobs)
        return ReadCount(nbytes, len(chunks))

    def _fetch_lane(self, fd: int, chunks: list[Chunk], buffer: memoryview, base: int) -> int:
        mask, total = self._align - 1, 0
        for chunk in chunks:
            if (chunk.offset | chunk.nbytes | (base + chunk.target)) & mask:
                total += self._fetch_unaligned(fd, chunk, buffer)
            else:
                _read_exactly(fd, buffer[chunk.target : chunk.target + chunk.nbytes], chunk.offset, chunk.nbytes)
                total += chunk.nbytes
        return total

    def _fetch_unaligned(self, fd: int, chunk: Chunk, buffer: memoryview) -> int:
        """Read the aligned bytes around a chunk, a bounce buffer at a time, and copy the wanted ones."""
        bounce = getattr(self._bounce, "view", None)
        if bounce is None:
            bounce = self._bounce.view = memoryview(anonymous(_BOUNCE_BYTES))
        offset, end, total = chunk.offset, chunk.offset + chunk.nbytes, 0
        while offset < end:
            first = offset // self._align * self._align
            length = min(_BOUNCE_BYTES, -(-(end - first) // self._align) * self._align)
            stop = min(end, first + length)
            _read_exactly(fd, bounce[:length], first, stop - first)
            target = chunk.target + offset - chunk.offset
            buffer[target : target + stop - offset] = bounce[offset - first : stop - first]
            offset, total = stop, total + length
        return total

    def close(self) -> None:
        self._finalize()

    def _start_threads(self) -> None:
        self._pid = os.getpid()
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="hf_flash-read")
        self._bounce = threading.local()
        # A model that is dropped closes its files. In a forked worker that is a copy of the list and of the descriptors.
        self._finalize = weakref.finalize(self, _release, self._pool, self._fds)


def _wait_for_all(jobs: list[Future[int]]) -> None:
    """Wait until no job writes to its buffer any more, however often the user interrupts."""
    interrupted: BaseException | None = None
    while True:
        try:
            wait(jobs)
            break
        except KeyboardInterrupt as error:
            interrupted = error
    if interrupted is not None:
        raise interrupted


def _release(pool: ThreadPoolExecutor, fds: list[int]) -> None:
    """End the threads, then close what they read from."""
    pool.shutdown()
    while fds:
        os.close(fds.pop())


def _read_exactly(fd: int, view: memoryview, offset: int, needed: int) -> None:
    """Read until at least `needed` bytes have come; the last sector of a file may be shorter than `view`."""
    got = os.preadv(fd, [view], offset)
    while got < needed:
        more = os.preadv(fd, [view[got:]], offset + got)
        if more <= 0:
            raise OSError(errno.EIO, f"end of file after {offset + got} bytes: the file is shorter than when it was opened")
        got += more


def direct_alignment(store: FlashStore) -> tuple[int, str]:
    """The alignment O_DIRECT needs for this store, or 0 and the reason why there is no direct I/O."""
    if not hasattr(os, "O_DIRECT") or not hasattr(os, "preadv"):
        return 0, "this system has no O_DIRECT"
    path = store.layers[0].path
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        return 0, f"the file system of {path.parent} refuses O_DIRECT ({error.strerror})"
    try:
        page = memoryview(anonymous(2 * PAGE))
        for align in (512, 4096):
            try:
                if os.preadv(fd, [page[align : 2 * align]], align) == align:
                    return align, ""
            except OSError:
                continue
        return 0, f"direct reads of {path.parent} fail at 512 and at 4096 bytes"
    finally:
        os.close(fd)


def reader_buffer_bytes(d_model: int, stored: torch.dtype, dtype: torch.dtype, name: str, threads: int) -> int:
    """The most DRAM that a reader's own buffers take, known before a store exists.

    Args:
        d_model: half the width of a bundle.
        stored: dtype on flash. `dtype`: of compute.
        name, threads: as in [`open_reader`].
    """
    staging = _staging_bytes(d_model, stored, dtype)
    can_be_direct = name != "mmap" and hasattr(os, "O_DIRECT")
    return staging + (DirectReader.bounce_bytes(2 * d_model * stored.itemsize, threads, PAGE) if can_be_direct else 0)


def open_reader(store: FlashStore, name: str, threads: int, dtype: torch.dtype, spare_bytes: int) -> BundleReader:
    """Open the reader that `name` asks for.

    `"auto"` takes the page cache when the whole store fits in `spare_bytes`, memory that nobody else claims, and direct I/O
    otherwise. Direct I/O that the system does not offer falls back to mmap and says why, once.
    """
    source: ByteReader
    align, reason = direct_alignment(store) if name != "mmap" else (0, "")
    if name == "auto" and store.nbytes <= spare_bytes:
        source, reason = MmapReader(store), "the store fits in free memory"
    elif align:
        source = DirectReader(store, threads, align)
    else:
        source = MmapReader(store)
        if name == "direct":
            logger.warning("hf_flash: reader='direct' falls back to 'mmap': %s", reason)
    if name == "auto":
        logger.info("hf_flash: reader 'auto' takes %r: %s", source.name, reason or "the store does not fit in free memory")
    return BundleReader(store, source, dtype)
