"""The source of bytes: the opened files of a store's layers, and a queue that reads them (reading/compiled_queue.py).

    mmap      through the page cache, which keeps as much as memory has room for. (The name dates from when the files were
              mapped. If somebody truncates a file, a lost page of a map kills the process; a read only fails.)
    direct    O_DIRECT, past the page cache, which leaves the memory to the model. Only a file that refuses it is read through
              the page cache. Without the compiled part all files are, and their pages are given back at once.

Reading has two steps, `start` and `wait`, so that something else can be computed in between.
"""

from __future__ import annotations

import logging
import mmap
import os
import weakref
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from hf_flash.base.arrays import Bytes
from hf_flash.base.buffers import allocate_pages
from hf_flash.base.locks import hold
from hf_flash.compute import library as native
from hf_flash.config_arguments import DIRECT, MMAP
from hf_flash.reading.chunks import Chunks
from hf_flash.reading.compiled_queue import BOUNCE_BYTES, CompiledQueue
from hf_flash.reading.open_file import FileChangedError, OpenFile
from hf_flash.reading.pages_queue import PagesQueue
from hf_flash.reading.queues import ReadQueue
from hf_flash.store.layer_file import LayerStore
from hf_flash.store.layout import FlashStore

logger = logging.getLogger("hf_flash")

PAGE: Final = mmap.PAGESIZE
_TRIES: Final = 3  # attempts to read a file that keeps changing


class StepFile(NamedTuple):
    """What the compiled part needs to read rows of one layer: the addresses of its reader and its file."""

    reader: int
    file: int
    unit: int  # the block size of reads in bytes: whole blocks are counted


class OpenFiles:
    """Opened files, and the queue that reads them. They are closed with this object.

    Args:
        align: the alignment of direct reads in bytes; 0: reads go through the page cache.
        threads: how many threads read directly where io_uring cannot be used.
        only_contents: as in [`OpenFile`].
    """

    def __init__(self, paths: Iterable[Path], align: int, threads: int, *, only_contents: bool = False) -> None:
        self.name = DIRECT if align else MMAP
        self._fds = list[int]()
        guard = weakref.finalize(self, close_files, self._fds)
        self.files = [open_for_reading(path, align, self._fds, only_contents=only_contents) for path in paths]
        self._queue = open_queue(self.files[0], threads, direct=align > 0)
        self._finalize = weakref.finalize(self, finish_reading, self._queue, self._fds)
        guard.detach()

    @property
    def reads_with(self) -> str:
        """How it reads, in words for users."""
        return self._queue.description if self.name == DIRECT else "the page cache"

    def settle(self) -> None:
        """Wait for every read that was started, whether anybody waits for it or not."""
        self._queue.settle()

    def forget(self) -> None:
        """Wait as `settle` does, and drop the results: none of these reads may be waited for afterwards."""
        self._queue.forget()

    def close(self) -> None:
        self._finalize()


class FileSource(OpenFiles):
    """The layer files of a store.

    Args:
        align, threads: as in [`OpenFiles`].
    """

    def __init__(self, store: FlashStore, align: int, threads: int) -> None:
        super().__init__([layer.path for layer in store.layers], align, threads)
        self._layers = store.layers
        self._units = [self._unit(file, layer) for file, layer in zip(self.files, store.layers, strict=True)]
        self.buffer_bytes = self._queue.buffer_bytes if max(self._units) > 1 and align else 0

    @staticmethod
    def _unit(file: OpenFile, layer: LayerStore) -> int:
        """The block size of reads in bytes: a page; for direct reads the alignment, or 1 if bundles are aligned."""
        if not file.align:
            return PAGE
        return file.align if (layer.offset | layer.bundle_bytes) % file.align else 1

    def start(self, layer: int, chunks: Chunks, out: Bytes, *, background: bool = False) -> Pending:
        """Begin to fill rows of `out`, uint8 [any, bundle bytes], contiguous.

        Args:
            background: whether the caller has something else to do before it waits.
        """
        ticket = self._queue.start(self.files[layer], chunks, out, background=background)
        return Pending(self, layer, chunks, out, ticket)

    def finish(self, pending: Pending) -> int:
        """Wait for a read; returns the bytes requested from the disk. Raises `OSError`."""
        file, layer, chunks = self.files[pending.layer], self._layers[pending.layer], pending.chunks
        for _ in range(_TRIES):
            try:
                self._queue.wait(pending.ticket)
                first, last = chunks.offset, chunks.offset + chunks.nbytes
                unit = self._units[pending.layer]
                return int((-(-last // unit) * unit - first // unit * unit).sum())
            except FileChangedError:
                file.verify(layer.crc32)
                pending.ticket = self._queue.start(file, chunks, pending.out, background=False)
        raise FileChangedError

    def step_file(self, layer: int) -> StepFile | None:
        """What the compiled part needs to read rows of this layer by itself; `None` without the compiled part."""
        if self._queue.reader is None:
            return None
        return StepFile(self._queue.reader, self.files[layer].address, self._units[layer])


@dataclass
class Pending:
    """A read under way."""

    source: FileSource
    layer: int
    chunks: Chunks
    out: Bytes
    ticket: Any

    def wait(self) -> int:
        """Wait until the buffer is filled; returns the bytes requested from the disk. Raises `OSError`."""
        return self.source.finish(self)


def open_for_reading(path: Path, align: int, fds: list[int], *, only_contents: bool = False) -> OpenFile:
    """Open a file for a queue to read.

    Args:
        align: the alignment of direct reads in bytes; 0: reads go through the page cache.
        fds: the file descriptor is added to this list, whose owner closes it.
        only_contents: as in [`OpenFile`].
    """
    compiled, fd = native.library() is not None, -1
    direct = align if compiled else 0
    if direct:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        except OSError as error:
            logger.warning("hf_flash: %s is read through the page cache: it refuses direct reads (%s)", path, error.strerror)
            direct = 0
    if fd < 0:
        fd = os.open(path, os.O_RDONLY)
    fds.append(fd)
    hold(fd)  # marks the file as used for as long as it is open
    if not direct and hasattr(os, "posix_fadvise"):
        with suppress(OSError):  # no readahead; this is only advice
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    return OpenFile(fd, direct, transient=not compiled and align > 0, only_contents=only_contents)


def open_queue(file: OpenFile, threads: int, *, direct: bool) -> ReadQueue:
    """Open the queue that reads opened files.

    Args:
        file: one of the files.
        threads: how many threads read directly where io_uring cannot be used.
        direct: whether files are read past the page cache, as far as possible.
    """
    if native.library() is not None:
        return CompiledQueue(threads, file, warn=direct)
    if not hasattr(os, "posix_fadvise"):
        logger.warning("hf_flash: this system has no posix_fadvise: pages are waited for one by one, which is slow")
    return PagesQueue()


def finish_reading(queue: ReadQueue, fds: list[int]) -> None:
    """Close the queue, then the files that it reads."""
    queue.close()
    close_files(fds)


def close_files(fds: list[int]) -> None:
    """Close files, and empty the list."""
    while fds:
        os.close(fds.pop())


def bounce_bytes(bundle_bytes: int, threads: int, align: int) -> int:
    """Bytes of DRAM for bounce buffers; none if the size of bundles is a multiple of the alignment."""
    return (threads + 1) * BOUNCE_BYTES if bundle_bytes % align else 0


def direct_alignment(path: Path) -> tuple[int, str]:
    """The alignment in bytes that O_DIRECT needs for a file, and ""; or 0, and the reason why direct I/O is impossible."""
    if not hasattr(os, "O_DIRECT") or not hasattr(os, "preadv"):
        return 0, "this system has no O_DIRECT"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        return 0, f"the file system of {path.parent} refuses O_DIRECT ({error.strerror})"
    try:
        page = memoryview(allocate_pages(2 * PAGE))
        for align in (512, 4096):
            try:
                if os.preadv(fd, [page[align : 2 * align]], align) == align:
                    return align, ""
            except OSError:
                continue
        return 0, f"direct reads of {path.parent} fail at 512 and at 4096 bytes"
    finally:
        os.close(fd)
