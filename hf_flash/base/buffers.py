"""Memory for tensors: page-aligned memory of this process, which direct reads need, instead of the heap or a mapped file."""

from __future__ import annotations

import bisect
import mmap
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch

_LARGE_BYTES = 1 << 18


def allocate_pages(nbytes: int) -> mmap.mmap:
    """Allocate `nbytes` of page-aligned memory, private to this process: a forked worker writes to a copy, not into ours.

    It uses huge pages where the system has them. With those, reading rows from all over a matrix is a quarter faster, and
    reading the whole matrix a tenth.
    """
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, nbytes)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def aligned_empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Make an uninitialised tensor that starts on a page boundary, as direct I/O requires.

    The kernel provides the pages when they are first written.
    """
    count = torch.Size(shape).numel()
    if count == 0:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return torch.frombuffer(allocate_pages(count * dtype.itemsize), dtype=dtype, count=count).view(shape)


def copy_to_memory(tensor: torch.Tensor) -> torch.Tensor:
    """Make a contiguous copy. A large copy gets its own pages, which return to the system when it is freed; heap memory might
    not."""
    if tensor.nbytes < _LARGE_BYTES:
        return tensor.clone(memory_format=torch.contiguous_format)
    return aligned_empty(tuple(tensor.shape), tensor.dtype).copy_(tensor)


def load_into_memory(tensors: Iterable[torch.Tensor]) -> None:
    """Copy tensors that lie in a mapped checkpoint file into anonymous memory, one at a time, in place.

    transformers leaves tensors that need no other dtype in the mapped file. When memory is short, the kernel may drop these
    pages of attention and embeddings, and they are slower to read. Only Linux reports which tensors are mapped; on other
    systems all are copied.
    """
    mapped = _file_mappings()
    for tensor in tensors:
        if tensor.device.type == "cpu" and (mapped is None or _within(mapped, tensor.data_ptr())):
            tensor.data = copy_to_memory(tensor.data)


def _file_mappings() -> list[tuple[int, int]] | None:
    """Return the address ranges of mapped regular files, sorted, or `None` if the system does not report them."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    ranges = []
    for line in lines:
        parts = line.split(maxsplit=5)
        if len(parts) == 6 and parts[4] != "0":  # it has an inode: a file backs it
            start, _, end = parts[0].partition("-")
            ranges.append((int(start, 16), int(end, 16)))
    return sorted(ranges)


def _within(ranges: list[tuple[int, int]], address: int) -> bool:
    at = bisect.bisect_right(ranges, (address, 1 << 64)) - 1
    return at >= 0 and ranges[at][0] <= address < ranges[at][1]
