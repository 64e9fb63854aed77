"""The heap of glibc: returning freed memory to the system, and settings for long prompts."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_OFF_HEAP_BYTES, _LARGEST_ON_HEAP = 2 << 20, 32 << 20  # the second is glibc's own upper limit
_MALLOC_ENV = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"}


def trim_heap() -> None:
    """Return freed heap memory to the system. glibc keeps what repacking and loading freed: tens of MiB or more."""
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)


class Heap:
    """Switches glibc's heap between its settings for calls of many tokens and for calls of few.

    The blocks of a long prompt are freed in any order, and the heap keeps hundreds of MiB between them (490 for 1024 tokens of
    OPT-2.7B). So in a call with large blocks each block gets its own pages, which return to the system one by one. Decoding
    uses the heap again, which reuses blocks of one size: new pages for a growing KV cache would cost a quarter of its time.

    Nothing is set before the first call of many tokens, if the user has set these options, or without glibc.
    """

    def __init__(self) -> None:
        self._large = False

    def prepare(self, nbytes: int) -> None:
        """Set the heap for a call whose activations take `nbytes` each; 0 says that the call is over."""
        large = nbytes >= _OFF_HEAP_BYTES
        if large == self._large:
            return
        self._large = large
        set_option = None if _MALLOC_ENV & os.environ.keys() else _glibc("mallopt")
        if set_option is not None:
            set_option(_M_MMAP_THRESHOLD, _OFF_HEAP_BYTES if large else _LARGEST_ON_HEAP)
            set_option(_M_TRIM_THRESHOLD, 2 * _LARGEST_ON_HEAP)
            if large:
                trim_heap()  # return what earlier calls left there


def _glibc(name: str) -> Callable[..., int] | None:
    """Find a function of glibc's allocator; musl lacks these functions."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
