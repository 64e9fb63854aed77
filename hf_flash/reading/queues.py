"""Queues of reads: chunks of open files into rows of memory, while the caller does something else.

    CompiledQueue    by the compiled part (compute/read_queue.c): io_uring, or a few threads of its own
    PagesQueue       by Python, through the page cache, where there is no compiled part

Both keep these promises, which the code above relies on:

    a signal may interrupt the caller anywhere: nothing hangs, and `forget` resets the queue
    after `settle`, `forget` or `close` no read writes to memory any more
    a forked process goes on with a queue of its own, without the reads that its parent has under way
    a file that has changed since it was opened is noticed when its reads are waited for
"""

from __future__ import annotations

from typing import Any, Protocol

from hf_flash.base.arrays import Bytes, Ids
from hf_flash.reading.chunks import Chunks
from hf_flash.reading.open_file import OpenFile


class ReadQueue(Protocol):
    """The interface of both queues."""

    buffer_bytes: int  # the most DRAM that it takes for unaligned reads
    reader: int | None  # the compiled part's reader, which its own functions may also use; `None` without the compiled part

    @property
    def description(self) -> str:
        """How it reads, in words for users."""
        ...

    def start(self, file: OpenFile, chunks: Chunks, out: Bytes, *, background: bool) -> Any:
        """Begin to fill rows of `out`, uint8 [any, bytes of a bundle], contiguous; returns a ticket for `wait`."""
        ...

    def start_into(self, file: OpenFile, reads: Ids, memory: Bytes) -> Any:
        """Begin to fill parts of `memory`, uint8 [any], contiguous; returns a ticket for `wait`.

        Args:
            reads: [n, 3] offset in the file, offset in `memory`, and number of bytes.
        """
        ...

    def wait(self, ticket: Any) -> None:
        """Wait for the reads of a ticket. Raises `OSError`; after [`FileChangedError`], the caller must repeat the reads."""
        ...

    def check(self, error: int) -> None:
        """Raise the error of reads that the compiled part has waited for, as `wait` does; 0 is none."""

    def settle(self) -> None:
        """Wait until no read writes to memory any more. Tickets stay valid."""
        ...

    def forget(self) -> None:
        """Wait as `settle` does. Tickets are invalid afterwards."""
        ...

    def close(self) -> None: ...
