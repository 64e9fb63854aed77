"""io_uring: many reads in one system call (Linux 5.9 and later), without a line of C.

A ring is memory shared with the kernel: an array of submission entries, which this process fills, and a queue of
completions, which the kernel fills. Both are seen as numpy arrays, so that a batch of reads costs a few vector operations
and one system call, whatever its size; a pool of threads pays 5-10 microseconds of Python per read and fights for the
interpreter. The three system calls have no wrapper in libc and go through `syscall`.

Memory order: an entry is complete before `io_uring_enter` is called by the same thread, and a completion is looked at
after that call returned; both calls are barriers. (No kernel thread polls the ring: that is an option, not used.)
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
import threading
import weakref
from typing import Final

import numpy as np
import numpy.typing as npt

_SETUP, _ENTER = 425, 426  # the same numbers on every architecture
_OFF_SQES: Final = 0x10000000
_GETEVENTS: Final = 1
_NEEDED: Final = 1 | 2 | 8 | 64  # one mapping for both rings, no dropped completions, plain READ: Linux 5.6
# (64 is for something else, but new in 5.9, where a read that finds half of its pages in the page cache began to bring all.)
_READ, _READV = 22, 1
_ASYNC: Final = 16  # an entry's flag: let a kernel thread do it from the start
_RETRY: Final = (errno.EINTR, errno.EAGAIN, errno.EBUSY)

Longs = npt.NDArray[np.int64]

_PARAMS: Final = np.dtype([("sq_entries", "u4"), ("cq_entries", "u4"), ("flags", "u4"), ("cpu", "u4"), ("idle", "u4"),
    ("features", "u4"), ("wq_fd", "u4"), ("pad", "u4", 3), ("sq", "u4", 8), ("sq_addr", "u8"), ("cq", "u4", 8),
    ("cq_addr", "u8")])  # fmt: skip
_ENTRY: Final = np.dtype([("opcode", "u1"), ("flags", "u1"), ("priority", "u2"), ("fd", "i4"), ("offset", "u8"),
    ("address", "u8"), ("length", "u4"), ("rw_flags", "u4"), ("user_data", "u8"), ("rest", "u8", 3)])  # fmt: skip
_COMPLETION: Final = np.dtype([("user_data", "u8"), ("result", "i4"), ("flags", "u4")])


class Batch:
    """Reads that were submitted together. `results` [n]: bytes read, or minus the error number, of each."""

    def __init__(self, ring: Ring, entries: npt.NDArray[np.void], keep: object) -> None:
        self.ring, self.entries, self.keep = ring, entries, keep  # `keep`: memory the kernel still reads or writes
        self.results = np.zeros(len(entries), dtype=np.int64)
        self.submitted = self.done = 0

    def wait(self) -> Longs:
        """Wait for all of them, however often the user interrupts; then raise the interruption."""
        interrupted: BaseException | None = None
        while self.done < len(self.entries):
            try:
                self.ring.advance(self)
            except KeyboardInterrupt as error:
                interrupted = error
        self.keep = None
        if interrupted is not None:
            raise interrupted
        return self.results


class Ring:
    """One ring. Threads may share it; a forked process must make its own. Closed when it is dropped.

    Raises:
        OSError: there is no io_uring here: another system, an old kernel, or a container that forbids it.
    """

    def __init__(self, entries: int = 1024) -> None:
        if not sys.platform.startswith("linux"):
            raise OSError(errno.ENOSYS, "io_uring is Linux only")
        params = np.zeros(1, _PARAMS)
        self._libc = ctypes.CDLL(None, use_errno=True)
        fd = self._call(_SETUP, entries, params.ctypes.data)
        close = weakref.finalize(self, os.close, fd)
        features, count = int(params["features"][0]), int(params["sq_entries"][0])
        if features & _NEEDED != _NEEDED:
            close()
            raise OSError(errno.ENOSYS, "the kernel's io_uring is too old")
        sq, cq = params["sq"][0].tolist(), params["cq"][0].tolist()  # head, tail, mask, entries, ..., array | cqes at 5
        self.fd, self._entries, completions = fd, count, int(params["cq_entries"][0])
        length = max(sq[6] + 4 * count, cq[5] + completions * _COMPLETION.itemsize)
        shared = mmap.mmap(fd, length)
        self._sqes = np.frombuffer(mmap.mmap(fd, count * _ENTRY.itemsize, offset=_OFF_SQES), _ENTRY)
        words = np.frombuffer(shared, np.uint32, length // 4)
        self._sq_tail, self._cq_head, self._cq_tail = parts = [words[at // 4 :][:1] for at in (sq[1], cq[0], cq[1])]
        self._completions = np.frombuffer(shared, _COMPLETION, completions, cq[5])
        words[sq[6] // 4 :][:count] = np.arange(count)
        self.memory = tuple(part.ctypes.data for part in (self._sqes, self._completions, *parts))  # of the compiled part
        self.room = count, completions
        self._lock = threading.Lock()
        self._batches: dict[int, Batch] = {}
        self._number = self._in_flight = 0

    def read(
        self,
        fd: int,
        offsets: Longs,
        addresses: Longs,
        lengths: Longs,
        keep: object,
        *,
        vectored: bool,
        background: bool = False,
    ) -> Batch:
        """Start reads; returns at once.

        Args:
            fd: an open file.
            offsets: [n] bytes into the file.
            addresses: [n] of memory to fill; with `vectored`, of arrays of `iovec`.
            lengths: [n] bytes to read; with `vectored`, how many `iovec`.
            keep: objects that own this memory, kept until the reads are done.
            background: let kernel threads do all of it. Starting reads costs the caller 2 microseconds each instead of 6, and
                another core the difference.
        """
        entries = np.zeros(len(offsets), _ENTRY)
        entries["flags"] = _ASYNC if background else 0
        entries["opcode"], entries["fd"] = _READV if vectored else _READ, fd
        entries["offset"], entries["address"], entries["length"] = offsets, addresses, lengths
        batch = Batch(self, entries, keep)
        with self._lock:
            self._number += 1
            entries["user_data"] = (self._number << 32) + np.arange(len(entries), dtype=np.uint64)
            self._batches[self._number] = batch
            self._submit(batch)
        return batch

    @property
    def idle(self) -> bool:
        """Whether nothing is under way. Only then, and while no other thread starts anything, may somebody else use it."""
        return not self._batches

    def advance(self, batch: Batch) -> None:
        """Submit what is left of a batch, wait for a completion, and note all there are."""
        with self._lock:
            self._reap()
            self._submit(batch)
            if batch.done < len(batch.entries):
                self._enter(0, min(1, self._in_flight) if batch.submitted == batch.done else batch.submitted - batch.done)
                self._reap()

    def _submit(self, batch: Batch) -> None:
        """Hand entries of a batch to the kernel, as many as there is room for."""
        while count := min(len(batch.entries) - batch.submitted, self._entries - self._in_flight):
            tail = int(self._sq_tail[0])
            places = (tail + np.arange(count)) % self._entries
            self._sqes[places] = batch.entries[batch.submitted : batch.submitted + count]
            self._sq_tail[0] = (tail + count) & 0xFFFFFFFF
            taken = self._enter(count, 0)
            self._sq_tail[0] = (tail + taken) & 0xFFFFFFFF  # the others, when the kernel is short of something, some other time
            batch.submitted += taken
            self._in_flight += taken
            if taken < count:
                return

    def _enter(self, submit: int, wait: int) -> int:
        """`io_uring_enter`; the number of entries that the kernel took."""
        try:
            return self._call(_ENTER, self.fd, submit, wait, _GETEVENTS, 0, 0)
        except OSError as error:
            if error.errno in _RETRY:
                return 0
            raise

    def _reap(self) -> None:
        """Note the results that are there."""
        head, tail = int(self._cq_head[0]), int(self._cq_tail[0])
        count = (tail - head) & 0xFFFFFFFF
        if not count:
            return
        found = self._completions[(head + np.arange(count)) % len(self._completions)]
        self._cq_head[0] = tail
        self._in_flight -= count
        numbers = found["user_data"] >> 32
        one = (numbers == numbers[0]).all()  # most often; finding which there are takes longer than all the rest
        for number in numbers[:1].tolist() if one else np.unique(numbers).tolist():
            mine, batch = found[numbers == number], self._batches[number]
            batch.results[(mine["user_data"] & 0xFFFFFFFF).astype(np.int64)] = mine["result"]
            batch.done += len(mine)
            if batch.done == len(batch.entries):
                del self._batches[number]

    def _call(self, number: int, *arguments: int) -> int:
        result: int = self._libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, arguments))
        if result < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return result

    def settle(self) -> None:
        """Wait for every batch that was ever started."""
        for batch in list(self._batches.values()):
            batch.wait()
