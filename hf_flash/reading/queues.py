"""Queues of reads: chunks of open files into rows of memory, while the caller does something else.

    CompiledQueue    by the compiled part (compute/read_queue.c): io_uring, or a few threads of its own
    PagesQueue       by Python, through the page cache, where there is no compiled part

Both keep these promises, which the layers above rely on:

    a signal may interrupt the caller anywhere: nothing hangs, and `forget` makes the queue as good as new
    after `settle`, `forget` or `close` nothing writes to memory any more
    a forked process goes on with a queue of its own; what its parent has under way is none of it
    a file that changed since it was opened is noticed when its reads are waited for
"""

from __future__ import annotations

from typing import Any, Protocol

from hf_flash.base.arrays import Bytes, Ids
from hf_flash.reading.chunks import Chunks
from hf_flash.reading.open_file import OpenFile


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

    def start_into(self, file: OpenFile, reads: Ids, memory: Bytes) -> Any:
        """Begin to fill parts of `memory`, uint8 [any], contiguous; returns a ticket for `wait`.

        Args:
            reads: [n, 3] the byte of the file, the byte of `memory`, and how many bytes.
        """
        ...

    def wait(self, ticket: Any) -> None:
        """Wait for the reads of a ticket. Raises `OSError`, and [`FileChangedError`] after which they are to be read again."""
        ...

    def check(self, error: int) -> None:
        """Raise what the compiled part says of reads that it has waited for, as `wait` does; nothing if they went well."""

    def settle(self) -> None:
        """Wait until nothing writes to memory any more. Tickets stay good."""
        ...

    def forget(self) -> None:
        """Wait as `settle` does. Tickets are worth nothing afterwards."""
        ...

    def close(self) -> None: ...
