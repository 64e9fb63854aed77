"""`ExpertLayer`: the experts of one layer, as they lie in the files of a plain checkpoint.

What lies where is worked out in families/experts.py. An expert is a few *pieces*: contiguous ranges of bytes, each a matrix or
some outputs of one. All experts of a layer have the same pieces, at places of their own.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

SECOND: Final = "down_proj"  # the parameter behind the activation
PACKED_ALIGNMENT: Final = 256  # bytes: the fast products of GPUs want 16, and copies a line of their caches
E2M1: Final = torch.float4_e2m1fn_x2  # 4 bits a number, two in a byte, the first of them in its low half
E4M3: Final = torch.float8_e4m3fn  # 8 bits a number
E8M0: Final = torch.float8_e8m0fnu  # a scale: a power of two


def bytes_of(count: int, dtype: torch.dtype) -> int:
    """What so many numbers take in a file."""
    return count // 2 if dtype == E2M1 else count * dtype.itemsize


@dataclass(frozen=True)
class Scales:
    """What the numbers of a piece are multiplied with; blocks of them share a scale.

    Attributes:
        dtype: of a scale in the file.
        block_rows, block_columns: of numbers that share one.
    """

    dtype: torch.dtype
    block_rows: int
    block_columns: int


@dataclass(frozen=True)
class Piece:
    """What all experts of a layer have in common of one piece.

    Attributes:
        param: of the experts module, that it is a part of.
        rows, columns: as they are stored.
        turned: whether a row holds what one input is multiplied with; otherwise what makes one output.
        first_output, turns: its outputs are those of the parameter from `first_output` on, one after the other; or, with two
            `turns`, one of the first half and one of the second half take turns; or the other way round, where `turns` is -2.
        dtype: of the file; `E2M1` and `E4M3` go with scales.
        scales: of its numbers, which lie in a tensor of their own, row after row of blocks, and
            whose rows are outputs; `None`: they are what they are.
    """

    param: str
    rows: int
    columns: int
    turned: bool
    first_output: int
    turns: int
    dtype: torch.dtype
    scales: Scales | None = None

    @property
    def outputs(self) -> int:
        return self.columns if self.turned else self.rows

    @property
    def inputs(self) -> int:
        return self.rows if self.turned else self.columns

    @property
    def nbytes(self) -> int:
        """Of its numbers."""
        return bytes_of(self.rows * self.columns, self.dtype)

    @property
    def grid(self) -> tuple[int, int]:
        """How many scales there are, in rows and columns of blocks."""
        if self.scales is None:
            return 0, 0
        return -(-self.rows // self.scales.block_rows), -(-self.columns // self.scales.block_columns)

    @property
    def scale_bytes(self) -> int:
        rows, columns = self.grid
        return rows * columns * self.scales.dtype.itemsize if self.scales else 0

    @property
    def order(self) -> npt.NDArray[np.int64]:
        """Which output of the parameter each of its outputs is."""
        every = np.arange(self.outputs)
        if self.turns == 2:
            every = every.reshape(2, -1).T.reshape(-1)
        elif self.turns == -2:
            every = every * 2
        return every + self.first_output


@dataclass(frozen=True)
class ExpertLayer:
    """The experts of one layer.

    Attributes:
        name: of the module in the model.
        experts: how many.
        width, neurons: d_model, and the neurons of one expert.
        first: the parameter before the activation.
        pieces: of an expert; those of `first` come first.
        tensors: for each expert, the checkpoint's tensor that each of its `ranges` is a part of.
        begin: [experts, ranges] the byte in that tensor where the range begins.
    """

    name: str
    experts: int
    width: int
    neurons: int
    first: str
    pieces: tuple[Piece, ...]
    tensors: tuple[tuple[str, ...], ...]
    begin: npt.NDArray[np.int64]

    @property
    def ranges(self) -> tuple[int, ...]:
        """What an expert has in the files, in bytes: each piece, then the scales of each piece that has any."""
        return (*(piece.nbytes for piece in self.pieces), *(piece.scale_bytes for piece in self.pieces if piece.scales))

    @property
    def expert_bytes(self) -> int:
        """Of one expert, as it lies in the files."""
        return sum(self.ranges)

    @property
    def packed_at(self) -> tuple[int, ...]:
        """The byte where each of `ranges` begins in a packed slot, and then the bytes of the slot: for devices."""
        sizes = (-(-nbytes // PACKED_ALIGNMENT) * PACKED_ALIGNMENT for nbytes in self.ranges)
        return tuple(itertools.accumulate(sizes, initial=0))

    @property
    def packed_bytes(self) -> int:
        """Of a packed slot."""
        return self.packed_at[-1]

    @property
    def scale_places(self) -> tuple[int, ...]:
        """For each piece, which of `ranges` its scales are; -1: it has none."""
        scaled = [number for number, piece in enumerate(self.pieces) if piece.scales]
        return tuple(len(self.pieces) + scaled.index(n) if n in scaled else -1 for n in range(len(self.pieces)))

    def of(self, param: str) -> tuple[Piece, ...]:
        """The pieces of a parameter."""
        return tuple(piece for piece in self.pieces if piece.param == param)
