"""Chunks: the contiguous reads of a layer's file, and the rows of memory that they fill.

A *chunk* is one read: neighbours on flash, scattered over any rows of the caller's matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np

from hf_flash.base.arrays import Ids

_CHUNK_BYTES: Final = 1 << 20  # longer runs are split, so that their parts are read in parallel
_CHUNK_ROWS: Final = 1024  # the most pieces over which the kernel scatters one read


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
        """Bytes of each chunk, [n]."""
        return np.diff(self.first) * self.size

    @property
    def parts(self) -> Ids:
        """Indices in `rows` where a new part of a chunk begins: bundles that are also neighbours in memory, [parts]."""
        if len(self) == len(self.rows):
            return self.first[:-1]
        begins = np.diff(self.rows, prepend=-2) != 1
        begins[self.first[:-1]] = True
        return np.flatnonzero(begins)

    def pieces(self) -> Iterator[tuple[int, list[slice]]]:
        """For each chunk its byte offset, and the rows that its bundles go to, as one slice for each part."""
        begins = self.parts
        start = self.rows[begins]
        end = start + np.diff(begins, append=len(self.rows))
        slices = [slice(*ends) for ends in zip(start.tolist(), end.tolist(), strict=True)]
        of_chunk = pairwise(np.searchsorted(begins, self.first).tolist())
        for offset, (first, last) in zip(self.offset.tolist(), of_chunk, strict=True):
            yield offset, slices[first:last]


def chunked(ids: Ids, rows: Ids, offset: int, size: int) -> Chunks:
    """As few chunks as possible that read neurons `ids`, ascending, into `rows`. A chunk has at most 1 MiB, or one bundle.

    Args:
        offset: the byte of the file where the bundles begin.
        size: bytes of a bundle.
    """
    longest = longest_chunk(size)
    at = np.arange(len(ids))
    begins = np.diff(ids, prepend=-2) != 1
    run_start = np.maximum.accumulate(np.where(begins, at, 0))
    first = np.flatnonzero((at - run_start) % longest == 0)
    return Chunks(offset + ids[first] * size, np.append(first, len(ids)), rows, size)


def torn(ids: Ids, rows: Ids, offset: int, size: int, pieces: int) -> Chunks:
    """As [`chunked`], but every neuron takes `pieces` reads of its own, of `size // pieces` bytes each.

    `rows` of the result count pieces: a row of the caller's matrix is `pieces` rows of the chunks.

    Raises:
        ValueError: a bundle cannot be divided into `pieces` equal pieces.
    """
    if size % pieces:
        raise ValueError(f"a bundle of {size} bytes in {pieces} pieces")
    part = np.arange(pieces)
    offsets = (offset + ids[:, None] * size + part * (size // pieces)).reshape(-1)
    return Chunks(offsets, np.arange(len(offsets) + 1), (rows[:, None] * pieces + part).reshape(-1), size // pieces)


def longest_chunk(size: int) -> int:
    """The most bundles of `size` bytes in one read."""
    return max(1, min(_CHUNK_ROWS, _CHUNK_BYTES // size))
