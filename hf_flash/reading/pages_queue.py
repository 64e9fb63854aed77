"""Reads by Python alone, through the page cache, for use without the compiled part."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import NamedTuple

from hf_flash.base.arrays import Bytes, Ids
from hf_flash.base.files import read_at
from hf_flash.reading.chunks import Chunks
from hf_flash.reading.open_file import (
    FileChangedError,
    OpenFile,
    file_too_short,
)


class PagesQueue:
    """Reads by Python alone, through the page cache: cached reads are copied at once, the others requested and copied later.

    A pool of threads would be slower: each read costs a hand-over of the interpreter's lock. Pages of a file that should be
    read directly are given back as soon as they are copied. No read goes on in the background, so nothing has to be settled.
    """

    buffer_bytes, description = 0, "the page cache"
    reader: int | None = None

    def start(self, file: OpenFile, chunks: Chunks, out: Bytes, *, background: bool) -> _Copying:
        view, size = out.reshape(-1).data, chunks.size
        reads = [
            _Read(offset, nbytes, [view[rows.start * size : rows.stop * size] for rows in parts])
            for (offset, parts), nbytes in zip(chunks.pieces(), chunks.nbytes.tolist(), strict=True)
        ]
        return self._start(file, reads)

    def start_into(self, file: OpenFile, reads: Ids, memory: Bytes) -> _Copying:
        """Begin to fill parts of `memory`, contiguous; returns a ticket for `wait`.

        Args:
            reads: [n, 3] offset in the file, offset in `memory`, and number of bytes.
        """
        view = memory.data
        return self._start(file, [_Read(offset, size, [view[at : at + size]]) for offset, at, size in reads.tolist()])

    def _start(self, file: OpenFile, reads: list[_Read]) -> _Copying:
        if not file.transient:
            reads = [read for read in reads if not _read_at_once(file.fd, read)]
        _advise(file.fd, reads, "POSIX_FADV_WILLNEED")
        return _Copying(file, reads)

    def wait(self, ticket: _Copying) -> None:
        file, reads = ticket
        for read in reads:
            _read_exactly(file.fd, list(read.views), read.offset, read.nbytes)
        if file.transient:
            _advise(file.fd, reads, "POSIX_FADV_DONTNEED")
        if file.changed:
            raise FileChangedError

    def check(self, error: int) -> None:
        pass

    def settle(self) -> None:
        pass

    def forget(self) -> None:
        pass

    def close(self) -> None:
        pass


class _Read(NamedTuple):
    offset: int
    nbytes: int
    views: list[memoryview]


class _Copying(NamedTuple):
    """Reads that are still to be copied."""

    file: OpenFile
    reads: list[_Read]


def _read_at_once(fd: int, read: _Read) -> bool:
    """Copy a read from the page cache; returns whether all of it was there."""
    if not (hasattr(os, "preadv") and hasattr(os, "RWF_NOWAIT")):
        return False
    try:
        return os.preadv(fd, read.views, read.offset, os.RWF_NOWAIT) == read.nbytes
    except OSError:  # it is not cached, or this file system cannot tell
        return False


def _advise(fd: int, reads: list[_Read], advice: str) -> None:
    if (number := getattr(os, advice, None)) is None or not hasattr(os, "posix_fadvise"):
        return
    for read in reads:
        with suppress(OSError):  # it is only advice
            os.posix_fadvise(fd, read.offset, read.nbytes, number)


def _read_exactly(fd: int, views: list[memoryview], offset: int, needed: int) -> None:
    """Fill `views`, `needed` bytes in total, from `offset` of the file on."""
    while needed:
        got = read_at(fd, views, offset)
        if got <= 0:
            raise file_too_short()
        offset, needed = offset + got, needed - got
        while views and got >= len(views[0]):
            got -= len(views.pop(0))
        if views:
            views[0] = views[0][got:]
