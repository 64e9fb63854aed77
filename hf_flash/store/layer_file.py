"""One file of a store: a layer's bundles, and what the file's metadata must say about them (docs/store-format.md).

The metadata names the layer's matrices in the plain checkpoint, with one key per part: `up`, `down`, and any other role that
`parts` lists. A file without `parts` holds two matrices, up by row and down by column; so does every file of format versions 1
and 2.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from hf_flash.base.files import StoredFile, parse_number
from hf_flash.base.installing import UPDATE
from hf_flash.errors import StoreFormatError, StoreVersionError
from hf_flash.store.codecs import codec_of
from hf_flash.store.names import ALIGNMENT, HALVES_VERSION, NEWEST_VERSION, PARTS_VERSION, PLACED_VERSION
from hf_flash.store.safetensors_files import Rows, TensorSpec, data_offset, read_tensor
from hf_flash.store.unit import TWO_MATRICES, Part, Role, UnitLayout, parse_parts

_MOST: Final = 1 << 24  # limit for neurons, layers and columns: arrays of this length are read at once

Tensors = Mapping[str, tuple[TensorSpec, int]]


@dataclass(frozen=True)
class LayerStore:
    """Where one layer's bundles lie. Row `i` starts at byte `offset + i * unit.row_bytes` of `path`.

    Attributes:
        key: the name of the tensor with the bundles.
        d_ff: neurons.
        unit: the layout of a neuron.
        names: names of the matrices in the plain checkpoint, one for each of `unit.parts`.
        place: the row of each neuron, int32 [d_ff]; `None`: the row is the neuron's id.
    """

    index: int
    path: Path
    offset: int
    key: str
    d_ff: int
    unit: UnitLayout
    names: tuple[str, ...]
    crc32: str
    place: npt.NDArray[np.int32] | None = field(default=None, compare=False)

    @property
    def d_model(self) -> int:
        return self.unit.width

    @property
    def dtype(self) -> torch.dtype:
        return self.unit.dtype

    @property
    def bundle_bytes(self) -> int:
        return self.unit.row_bytes

    @property
    def nbytes(self) -> int:
        return self.d_ff * self.unit.row_bytes

    @property
    def prefix(self) -> str:
        """The prefix of the names of this layer's predictor tensors."""
        return self.key.removesuffix(".bundles")

    @property
    def spec(self) -> TensorSpec:
        """Dtype and shape of the tensor with the bundles."""
        return self.unit.dtype, (self.d_ff, self.unit.numbers)

    def name(self, role: Role) -> str:
        """Return the name of a matrix in the plain checkpoint."""
        return self.names[self.unit.roles.index(role)]

    def parts_of(self, name: str) -> list[Part]:
        """Return the parts that a matrix of the plain checkpoint holds: one, or two that share it."""
        return [part for part, matrix in zip(self.unit.parts, self.names, strict=True) if matrix == name]

    @property
    def plain_specs(self) -> dict[str, TensorSpec]:
        """Names, dtype and shapes of the matrices in the plain checkpoint."""
        shapes = (part.plain_shape(self.d_ff, self.unit.width) for part in self.unit.parts)
        return {name: (self.unit.dtype, shape) for name, shape in zip(self.names, shapes, strict=True)}

    def rows(self, columns: slice = slice(None), *, by_neuron: bool = True) -> Rows:
        """Return the bundles, [d_ff, unit.numbers] or some columns of them, by neuron or as on flash. Slicing reads rows.

        Raises:
            StoreReadError, StoreMissingError: the file cannot be opened now. Slicing may raise a StoreReadError too.
        """
        return Rows(StoredFile(self.path), self.spec, self.offset, columns, self.place if by_neuron else None)

    def part(self, role: Role) -> Rows:
        """Return one part of every neuron, [d_ff, d_model], by neuron; a part stored by column comes transposed."""
        return self.rows(self.unit.columns(role))

    def bundles(self) -> torch.Tensor:
        """Read all bundles into memory, in their order on flash, [d_ff, unit.numbers]."""
        return self.rows(by_neuron=False)[:]


def check_version(path: Path, metadata: Mapping[str, str]) -> None:
    """Refuse a file of a format version that this program does not know."""
    text = metadata.get("format_version", "")
    version = parse_number(text)
    if version is None:
        raise StoreFormatError("the format version is missing or not a number", where=path, got=repr(text[:80]))
    if version > NEWEST_VERSION:
        raise StoreVersionError(
            "this store was written by a newer hf_flash",
            where=path,
            expected=f"format version up to {NEWEST_VERSION}",
            got=version,
            hint=UPDATE,
        )


def layer_of(path: Path, tensors: Tensors, metadata: Mapping[str, str]) -> LayerStore:
    """Check one layer file against the format, and return what it holds.

    Args:
        tensors: the tensors in its header.
        metadata: the metadata in its header under our prefix, without the prefix.

    Raises:
        StoreFormatError: the file does not follow the format; the message says how.
    """
    version = parse_number(metadata.get("format_version")) or 0
    parts = _parts_of(path, metadata, version)
    keys = [name for name in tensors if name.endswith(".bundles")]
    lacking = [k for k in (*(part.role for part in parts), "crc32") if k not in metadata]
    sizes = {k: parse_number(metadata.get(k)) for k in ("layer", "layers", "d_model", "d_ff", "format_version")}
    lacking += [k for k, value in sizes.items() if value is None or value > _MOST or (value == 0 and k != "layer")]
    if len(keys) != 1 or lacking:
        raise StoreFormatError(
            "not a flash layer file",
            where=path,
            expected="one tensor `*.bundles` and its metadata",
            got=f"tensors {sorted(tensors)[:10]}; metadata {dict(metadata)}"[:1000],
        )
    (dtype, shape), offset = tensors[keys[0]]
    index, d_model, d_ff = (int(sizes[k] or 0) for k in ("layer", "d_model", "d_ff"))
    if shape != (d_ff, len(parts) * d_model) or codec_of(dtype) is None:
        raise StoreFormatError(
            "the bundles have the wrong shape or dtype",
            where=f"{path}: {keys[0]}",
            expected=f"({d_ff}, {len(parts) * d_model}), floating point",
            got=f"{shape}, {dtype}",
        )
    if offset % ALIGNMENT:
        raise StoreFormatError(
            "the bundles are not aligned",
            where=f"{path}: {keys[0]}",
            expected=f"an offset that is a multiple of {ALIGNMENT}",
            got=offset,
            hint="the file was rewritten by another tool: repack the model",
        )
    names = _names_of(path, metadata, parts)
    place = _place_of(path, tensors, keys[0].removesuffix(".bundles") + ".place", version, d_ff)
    return LayerStore(index, path, offset, keys[0], d_ff, UnitLayout.of(parts, d_model, dtype), names, metadata["crc32"], place)


def parts_version(parts: tuple[Part, ...]) -> int:
    """Return the lowest format version that describes a list of parts."""
    return HALVES_VERSION if any(part.is_half for part in parts) else PARTS_VERSION


def _parts_of(path: Path, metadata: Mapping[str, str], version: int) -> tuple[Part, ...]:
    """Parse and check the parts that a layer file lists."""
    if version < PARTS_VERSION and "parts" not in metadata:
        return TWO_MATRICES
    parts = parse_parts(metadata.get("parts", ""))
    if parts is None or version < parts_version(parts):
        raise StoreFormatError(
            "the list of a bundle's parts is not valid",
            where=path,
            expected=f"`parts`, such as up:row,down:column, from format version {PARTS_VERSION} on",
            got=f"format version {version}, {ascii(metadata.get('parts'))[:80]}",
            hint="the file is damaged, or was rewritten by another tool: repack the model",
        )
    return parts


def _names_of(path: Path, metadata: Mapping[str, str], parts: tuple[Part, ...]) -> tuple[str, ...]:
    """Return the matrix name of each part. Halves must share one matrix, and no other parts may share theirs."""
    names = tuple(metadata[part.role] for part in parts)
    halves = {name for name, part in zip(names, parts, strict=True) if part.is_half}
    whole = [name for name, part in zip(names, parts, strict=True) if not part.is_half]
    if len(halves) > 1 or len(halves | set(whole)) < len(halves) + len(whole):
        raise StoreFormatError(
            "the matrices of a layer are not named as its parts share them",
            where=path,
            expected="one name for parts that are halves of a matrix, and one for each other part",
            got=", ".join(f"{part.role}: {ascii(name)[:80]}" for name, part in zip(names, parts, strict=True)),
            hint="the file is damaged, or was rewritten by another tool: repack the model",
        )
    return names


def _place_of(path: Path, tensors: Tensors, key: str, version: int, d_ff: int) -> npt.NDArray[np.int32] | None:
    """Read and check the row of each neuron; `None` if rows are in the order of ids."""

    def wrong(what: str, expected: object, got: object) -> StoreFormatError:
        hint = "the file is damaged, or was rewritten by another tool: repack the model"
        return StoreFormatError(what, where=f"{path}: {key}", expected=expected, got=got, hint=hint)

    if version < PARTS_VERSION and (key in tensors) != (version == PLACED_VERSION):  # else bundles of other neurons are read
        raise wrong(
            "the format version and the tensors do not agree on whether neurons have places",
            f"this tensor from format version {PLACED_VERSION} on, and not before",
            f"format version {version}, tensors {sorted(tensors)}",
        )
    if key not in tensors:
        return None
    (dtype, shape), offset = tensors[key]
    if (dtype, shape) != (torch.int32, (d_ff,)):
        raise wrong("the places of the neurons have the wrong shape or dtype", f"({d_ff},), int32", f"{shape}, {dtype}")
    with StoredFile(path) as file:
        place = read_tensor(file, (dtype, shape), offset).numpy()
    found = np.unique(place[(place >= 0) & (place < d_ff)])
    if len(found) < d_ff:
        raise wrong("the places of the neurons are no permutation", f"every number below {d_ff} once", f"{len(found)} of them")
    return place


def crc_of_file(path: Path) -> str:
    """Return the CRC-32 of everything after the header, in 8 hex digits."""
    crc = 0
    with StoredFile(path) as file:
        for block in file.blocks(data_offset(file)):
            crc = zlib.crc32(block.data, crc)
    return f"{crc:08x}"
