"""Where bytes come from: the three ways to read chunks of a store's files into rows of memory.

A *chunk* is one contiguous read: neighbours on flash, scattered over any rows of the caller's matrix.

    mmap      the store as a memory map. Pages are asked for (madvise WILLNEED) before any of them is touched, because a page
              fault per bundle is 28 times slower; then copied. Uses the page cache, so it is the fast one when the store
              fits in free memory. Works everywhere; without madvise the pages are faulted in. Where there is io_uring the
              compiled part reads the same pages with it (`ring`).
    direct    O_DIRECT, past the page cache: what memory there is stays with the model. All chunks of a layer go to the kernel
              in one call (io_uring, uring.py), or to a pool of threads where there is no io_uring. Bundles that are no
              multiple of what the disk aligns to go through a small bounce buffer, in threads.

Reading has two steps, `start` and `wait`, so that something else can be computed in between.
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
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from .inuse import hold
from .memory import anonymous
from .store import FlashStore
from .uring import Batch, Ring
from .window import Ids

logger = logging.getLogger("hf_flash")

PAGE: Final = mmap.PAGESIZE
_CHUNK_BYTES: Final = 1 << 20  # longer runs are split, so that they are read side by side
_CHUNK_ROWS: Final = 1024  # what the kernel scatters one read over at most
_BOUNCE_BYTES: Final = 1 << 16

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Chunks:
    """Contiguous reads of one layer's file.

    Chunk `i` starts at byte `offset[i]` and holds the bundles, of `size` bytes each, that go to rows
    `rows[first[i] : first[i + 1]]`.
    """

    offset: Ids  # [n]
    first: Ids  # [n + 1]
    rows: Ids  # [bundles]
    size: int

    def __len__(self) -> int:
        return len(self.offset)

    @property
    def nbytes(self) -> Ids:
        """[n]"""
        return np.diff(self.first) * self.size

    @property
    def parts(self) -> Ids:
        """[parts] where in `rows` a part of a chunk begins that lies together in memory, too."""
        if len(self) == len(self.rows):
            return self.first[:-1]
        begins = np.diff(self.rows, prepend=-2) != 1
        begins[self.first[:-1]] = True
        return np.flatnonzero(begins)

    def pieces(self, chunk: int, first: int = 0, last: int | None = None) -> Iterator[tuple[int, slice]]:
        """Byte offset in the file and rows in memory of the parts of a chunk that are contiguous in both.

        Args:
            first, last: of the chunk's bundles, from `first` to before `last` alone.
        """
        offset = int(self.offset[chunk]) + first * self.size
        rows = self.rows[self.first[chunk] : self.first[chunk + 1]][first:last]
        ends = [*(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
        start = 0
        for end in ends:
            row = int(rows[start])
            yield offset + start * self.size, slice(row, row + end - start)
            start = end


def chunked(ids: Ids, rows: Ids, offset: int, size: int) -> Chunks:
    """Chunks for neurons `ids`, ascending, that go to `rows`: as few as neighbourhood allows, none over 1 MiB much.

    Args:
        offset: where the file's bundles begin.
        size: bytes of a bundle.
    """
    longest = longest_chunk(size)
    at = np.arange(len(ids))
    begins = np.diff(ids, prepend=-2) != 1
    run_start = np.maximum.accumulate(np.where(begins, at, 0))
    first = np.flatnonzero((at - run_start) % longest == 0)
    return Chunks(offset + ids[first] * size, np.append(first, len(ids)), rows, size)


def longest_chunk(size: int) -> int:
    """The most bundles of `size` bytes that are one read."""
    return max(1, min(_CHUNK_ROWS, _CHUNK_BYTES // size))


class RingFile(NamedTuple):
    """What the compiled part reads rows of a layer with: an idle ring and a file."""

    ring: Ring
    fd: int
    unit: int  # bytes are read by so many at once, and counted so


class Pending(Protocol):
    """A read under way."""

    def wait(self) -> int:
        """Wait until nothing writes to the buffer any more; bytes asked of the disk. Raises `OSError`."""
        ...


class ByteReader(Protocol):
    """The part that differs: fetch chunks of one layer's file."""

    name: str
    means: str  # what it reads with
    buffer_bytes: int  # DRAM that it holds itself

    def start(self, layer: int, chunks: Chunks, out: Bytes, *, background: bool = False) -> Pending:
        """Begin to fill rows of `out`, uint8 [any, bundle bytes], contiguous.

        Args:
            background: there is something else to do before it is waited for.
        """
        ...

    def ring(self, layer: int) -> RingFile | None:
        """What the compiled part can read rows of this layer with, now. They have to be aligned to pages for direct I/O."""
        ...

    def settle(self) -> None:
        """Wait for every read that was started, whether anybody waits for it or not."""
        ...

    def close(self) -> None: ...


class MmapReader:
    """Through the page cache: a map whose pages are asked for before they are touched; or, by the compiled part, a ring."""

    name, means = "mmap", "the page cache"
    buffer_bytes = 0

    def __init__(self, store: FlashStore) -> None:
        self._maps: list[mmap.mmap] = []
        self._fds: list[int] = []
        self._finalize = weakref.finalize(self, _close, self._fds)
        self._ring: Ring | None = None
        self._pid = -1  # of the process whose ring it is: made when it is first asked for, as it does not survive a fork
        for layer in store.layers:
            with open(layer.path, "rb") as file:
                hold(file.fileno())  # for as long as the file is open or mapped
                self._fds.append(os.dup(file.fileno()))
                item = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._maps.append(item)
            if hasattr(mmap, "MADV_RANDOM"):
                item.madvise(mmap.MADV_RANDOM)
            if hasattr(os, "posix_fadvise"):
                with suppress(OSError):  # only advice: no readahead
                    os.posix_fadvise(self._fds[-1], 0, 0, os.POSIX_FADV_RANDOM)
        self._can_advise = hasattr(mmap, "MADV_WILLNEED")
        if not self._can_advise:
            logger.warning("hf_flash: this system has no madvise; the mmap reader faults pages in one by one, which is slow")

    def start(self, layer: int, chunks: Chunks, out: Bytes, *, background: bool = False) -> Pending:
        source = self._maps[layer]
        first = chunks.offset // PAGE * PAGE
        length = -(-(chunks.offset + chunks.nbytes) // PAGE) * PAGE - first
        if self._can_advise:
            for begin, nbytes in zip(first.tolist(), length.tolist(), strict=True):
                source.madvise(mmap.MADV_WILLNEED, begin, nbytes)
        return _Mapped(source, chunks, out, int(length.sum()))

    def ring(self, layer: int) -> RingFile | None:
        if self._pid != os.getpid():
            self._pid, self._ring = os.getpid(), _cached_ring(self._fds[0])
        return None if self._ring is None else RingFile(self._ring, self._fds[layer], PAGE)

    def settle(self) -> None:
        pass  # nothing is copied but in `wait`

    def close(self) -> None:
        self._ring = None
        self._finalize()
        for item in self._maps:
            item.close()
        self._maps = []


@dataclass
class _Mapped:
    """Pages that were asked for, to be copied."""

    source: mmap.mmap
    chunks: Chunks
    out: Bytes
    nbytes: int

    def wait(self) -> int:
        if self.source.size() < len(self.source):  # touching the lost pages would kill the process
            raise OSError(errno.EIO, "the file is shorter than when it was opened")
        first, size = self.chunks.first.tolist(), self.chunks.size
        out = self.out.reshape(-1, size)  # a view: rows are of the chunks' size
        for chunk, offset in enumerate(self.chunks.offset.tolist()):
            rows = self.chunks.rows[first[chunk] : first[chunk + 1]]
            out[rows] = np.frombuffer(self.source, np.uint8, len(rows) * size, offset).reshape(-1, size)
        return self.nbytes


class DirectReader:
    """O_DIRECT through io_uring, or threads.

    Args:
        threads: how many, where they are needed.
        align: what the disk wants offsets, lengths and addresses to be multiples of.
        uring: whether to try io_uring.
    """

    name = "direct"

    def __init__(self, store: FlashStore, threads: int, align: int, *, uring: bool = True) -> None:
        self._align, self._threads = align, threads
        self._ring: Ring | None = None
        self._futures: list[Future[int]] = []  # not known to be done
        self._fds: list[int] = []
        self._begin()
        for layer in store.layers:
            self._fds.append(os.open(layer.path, os.O_RDONLY | os.O_DIRECT))
            hold(self._fds[-1])
        self._base = [layer.offset for layer in store.layers]
        size = store.layers[0].bundle_bytes
        self.buffer_bytes = self.bounce_bytes(size, threads, align)
        self._uring, reason = uring and size % align == 0, "bundles are not aligned"
        if self._uring:
            try:
                self._ring = Ring()
            except OSError as error:
                self._uring, reason = False, error.strerror or str(error)
        self.means = "io_uring" if self._uring else f"{threads} threads"
        if uring and not self._uring:
            logger.info("hf_flash: no io_uring (%s); reading with %d threads", reason, threads)

    @staticmethod
    def bounce_bytes(bundle_bytes: int, threads: int, align: int) -> int:
        """DRAM for bounce buffers: none when bundles are aligned by themselves."""
        return (threads + 1) * _BOUNCE_BYTES if bundle_bytes % align else 0

    def start(self, layer: int, chunks: Chunks, out: Bytes, *, background: bool = False) -> Pending:
        if os.getpid() != self._pid:  # a forked worker: neither threads nor rings survive a fork
            self._finalize.detach()
            self._begin()
        fd, base = self._fds[layer], out.ctypes.data
        aligned = not (int(np.bitwise_or.reduce(chunks.offset, initial=chunks.size)) | base) & (self._align - 1)
        if self._uring and aligned and len(chunks):
            return self._start_ring(fd, chunks, out, base, background)
        job = _Job(fd, chunks, out, self._align if aligned else -self._align, self._bounce)
        lanes = min(self._threads, -(-len(chunks) // 2))
        self._futures = [future for future in self._futures if not future.done()]
        return _Lanes(job, [self._submit(job, lane, lanes) for lane in range(lanes)] if lanes > 1 else None)

    def _submit(self, job: _Job, lane: int, lanes: int) -> Future[int]:
        self._futures.append(self._pool.submit(job.run, lane, lanes))
        return self._futures[-1]

    def _start_ring(self, fd: int, chunks: Chunks, out: Bytes, base: int, background: bool) -> Pending:
        if self._ring is None:
            self._ring = Ring()
        keep: object = out
        parts = chunks.parts
        addresses, lengths = base + chunks.rows[parts] * chunks.size, np.diff(parts, append=len(chunks.rows)) * chunks.size
        vectored = len(parts) > len(chunks)
        if vectored:  # else a plain read each: the kernel looks at every piece of a vectored one
            iovecs, ends = np.stack([addresses, lengths], axis=1), np.searchsorted(parts, chunks.first)
            addresses, lengths, keep = iovecs.ctypes.data + iovecs.strides[0] * ends[:-1], np.diff(ends), (iovecs, out)
        batch = self._ring.read(fd, chunks.offset, addresses, lengths, keep, vectored=vectored, background=background)
        return _Ringed(batch, _Job(fd, chunks, out, self._align, self._bounce))

    def ring(self, layer: int) -> RingFile | None:
        if not (self._uring and self._ring is not None and self._ring.idle and os.getpid() == self._pid):
            return None
        return None if self._base[layer] % self._align else RingFile(self._ring, self._fds[layer], 1)

    def settle(self) -> None:
        _wait_for_all(self._futures)
        if self._ring is not None and os.getpid() == self._pid:
            self._ring.settle()

    def close(self) -> None:
        self._ring = None
        self._finalize()

    def _begin(self) -> None:
        self._pid, self._bounce, self._ring, self._futures = os.getpid(), threading.local(), None, []
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="hf_flash-read")  # starts them when needed
        # A model that is dropped closes its files. In a forked worker that is a copy of the list and of the descriptors.
        self._finalize: weakref.finalize[..., DirectReader] = weakref.finalize(self, _release, self._pool, self._fds)


@dataclass
class _Job:
    """Chunks to be read with blocking reads; `align` is negative where they are not aligned."""

    fd: int
    chunks: Chunks
    out: Bytes
    align: int
    bounce: threading.local

    def run(self, lane: int = 0, lanes: int = 1) -> int:
        return sum(map(self.read, range(lane, len(self.chunks), lanes)))

    def read(self, chunk: int) -> int:
        """Read one chunk; bytes asked of the disk."""
        if self.align < 0:
            return self._read_unaligned(chunk, -self.align)
        view, size, nbytes = self.out.reshape(-1).data, self.chunks.size, int(self.chunks.nbytes[chunk])
        views = [view[rows.start * size : rows.stop * size] for _, rows in self.chunks.pieces(chunk)]
        _read_exactly(self.fd, views, int(self.chunks.offset[chunk]), nbytes)
        return nbytes

    def _read_unaligned(self, chunk: int, align: int) -> int:
        """Read the aligned bytes around a chunk, a bounce buffer at a time, and copy the wanted ones."""
        bounce = getattr(self.bounce, "view", None)
        if bounce is None:
            bounce = self.bounce.view = memoryview(anonymous(_BOUNCE_BYTES))
        offset, total = int(self.chunks.offset[chunk]), 0
        end = offset + int(self.chunks.nbytes[chunk])
        while offset < end:
            first = offset // align * align
            length = min(_BOUNCE_BYTES, -(-(end - first) // align) * align)
            stop = min(end, first + length)
            _read_exactly(self.fd, [bounce[:length]], first, stop - first)
            self._scatter(chunk, bounce[offset - first : stop - first], offset)
            offset, total = stop, total + length
        return total

    def _scatter(self, chunk: int, data: memoryview, offset: int) -> None:
        """Copy the bytes at `offset` of the file to the rows of a chunk that they belong to."""
        view, size, end = self.out.reshape(-1).data, self.chunks.size, offset + len(data)
        begin = int(self.chunks.offset[chunk])
        for start, rows in self.chunks.pieces(chunk, (offset - begin) // size, -(-(end - begin) // size)):
            low, high = max(offset, start), min(end, start + (rows.stop - rows.start) * size)
            if low < high:
                target = rows.start * size - start
                view[target + low : target + high] = data[low - offset : high - offset]


@dataclass
class _Lanes:
    """Chunks that a pool of threads reads, or that are read when they are waited for."""

    job: _Job
    futures: list[Future[int]] | None

    def wait(self) -> int:
        if self.futures is None:
            return self.job.run()
        _wait_for_all(self.futures)
        return sum(future.result() for future in self.futures)


@dataclass
class _Ringed:
    """Chunks that the kernel reads."""

    batch: Batch
    job: _Job

    def wait(self) -> int:
        expected = self.job.chunks.nbytes
        for chunk in np.flatnonzero(self.batch.wait() != expected).tolist():
            self.job.read(chunk)  # interrupted, cut short or failed: once more, with an error that says why
        return int(expected.sum())


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
    _close(fds)


def _cached_ring(fd: int) -> Ring | None:
    """A ring for reads through the page cache, if those that find their pages there end at once on this file system.

    Elsewhere a few threads of the kernel do them, one by one; the map is faster then.
    """
    if not hasattr(os, "RWF_NOWAIT"):
        return None
    try:
        with suppress(BlockingIOError):  # the page is not there, but was looked for
            os.preadv(fd, [bytearray(1)], 0, os.RWF_NOWAIT)
        return Ring()
    except OSError as error:
        logger.info("hf_flash: no io_uring through the page cache (%s); a token copies from the map", error.strerror or error)
        return None


def _close(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())


def _read_exactly(fd: int, views: list[memoryview], offset: int, needed: int) -> None:
    """Read until at least `needed` bytes have come; the last sector of a file may be shorter than `views`."""
    got = os.preadv(fd, views, offset)
    while got < needed:
        skip, rest = got, []
        for view in views:
            rest += [view[skip:]] if skip < len(view) else []
            skip = max(0, skip - len(view))
        more = os.preadv(fd, rest, offset + got)
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
