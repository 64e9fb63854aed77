"""Chunks: what is read of a layer's file at once, and the rows of memory that it goes to.

A *chunk* is one contiguous read: neighbours on flash, scattered over any rows of the caller's matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from .window import Ids

_CHUNK_BYTES: Final = 1 << 20  # longer runs are split, so that they are read side by side
_CHUNK_ROWS: Final = 1024  # what the kernel scatters one read over at most

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Chunks:
    """Contiguous reads of one layer's file.

    Chunk `i` starts at byte `offset[i]` and holds the bundles, of `size` bytes each, that go to rows
    `rows[first[i] : first[i + 1]]`.
    """

    offset: Ids  # [n]
    first: Ids  # [n + 1]
    rows: Ids  # [bundles]
    size: int

    def __len__(self) -> int:
        return len(self.offset)

    @property
    def nbytes(self) -> Ids:
        """[n]"""
        return np.diff(self.first) * self.size

    @property
    def parts(self) -> Ids:
        """[parts] where in `rows` a part of a chunk begins that lies together in memory, too."""
        if len(self) == len(self.rows):
            return self.first[:-1]
        begins = np.diff(self.rows, prepend=-2) != 1
        begins[self.first[:-1]] = True
        return np.flatnonzero(begins)

    def pieces(self, chunk: int, first: int = 0, last: int | None = None) -> Iterator[tuple[int, slice]]:
        """Byte offset in the file and rows in memory of the parts of a chunk that are contiguous in both.

        Args:
            first, last: of the chunk's bundles, from `first` to before `last` alone.
        """
        offset = int(self.offset[chunk]) + first * self.size
        rows = self.rows[self.first[chunk] : self.first[chunk + 1]][first:last]
        ends = [*(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
        start = 0
        for end in ends:
            row = int(rows[start])
            yield offset + start * self.size, slice(row, row + end - start)
            start = end


def chunked(ids: Ids, rows: Ids, offset: int, size: int) -> Chunks:
    """Chunks for neurons `ids`, ascending, that go to `rows`: as few as neighbourhood allows, none over 1 MiB much.

    Args:
        offset: where the file's bundles begin.
        size: bytes of a bundle.
    """
    longest = longest_chunk(size)
    at = np.arange(len(ids))
    begins = np.diff(ids, prepend=-2) != 1
    run_start = np.maximum.accumulate(np.where(begins, at, 0))
    first = np.flatnonzero((at - run_start) % longest == 0)
    return Chunks(offset + ids[first] * size, np.append(first, len(ids)), rows, size)


def longest_chunk(size: int) -> int:
    """The most bundles of `size` bytes that are one read."""
    return max(1, min(_CHUNK_ROWS, _CHUNK_BYTES // size))
