"""What the disk can deliver: its speed as a curve over the size of a read and the number of parallel reads.

A disk has no single speed. Its latency bounds small random reads, its queue bounds many of them in parallel, and its bus bounds
long ones. So [`disk_curve`] measures a grid: random reads of 4 KiB to 1 MiB, 1 to 32 at a time, and one sequential pass. Reads
go past the page cache (O_DIRECT), at offsets in real model files, so a model gets what is measured. Disks of virtual machines
are metered, so a point ends after a fraction of a second or a bounded volume, whichever comes first. Python threads issue the
reads, and on a fast disk that costs as much as the read itself: the figures are what this program can reach.
"""

from __future__ import annotations

import itertools
import mmap
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Final

import numpy as np

from hf_flash.base.buffers import allocate_pages
from hf_flash.errors import StoreReadError

SIZES: Final = (4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20)
DEPTHS: Final = (1, 8, 32)
_ALIGN: Final = 4096
_MAX_FILES: Final = 64


@dataclass(frozen=True)
class DiskPoint:
    """One measurement."""

    pattern: str  # "random" or "sequential"
    direct: bool  # past the page cache; otherwise some bytes may have come from memory
    size: int  # bytes per read
    depth: int  # reads at a time
    nbytes: int  # bytes read in all
    seconds: float

    @property
    def gb_per_s(self) -> float:
        return self.nbytes / 1e9 / self.seconds


def disk_curve(
    path: str | os.PathLike[str],
    *,
    sizes: Sequence[int] = SIZES,
    depths: Sequence[int] = DEPTHS,
    max_bytes: int = 256 << 20,
    max_seconds: float = 0.3,
    seed: int = 0,
) -> list[DiskPoint]:
    """Measure the disk that a file, or the largest safetensors files of a folder, lie on.

    Args:
        path: the file or folder. Read sizes that exceed every file are left out.
        sizes: bytes per read, multiples of 4096.
        depths: reads at a time.
        max_bytes, max_seconds: limits of one point.
        seed: seed of the random offsets.

    Returns:
        One point for every size and depth, ordered by size, then a sequential point.

    Raises:
        StoreReadError: there is nothing to read, or reading failed.
    """
    generator, points = np.random.default_rng(seed), []
    try:
        with _opened(_largest_files(Path(path))) as (files, direct):
            for size in sizes:
                count = max(1, max_bytes // size)
                reads = _random_reads(files, size, count, generator)
                for depth in depths if reads else ():
                    points.append(_measure("random", direct, reads, size, depth, max_seconds))
            size = max((size for size in (1 << 20, *sizes) if size <= files[0][1]), default=0)
            if size:
                whole = [(files[0][0], at) for at in range(0, min(files[0][1] // size * size, max_bytes), size)]
                points.append(_measure("sequential", direct, whole, size, 4, max_seconds))
    except OSError as error:
        raise StoreReadError("measuring the disk failed", where=path, got=error.strerror or str(error)) from error
    if not points:
        raise StoreReadError("no file is large enough to measure the disk", where=path, expected=f"{min(sizes)} bytes")
    return points


def _largest_files(path: Path) -> list[tuple[Path, int]]:
    """List the files to read from, each with its size, the largest first."""
    paths = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    found = sorted(((item, item.stat().st_size) for item in paths), key=lambda item: -item[1])
    if not found:
        raise StoreReadError("no safetensors files", where=path)
    return [item for item in found if item[1] >= found[0][1] // 2][:_MAX_FILES]


@contextmanager
def _opened(files: list[tuple[Path, int]]) -> Iterator[tuple[list[tuple[int, int]], bool]]:
    """Open files and yield (descriptor, size) pairs, and whether reads are direct. If not, the files' page cache is dropped."""
    fds: list[tuple[int, int]] = []
    direct = hasattr(os, "O_DIRECT") and _takes_direct(files[0][0])
    try:
        for path, size in files:
            fds.append((os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0)), size))
            if not direct and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(fds[-1][0], 0, 0, os.POSIX_FADV_DONTNEED)
        yield fds, direct
    finally:
        for fd, _ in fds:
            os.close(fd)


def _takes_direct(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return False
    try:
        return os.preadv(fd, [memoryview(allocate_pages(_ALIGN))], 0) > 0
    except OSError:
        return False
    finally:
        os.close(fd)


def _random_reads(files: list[tuple[int, int]], size: int, count: int, generator: np.random.Generator) -> list[tuple[int, int]]:
    """Draw (descriptor, offset) pairs: offsets are multiples of 4 KiB, and files are drawn in proportion to their bytes."""
    usable = [(fd, (length - size) // _ALIGN + 1) for fd, length in files if length >= size]
    if not usable:
        return []
    places = np.cumsum([n for _, n in usable])
    picked = generator.integers(0, places[-1], count)
    owners = np.searchsorted(places, picked, side="right")
    starts = np.concatenate(([0], places[:-1]))
    return [(usable[o][0], int(p - starts[o]) * _ALIGN) for o, p in zip(owners.tolist(), picked, strict=True)]


def _measure(pattern: str, direct: bool, reads: list[tuple[int, int]], size: int, depth: int, max_seconds: float) -> DiskPoint:
    """Measure one point: `depth` threads share a list of reads until the list or the time runs out."""
    lanes = min(depth, len(reads))
    buffers, done, failed = [allocate_pages(size) for _ in range(lanes)], [0] * lanes, list[OSError]()
    barrier = threading.Barrier(lanes + 1)

    def work(lane: int, buffer: mmap.mmap) -> None:
        view = memoryview(buffer)
        barrier.wait()
        try:
            for fd, offset in reads[lane::lanes]:
                done[lane] += os.preadv(fd, [view], offset)
                if perf_counter() > deadline:
                    break
        except OSError as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=item, daemon=True) for item in enumerate(buffers)]
    for thread in threads:
        thread.start()
    deadline = perf_counter() + max_seconds
    barrier.wait()
    start = perf_counter()
    for thread in threads:
        thread.join()
    seconds = perf_counter() - start
    if failed:
        raise failed[0]
    return DiskPoint(pattern, direct, size, lanes, sum(done), seconds)


def mean_curve(curves: Iterable[Iterable[DiskPoint]]) -> list[DiskPoint]:
    """Join curves of one disk that were measured at different times: all bytes over all seconds, point by point."""
    found: dict[tuple[str, int, int], DiskPoint] = {}
    for point in itertools.chain.from_iterable(curves):
        key = point.pattern, point.size, point.depth
        before = found.get(key)
        found[key] = point if before is None else replace(
            point, nbytes=before.nbytes + point.nbytes, seconds=before.seconds + point.seconds
        )  # fmt: skip
    return list(found.values())


def rate_at(points: Iterable[DiskPoint], size: float, depth: float | None = None) -> float:
    """Interpolate GB/s of random reads between the points of a curve, on logarithmic scales. Beyond an end, its value applies.

    Args:
        points: from [`disk_curve`].
        size: bytes per read.
        depth: reads at a time; `None`: the fastest depth at each size.
    """
    random = [point for point in points if point.pattern == "random"]
    sizes, rates = sorted({point.size for point in random}), []
    for each in sizes:
        found = sorted((point.depth, point.gb_per_s) for point in random if point.size == each)
        depths, speeds = np.array(found).T
        rates.append(speeds.max() if depth is None else np.exp(np.interp(np.log(depth), np.log(depths), np.log(speeds))))
    return float(np.exp(np.interp(np.log(size), np.log(sizes), np.log(rates))))
