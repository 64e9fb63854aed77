"""Reads by the compiled part: io_uring, or a few threads of its own."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import weakref
from functools import lru_cache
from typing import Final

import numpy as np

from hf_flash.base.arrays import Bytes, Ids
from hf_flash.compute import library as native
from hf_flash.reading.chunks import Chunks
from hf_flash.reading.open_file import FileChangedError, OpenFile, file_too_short

logger = logging.getLogger("hf_flash")

BOUNCE_BYTES: Final = 1 << 16  # BOUNCE_BYTES of native.h
_CHANGED, _SHORT, _FORGOTTEN = -1, -2, -3


class CompiledQueue:
    """Reads by the compiled part. Make it only if `native.library()` is not `None`.

    Args:
        threads: how many threads read where io_uring cannot be used.
        file: the file with which io_uring is tried.
        ring: whether to try io_uring at all.
        warn: whether to log that io_uring is missing, because that costs speed.
    """

    def __init__(self, threads: int, file: OpenFile, *, ring: bool = True, warn: bool = True) -> None:
        library = native.loaded()  # the caller has checked `library()` already
        assert library is not None
        self._library, self._kept = library, dict[int, Bytes]()
        self._targets = dict[int, Bytes]()  # memory that reads write to: it must outlive them
        self.reader: int | None = library.hf_reader_open(threads, ring, file.address)
        if not self.reader:
            raise MemoryError("no memory for reading")
        self.buffer_bytes = (threads + 1) * BOUNCE_BYTES
        self._threads, self._warn = threads, warn
        self._finalize = weakref.finalize(self, library.hf_reader_close, self.reader)
        self._look_for_ring()

    @property
    def has_ring(self) -> bool:
        """Whether io_uring works, as far as is known now."""
        return self.reader is not None and bool(self._library.hf_reader_has_ring(self.reader))

    @property
    def description(self) -> str:
        return "io_uring" if self.has_ring else f"{self._threads} threads"

    def _look_for_ring(self) -> None:
        """Log once that io_uring is missing, or stopped working."""
        if self._warn and not self.has_ring:
            self._warn = False
            _warn_no_ring(self._threads)

    def start(self, file: OpenFile, chunks: Chunks, out: Bytes, *, background: bool) -> tuple[int, int]:
        parts, base = chunks.parts, out.ctypes.data
        lengths = np.diff(parts, append=len(chunks.rows)) * chunks.size
        pieces = np.stack([base + chunks.rows[parts] * chunks.size, lengths], axis=1)
        first, offsets = np.searchsorted(parts, chunks.first), np.ascontiguousarray(chunks.offset, dtype=np.int64)
        self._targets[id(out)] = out
        return self._submit(file, offsets, first, pieces, background), id(out)

    def start_into(self, file: OpenFile, reads: Ids, memory: Bytes) -> tuple[int, int]:
        """Begin to fill parts of `memory`, contiguous, which this queue keeps alive; returns a ticket for `wait`.

        Args:
            reads: [n, 3] offset in the file, offset in `memory`, and number of bytes.
        """
        self._kept[memory.ctypes.data] = memory  # by address, since every read may pass a new view
        pieces = np.stack([memory.ctypes.data + reads[:, 1], reads[:, 2]], axis=1)
        return self._submit(file, np.ascontiguousarray(reads[:, 0]), np.arange(len(reads) + 1), pieces, True), 0

    def _submit(self, file: OpenFile, offsets: Ids, first: Ids, pieces: Ids, background: bool) -> int:
        order = native.Order(
            offsets.ctypes.data, first.ctypes.data, pieces.ctypes.data, len(offsets), background, native.threads()
        )  # fmt: skip
        ticket: int = self._library.hf_read_start(self.reader, file.address, ctypes.byref(order))
        if not ticket:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return ticket

    def wait(self, ticket: tuple[int, int]) -> None:
        error = self._library.hf_read_wait(self.reader, ticket[0])
        self._targets.pop(ticket[1], None)
        self.check(error)

    def check(self, error: int) -> None:
        """Raise the error that `hf_read_wait` returned; 0 is none."""
        if self._warn:
            self._look_for_ring()
        if error == _CHANGED:
            raise FileChangedError
        if error == _SHORT:
            raise file_too_short()
        if error:
            code = errno.ECANCELED if error == _FORGOTTEN else error
            raise OSError(code, os.strerror(code))

    def settle(self) -> None:
        if self.reader is not None:
            self._library.hf_read_settle(self.reader, 0)

    def forget(self) -> None:
        if self.reader is not None:
            self._library.hf_read_settle(self.reader, 1)
            self._targets.clear()

    def close(self) -> None:
        self.reader = None
        self._finalize()
        self._kept.clear()


@lru_cache
def _warn_no_ring(threads: int) -> None:
    logger.warning(
        "hf_flash: io_uring cannot be used here, and %d threads read instead, which costs some speed. In a container it is a "
        "matter of the seccomp profile: allow io_uring_setup and io_uring_enter. `hf-flash doctor` says what else is lacking",
        threads,
    )
