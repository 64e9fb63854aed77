"""`UnitLayout`: how one unit of a layer is laid out, on flash and in memory.

A *unit* is what is chosen, read and kept together. In a feed-forward layer it is a neuron: a row or a column of each of the
layer's matrices, its *parts*, side by side in one row of numbers (a *bundle*):

    OPT       up[i, :] | down[:, i]
    gated     gate[i, :] | up[i, :] | down[:, i]

All code that has to know where a part lies, or how many bytes a unit takes, asks the layout: writer, restore, placement,
reader, window, budget, planner, model card, arithmetic, and the compiled part through `row_bytes` and `offset`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal, get_args

import torch

from hf_flash.errors import StoreFormatError
from hf_flash.store.codecs import CODECS, Codec, codec_of

Role = Literal["gate", "up", "down"]
Stored = Literal["row", "column", "first_rows", "last_rows"]
ROLES: Final[tuple[Role, ...]] = ("gate", "up", "down")
COLUMN: Final = "column"
ROW: Final = "row"
HALVES: Final[tuple[Stored, ...]] = ("first_rows", "last_rows")


@dataclass(frozen=True)
class Part:
    """What a unit has of one matrix of its layer.

    Attributes:
        role: what the matrix does: hidden = activation(up x), or activation(gate x) * (up x); output = down hidden.
        stored: whether a unit has a `"row"` of the plain matrix, [units, width], or a `"column"`, [width, units]. If two parts
            share a matrix, [2 * units, width], one has its `"first_rows"` and the other its `"last_rows"`.
    """

    role: Role
    stored: Stored

    @property
    def is_half(self) -> bool:
        """Whether it shares its matrix with another part."""
        return self.stored in HALVES

    def plain_shape(self, units: int, width: int) -> tuple[int, int]:
        """Return the shape of the matrix in the plain checkpoint."""
        if self.stored == COLUMN:
            return width, units
        return (2 * units, width) if self.is_half else (units, width)

    def sizes(self, plain_shape: Sequence[int]) -> tuple[int, int]:
        """Return how many units a matrix of this shape has, and their width."""
        first, second = plain_shape
        if self.stored == COLUMN:
            return second, first
        return (first // 2, second) if self.is_half else (first, second)

    def units(self, plain_shape: Sequence[int]) -> slice:
        """Return the rows, or columns, of the plain matrix that hold the units."""
        units, start = self.sizes(plain_shape)[0], HALVES.index(self.stored) if self.is_half else 0
        return slice(start * units, (start + 1) * units)

    def by_unit(self, matrix: torch.Tensor) -> torch.Tensor:
        """Return a view of the plain matrix, [units, width]."""
        return (matrix.T if self.stored == COLUMN else matrix)[self.units(matrix.shape)]


@dataclass(frozen=True)
class UnitLayout:
    """The parts of a unit in their order in a row, their width, and how their numbers are stored.

    Attributes:
        parts: in the order of the row; each role at most once; `down` and `up` are always there.
        width: numbers in a part, which is d_model.
        codec: how numbers are stored.
    """

    parts: tuple[Part, ...]
    width: int
    codec: Codec

    @classmethod
    def of(cls, parts: Sequence[Part], width: int, dtype: torch.dtype) -> UnitLayout:
        """Make the layout of units whose numbers are kept as `dtype`, in a checkpoint or in memory.

        Raises:
            StoreFormatError: no codec stores this dtype.
        """
        codec = codec_of(dtype)
        if codec is None:
            names = ", ".join(str(codec.dtype) for codec in CODECS)
            raise StoreFormatError("feed-forward weights of a dtype that cannot be stored", expected=names, got=dtype)
        return cls(tuple(parts), width, codec)

    def as_dtype(self, dtype: torch.dtype) -> UnitLayout:
        """Return the layout of the same units in another dtype: in memory, numbers have the compute dtype."""
        return self if dtype == self.dtype else UnitLayout.of(self.parts, self.width, dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the numbers in a row."""
        return self.codec.dtype

    @property
    def roles(self) -> tuple[Role, ...]:
        return tuple(part.role for part in self.parts)

    @property
    def numbers(self) -> int:
        """Numbers in a row."""
        return len(self.parts) * self.width

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of a unit: the distance from one row to the next in a contiguous matrix of units."""
        return self.codec.nbytes(self.numbers)

    def columns(self, role: Role) -> slice:
        """Return where a part lies in a row, in numbers."""
        at = self.roles.index(role) * self.width
        return slice(at, at + self.width)

    def offset(self, role: Role) -> int:
        """Return where a part begins in a row, in bytes."""
        return self.codec.nbytes(self.columns(role).start)

    def part(self, role: Role) -> Part:
        return self.parts[self.roles.index(role)]

    @property
    def deciding(self) -> Role:
        """The part whose product with the input says whether a unit is active: what predictors learn or copy."""
        return "gate" if "gate" in self.roles else "up"

    @property
    def text(self) -> str:
        """The parts as metadata writes them: `up:row,down:column`."""
        return parts_text(self.parts)


TWO_MATRICES: Final = (Part("up", "row"), Part("down", "column"))
"""The parts of layers whose files do not list them, as in format versions 1 and 2."""


def parts_text(parts: Sequence[Part]) -> str:
    """Return parts as metadata writes them: `up:row,down:column`."""
    return ",".join(f"{part.role}:{part.stored}" for part in parts)


def parse_parts(text: str) -> tuple[Part, ...] | None:
    """Parse [`UnitLayout.text`]; `None` for any text that is not a valid list of parts."""
    known: Mapping[str, Part] = {f"{role}:{stored}": Part(role, stored) for role in ROLES for stored in get_args(Stored)}
    words = text.split(",")
    if len(words) > len(ROLES) or not all(word in known for word in words):
        return None
    parts = tuple(known[word] for word in words)
    roles, halves = {part.role for part in parts}, tuple(part.stored for part in parts if part.is_half)
    valid = len(roles) == len(parts) and {"up", "down"} <= roles and halves in ((), HALVES)
    return parts if valid else None
