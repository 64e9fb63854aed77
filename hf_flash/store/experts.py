"""`ExpertLayer`: the experts of one layer, as they lie in the files of a plain checkpoint.

What lies where is worked out in families/experts.py. An expert is a few *pieces*: contiguous ranges of bytes, each a matrix or
some outputs of one. All experts of a layer have the same pieces, at places of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

SECOND: Final = "down_proj"  # the parameter behind the activation


@dataclass(frozen=True)
class Piece:
    """What all experts of a layer have in common of one piece.

    Attributes:
        param: of the experts module, that it is a part of.
        rows, columns: as they are stored.
        turned: whether a row holds what one input is multiplied with; otherwise what makes one output.
        first_output, turns: its outputs are those of the parameter from `first_output` on, one after the other; or, with two
            `turns`, one of the first half and one of the second half take turns; or the other way round, where `turns` is -2.
        dtype: of the file.
    """

    param: str
    rows: int
    columns: int
    turned: bool
    first_output: int
    turns: int
    dtype: torch.dtype

    @property
    def outputs(self) -> int:
        return self.columns if self.turned else self.rows

    @property
    def inputs(self) -> int:
        return self.rows if self.turned else self.columns

    @property
    def nbytes(self) -> int:
        return self.rows * self.columns * self.dtype.itemsize

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
        tensors: for each expert, the checkpoint's tensor that each piece is a part of.
        begin: [experts, pieces] the byte in that tensor where the piece begins.
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
    def expert_bytes(self) -> int:
        """Of one expert, as it lies in the files."""
        return sum(piece.nbytes for piece in self.pieces)

    def of(self, param: str) -> tuple[Piece, ...]:
        """The pieces of a parameter."""
        return tuple(piece for piece in self.pieces if piece.param == param)
