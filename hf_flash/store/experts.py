"""`ExpertLayer`: the experts of one layer, and where they lie in the files of a plain checkpoint.

families/experts.py works out what lies where. An expert consists of a few *pieces*: contiguous ranges of bytes, each with a
matrix or some outputs of one. All experts of a layer have the same pieces, each expert at its own places.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

SECOND: Final = "down_proj"  # the parameter after the activation
PACKED_ALIGNMENT: Final = 256  # bytes: fast products on GPUs need 16, and copies prefer a cache line
E2M1: Final = torch.float4_e2m1fn_x2  # 4 bits per number, two in a byte, the first in its low half
E4M3: Final = torch.float8_e4m3fn  # 8 bits per number
E8M0: Final = torch.float8_e8m0fnu  # a scale: a power of two


def bytes_of(count: int, dtype: torch.dtype) -> int:
    """Return the bytes that `count` numbers take in a file."""
    return count // 2 if dtype == E2M1 else count * dtype.itemsize


@dataclass(frozen=True)
class Scales:
    """The scales that a piece's numbers are multiplied by. The numbers of a block share one scale.

    Attributes:
        dtype: the dtype of a scale in the file.
        block_rows, block_columns: the size of a block, in numbers.
    """

    dtype: torch.dtype
    block_rows: int
    block_columns: int


@dataclass(frozen=True)
class Piece:
    """The form of one piece, the same for all experts of a layer.

    Attributes:
        param: the parameter of the experts module that the piece is a part of.
        rows, columns: its size as stored.
        turned: whether a row holds the weights of one input; otherwise it holds those of one output.
        first_output, turns: which outputs of the parameter it has, from `first_output` on: with `turns` 1, consecutive ones in
            their order; with 2, the same outputs, with those of both halves alternating; with -2, every second output.
        dtype: its dtype in the file; `E2M1` and `E4M3` come with scales.
        scales: the scales of its numbers, in a tensor of their own, one row of blocks after the other; its rows are outputs
            then. `None`: it has no scales.
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
        """Bytes of its numbers, without scales."""
        return bytes_of(self.rows * self.columns, self.dtype)

    @property
    def grid(self) -> tuple[int, int]:
        """How many scales it has: rows and columns of blocks, (0, 0) without scales."""
        if self.scales is None:
            return 0, 0
        return -(-self.rows // self.scales.block_rows), -(-self.columns // self.scales.block_columns)

    @property
    def scale_bytes(self) -> int:
        rows, columns = self.grid
        return rows * columns * self.scales.dtype.itemsize if self.scales else 0

    @property
    def order(self) -> npt.NDArray[np.int64]:
        """For each output of the piece, its index among the outputs of the parameter, int64 [outputs]."""
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
        name: the name of the experts module in the model.
        experts: how many experts it has.
        width, neurons: d_model, and the neurons of one expert.
        first: the parameter before the activation.
        pieces: the pieces of an expert; those of `first` come first.
        tensors: for each expert, the name of the checkpoint tensor that holds each of its `ranges`.
        begin: int64 [experts, ranges], the byte in that tensor where the range begins.
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
        """Sizes in bytes of an expert's ranges in the files: each piece, then the scales of each piece that has any."""
        return (*(piece.nbytes for piece in self.pieces), *(piece.scale_bytes for piece in self.pieces if piece.scales))

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert in the files."""
        return sum(self.ranges)

    @property
    def packed_at(self) -> tuple[int, ...]:
        """For devices: the byte where each of `ranges` begins in a packed slot, and at the end the bytes of the slot."""
        sizes = (-(-nbytes // PACKED_ALIGNMENT) * PACKED_ALIGNMENT for nbytes in self.ranges)
        return tuple(itertools.accumulate(sizes, initial=0))

    @property
    def packed_bytes(self) -> int:
        """Bytes of a packed slot."""
        return self.packed_at[-1]

    @property
    def scale_places(self) -> tuple[int, ...]:
        """For each piece, the index of its scales in `ranges`; -1 if it has none."""
        scaled = [number for number, piece in enumerate(self.pieces) if piece.scales]
        return tuple(len(self.pieces) + scaled.index(n) if n in scaled else -1 for n in range(len(self.pieces)))

    def of(self, param: str) -> tuple[Piece, ...]:
        """Return the pieces of a parameter."""
        return tuple(piece for piece in self.pieces if piece.param == param)
