"""Queues of reads: chunks of open files into rows of memory, while the caller does something else.

    CompiledQueue    by the compiled part (_native_read.h): io_uring, or a few threads of its own
    PagesQueue       by Python, through the page cache, where there is no compiled part

Both keep these promises, which the layers above rely on:

    a signal may interrupt the caller anywhere: nothing hangs, and `forget` makes the queue as good as new
    after `settle`, `forget` or `close` nothing writes to memory any more
    a forked process goes on with a queue of its own; what its parent has under way is none of it
    a file that changed since it was opened is noticed when its reads are waited for
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import weakref
import zlib
from contextlib import suppress
from functools import lru_cache
from typing import Any, Final, NamedTuple, Protocol

import numpy as np

from . import native
from .chunks import Bytes, Chunks
from .memory import anonymous

logger = logging.getLogger("hf_flash")

BOUNCE_BYTES: Final = 1 << 16  # BOUNCE_BYTES of _native_read.h
_CHANGED, _SHORT, _FORGOTTEN = -1, -2, -3
_VERIFIED_BYTES: Final = 1 << 20
_LARGEST_HEADER: Final = 1 << 27


class FileChangedError(OSError):
    """The file is not what it was when it was opened: what was read may be of either."""

    def __init__(self) -> None:
        super().__init__(errno.ESTALE, "the file was changed since the model was loaded")


def _short() -> OSError:
    return OSError(errno.EIO, "end of file: the file is shorter than when it was opened")


class OpenFile:
    """A file that is open for reading, and what it was then.

    Args:
        fd: open; its owner closes it.
        align: what offsets, lengths and addresses of a direct read have to be multiples of; 0: through the page cache.
        transient: whether pages in the page cache are given back when they were read.
    """

    def __init__(self, fd: int, align: int, *, transient: bool = False) -> None:
        self.fd, self.align, self.transient = fd, align, transient
        nowait = not align and _takes_nowait(fd)
        self.state = native.File(fd=fd, align=align, nowait=nowait)  # of the compiled part, which changes `nowait`
        self._set(_identity(fd))

    @property
    def address(self) -> int:
        return ctypes.addressof(self.state)

    @property
    def changed(self) -> bool:
        """Whether somebody wrote to the file or its inode since it was opened or last verified."""
        return _identity(self.fd) != self._known

    def verify(self, crc32: str) -> None:
        """Accept the file as it is now, if its data still has this checksum.

        Raises:
            FileChangedError: it has another one, or changes all the time.
        """
        for _ in range(3):
            now = _identity(self.fd)
            if _crc_of_data(self.fd) != crc32:
                break
            if _identity(self.fd) == now:
                self._set(now)
                return
        raise FileChangedError

    def _set(self, known: tuple[int, int, int]) -> None:
        self._known = known
        self.state.size, modified, changed = known
        self.state.modified_s, self.state.modified_ns = divmod(modified, 10**9)
        self.state.changed_s, self.state.changed_ns = divmod(changed, 10**9)


def _identity(fd: int) -> tuple[int, int, int]:
    found = os.fstat(fd)
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _takes_nowait(fd: int) -> bool:
    """Whether a read through the page cache can be asked to return only what is there."""
    try:
        os.preadv(fd, [bytearray(1)], 0, os.RWF_NOWAIT)
    except BlockingIOError:  # the page is not there, but was looked for
        return True
    except (OSError, AttributeError):
        return False
    return True


def _crc_of_data(fd: int) -> str:
    """CRC-32 of what is behind the header of a safetensors file; any text if it has no header any more."""
    room, crc, at = memoryview(anonymous(_VERIFIED_BYTES)), 0, 0
    header = 0
    while got := _into(fd, [room], at):
        if not at:
            header = 8 + int.from_bytes(room[:8], "little")
            if header > _LARGEST_HEADER:
                return "no header"
        crc = zlib.crc32(room[min(max(0, header - at), got) : got], crc)
        at += got
        if got % 4096:
            break  # the end, or a direct read could not go on
    return f"{crc:08x}"


class ReadQueue(Protocol):
    """What both queues do."""

    buffer_bytes: int  # the most DRAM that it takes for reads that are not aligned
    reader: int | None  # of the compiled part, which may also be given reads by its own functions; `None`: there is none

    @property
    def description(self) -> str:
        """What it reads with, for people."""
        ...

    def start(self, file: OpenFile, chunks: Chunks, out: Bytes, *, background: bool) -> Any:
        """Begin to fill rows of `out`, uint8 [any, bytes of a bundle], contiguous; returns a ticket for `wait`."""
        ...

    def wait(self, ticket: Any) -> None:
        """Wait for the reads of a ticket. Raises `OSError`, and [`FileChangedError`] after which they are to be read again."""
        ...

    def settle(self) -> None:
        """Wait until nothing writes to memory any more. Tickets stay good."""
        ...

    def forget(self) -> None:
        """The same, and tickets are worth nothing afterwards."""
        ...

    def close(self) -> None: ...


class CompiledQueue:
    """Reads by the compiled part. To be made only where there is a `native.library()`.

    Args:
        threads: how many read where io_uring does not.
        file: io_uring is tried with it.
        ring: whether to try io_uring at all. warn: whether it costs speed to do without.
    """

    def __init__(self, threads: int, file: OpenFile, *, ring: bool = True, warn: bool = True) -> None:
        library = native.library()
        assert library is not None
        self._library, self._targets = library, dict[int, Bytes]()  # what is written to: it must outlive the reads
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
        """Say once that there is no io_uring, or none any more."""
        if self._warn and not self.has_ring:
            self._warn = False
            _warn_no_ring(self._threads)

    def start(self, file: OpenFile, chunks: Chunks, out: Bytes, *, background: bool) -> tuple[int, int]:
        parts, base = chunks.parts, out.ctypes.data
        lengths = np.diff(parts, append=len(chunks.rows)) * chunks.size
        pieces = np.stack([base + chunks.rows[parts] * chunks.size, lengths], axis=1)
        first, offsets = np.searchsorted(parts, chunks.first), np.ascontiguousarray(chunks.offset, dtype=np.int64)
        order = native.Order(offsets.ctypes.data, first.ctypes.data, pieces.ctypes.data, len(offsets), background)
        self._targets[id(out)] = out
        ticket: int = self._library.hf_read_start(self.reader, file.address, ctypes.byref(order))
        if not ticket:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return ticket, id(out)

    def wait(self, ticket: tuple[int, int]) -> None:
        error = self._library.hf_read_wait(self.reader, ticket[0])
        self._targets.pop(ticket[1], None)
        if self._warn:
            self._look_for_ring()
        if error == _CHANGED:
            raise FileChangedError
        if error == _SHORT:
            raise _short()
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


@lru_cache
def _warn_no_ring(threads: int) -> None:
    logger.warning(
        "hf_flash: io_uring cannot be used here, and %d threads read instead, which costs some speed. In a container it is a "
        "matter of the seccomp profile: allow io_uring_setup and io_uring_enter. `hf-flash doctor` says what else is lacking",
        threads,
    )


class PagesQueue:
    """Reads by Python alone, through the page cache: what is there is copied at once, the rest asked for, and copied later.

    A pool of threads would be slower: each read costs a hand-over of the interpreter. Pages of a file that is to be read
    directly are given back as soon as they are copied. Nothing goes on behind the caller's back, so nothing has to be settled.
    """

    buffer_bytes, description = 0, "the page cache"
    reader: int | None = None

    def start(self, file: OpenFile, chunks: Chunks, out: Bytes, *, background: bool) -> _Copying:
        view, size = out.reshape(-1).data, chunks.size
        reads = [
            _Read(offset, nbytes, [view[rows.start * size : rows.stop * size] for rows in parts])
            for (offset, parts), nbytes in zip(chunks.pieces(), chunks.nbytes.tolist(), strict=True)
        ]
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
    """What is still to be copied."""

    file: OpenFile
    reads: list[_Read]


def _read_at_once(fd: int, read: _Read) -> bool:
    """Copy what is in the page cache, if all of it is."""
    if not (hasattr(os, "preadv") and hasattr(os, "RWF_NOWAIT")):
        return False
    try:
        return os.preadv(fd, read.views, read.offset, os.RWF_NOWAIT) == read.nbytes
    except OSError:  # some of it is not there, or this file system cannot tell
        return False


def _advise(fd: int, reads: list[_Read], advice: str) -> None:
    if (number := getattr(os, advice, None)) is None or not hasattr(os, "posix_fadvise"):
        return
    for read in reads:
        with suppress(OSError):  # it is only advice
            os.posix_fadvise(fd, read.offset, read.nbytes, number)


def _read_exactly(fd: int, views: list[memoryview], offset: int, needed: int) -> None:
    """Fill `views`, which take `needed` bytes, from `offset` on."""
    while needed:
        got = _into(fd, views, offset)
        if got <= 0:
            raise _short()
        offset, needed = offset + got, needed - got
        while views and got >= len(views[0]):
            got -= len(views.pop(0))
        if views:
            views[0] = views[0][got:]


def _into(fd: int, views: list[memoryview], offset: int) -> int:
    """`preadv`, where the system has it."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, views, offset)
    os.lseek(fd, offset, os.SEEK_SET)
    data = os.read(fd, len(views[0]))
    views[0][: len(data)] = data
    return len(data)
