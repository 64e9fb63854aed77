"""Where tensors lie: page-aligned buffers of our own, and tensors that still lie in a mapped file."""

from __future__ import annotations

import bisect
import ctypes
import mmap
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import torch

_LARGE_BYTES = 1 << 18
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_OFF_HEAP_BYTES, _LARGEST_ON_HEAP = 1 << 20, 32 << 20  # the second is what glibc itself goes up to
_MALLOC_ENV = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"}


def anonymous(nbytes: int) -> mmap.mmap:
    """Page-aligned memory of this process alone: a forked worker writes to a copy, not into ours.

    In huge pages where the system has them: reading rows all over a matrix is a quarter faster, reading it whole a tenth.
    """
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, nbytes)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def aligned_empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised tensor that starts on a page, as direct I/O wants its target.

    The pages are anonymous memory that the kernel provides when they are first written.
    """
    count = torch.Size(shape).numel()
    if count == 0:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return torch.frombuffer(anonymous(count * dtype.itemsize), dtype=dtype, count=count).view(shape)


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy in memory. Large ones get pages of their own, which go back to the system when the copy is freed;
    from the heap they might not."""
    if tensor.nbytes < _LARGE_BYTES:
        return tensor.clone(memory_format=torch.contiguous_format)
    return aligned_empty(tuple(tensor.shape), tensor.dtype).copy_(tensor)


def trim_heap() -> None:
    """Give freed heap memory back to the system. glibc keeps what repacking and loading freed, tens of MiB or more."""
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)


class Heap:
    """glibc's heap, for a call of many tokens and for those of few.

    Between the blocks of a long prompt, freed in any order, a heap keeps hundreds of MiB (1024 tokens of OPT-2.7B: 490). So a
    call with large blocks has them as pages of their own, which go back to the system one by one. Not so afterwards: providing
    pages anew for a growing KV cache would cost decoding a quarter of its time, and a heap reuses blocks that are alike.

    Nothing is set before the first call of many tokens, nor where the user has set it, nor without glibc.
    """

    def __init__(self) -> None:
        self._large = False

    def prepare(self, nbytes: int) -> None:
        """For a call whose activations take `nbytes` each; with 0, that it is over."""
        large = nbytes >= _OFF_HEAP_BYTES
        if large == self._large:
            return
        self._large = large
        set_option = None if _MALLOC_ENV & os.environ.keys() else _glibc("mallopt")
        if set_option is not None:
            set_option(_M_MMAP_THRESHOLD, _OFF_HEAP_BYTES if large else _LARGEST_ON_HEAP)
            set_option(_M_TRIM_THRESHOLD, 2 * _LARGEST_ON_HEAP)
            if large:
                trim_heap()  # of what the last call's tokens left


def _glibc(name: str) -> Callable[..., int] | None:
    """A function of glibc's allocator; musl has none of them."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def load_into_memory(tensors: Iterable[torch.Tensor]) -> None:
    """Copy tensors that lie in a mapped checkpoint file into anonymous memory, one at a time, in place.

    transformers loads a same-dtype checkpoint lazily: attention and embeddings stay on the file mapping, where the kernel
    may drop their pages again under pressure and where they are slower to read. Only Linux tells which tensors those are;
    elsewhere all are copied.
    """
    mapped = _file_mappings()
    for tensor in tensors:
        if tensor.device.type == "cpu" and (mapped is None or _within(mapped, tensor.data_ptr())):
            tensor.data = copied(tensor.data)


def _file_mappings() -> list[tuple[int, int]] | None:
    """Sorted address ranges of mapped regular files, or `None` where the system does not tell."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    ranges = []
    for line in lines:
        parts = line.split(maxsplit=5)
        if len(parts) == 6 and parts[4] != "0":  # an inode: file-backed
            start, _, end = parts[0].partition("-")
            ranges.append((int(start, 16), int(end, 16)))
    return sorted(ranges)


def _within(ranges: list[tuple[int, int]], address: int) -> bool:
    at = bisect.bisect_right(ranges, (address, 1 << 64)) - 1
    return at >= 0 and ranges[at][0] <= address < ranges[at][1]
