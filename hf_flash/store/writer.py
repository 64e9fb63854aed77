"""Writing the files of a store (store/layout.py has the layout): streamed, checksummed, written whole or not at all."""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from hf_flash.base.buffers import aligned_empty
from hf_flash.base.files import new_file, sync_to_disk, writing
from hf_flash.errors import InvalidWeightsError, RepackError, StoreFormatError
from hf_flash.store.codecs import codec_of
from hf_flash.store.layer_file import LayerStore, crc_of_file, parts_version
from hf_flash.store.names import ALIGNMENT, FORMAT_VERSION, META, PLACED_VERSION
from hf_flash.store.safetensors_files import DTYPE_NAMES, PIECE_BYTES, Rows, TensorSpec, new_tensor, read_header
from hf_flash.store.unit import COLUMN, ROW, TWO_MATRICES, Part, UnitLayout

_SHAPES: Final = {ROW: "[d_ff, d_model]", COLUMN: "[d_model, d_ff]"}  # of matrices that have one part each
_NO_CRC: Final = "0" * 8


def write_safetensors(
    path: Path,
    specs: Mapping[str, TensorSpec],
    pieces: Iterable[torch.Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Stream tensors into a safetensors file that appears under its name only when it is complete.

    Args:
        specs: dtype and shape of every tensor, in the order of the file.
        pieces: the data in that order, cut into any pieces; only one piece is in memory at a time.
        metadata: text by key; if it has `hf_flash.crc32`, that is set to the CRC-32 of all the data.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name, (dtype, shape) in specs.items():
        start, end = end, end + dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    temporary = path.with_name(path.name + ".tmp")
    with writing(path, needed=end), new_file(temporary) as file:
        file.write(_encode(header))
        crc = written = 0
        for piece in pieces:
            data = piece.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data if piece.numel() else b""
            file.write(data)
            crc, written = zlib.crc32(data, crc), written + len(data)
        if written != end:
            raise RepackError("wrote another number of bytes than announced", where=path, expected=end, got=written)
        if META + "crc32" in metadata:
            header["__metadata__"][META + "crc32"] = f"{crc:08x}"
            file.seek(0)
            file.write(_encode(header))
        sync_to_disk(file)
    os.replace(temporary, path)


def _encode(header: dict[str, Any]) -> bytes:
    """Encode the header, padded with spaces so that the data begins on a multiple of `ALIGNMENT`."""
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def plain_unit(parts: Sequence[Part], specs: Sequence[TensorSpec], names: Sequence[str]) -> tuple[UnitLayout, int]:
    """Return the layout of a layer's units, and how many it has, from its matrices in the plain checkpoint.

    Args:
        specs, names: of the matrices, one for each part.

    Raises:
        StoreFormatError: the matrices are empty, or do not fit together.
    """
    found = ", ".join(f"{list(shape)} {dtype}" for dtype, shape in specs)
    if any(0 in shape for _, shape in specs):
        raise StoreFormatError(
            "the FFN matrices are empty: this is a repacked checkpoint whose config does not say so",
            where=", ".join(names),
            expected="a plain checkpoint, or a config with the repacked folder's own `quantization_config`",
            got=", ".join(f"{list(shape)}" for _, shape in specs),
            hint="load the repacked folder with its own config.json, or `hf_flash.restore` the plain checkpoint",
        )
    dtype, shape = specs[0]
    by_unit = parts[0].sizes(shape) if len(shape) == 2 else (0, 0)
    fits = len(shape) == 2 and codec_of(dtype) is not None
    if not fits or any(spec != (dtype, part.plain_shape(*by_unit)) for part, spec in zip(parts, specs, strict=True)):
        shapes = [_SHAPES.get(part.stored, "[2 * d_ff, d_model]") for part in parts]
        raise StoreFormatError(
            "the FFN matrices do not fit together",
            where=", ".join(names),
            expected=f"{', '.join(shapes[:-1])} and {shapes[-1]} in float32, float16 or bfloat16",
            got=found,
        )
    return UnitLayout.of(parts, by_unit[1], dtype), by_unit[0]


def write_layer(
    path: Path,
    index: int,
    layers: int,
    key: str,
    parts: Sequence[Part],
    names: Sequence[str],
    matrices: Sequence[Rows | torch.Tensor],
    origin: Mapping[str, str],
) -> None:
    """Bundle one layer: its plain matrices become `key` [d_ff, unit.numbers] in `path`.

    Args:
        names, matrices: one for each part. A matrix with a neuron in each column is a tensor, in memory or mapped.
        origin: metadata that says where the weights come from.
    """
    unit, d_ff = plain_unit(parts, [(matrix.dtype, tuple(matrix.shape)) for matrix in matrices], names)
    numbers = {"layer": index, "layers": layers, "d_ff": d_ff, "d_model": unit.width}
    named = dict(zip(unit.roles, names, strict=True))
    metadata = _metadata(**named, **origin, **{k: str(v) for k, v in numbers.items()})
    if unit.parts != TWO_MATRICES:
        metadata |= {META + "parts": unit.text, META + "format_version": str(parts_version(unit.parts))}
    write_safetensors(path, {key: (unit.dtype, (d_ff, unit.numbers))}, _bundle(unit, d_ff, names, matrices), metadata)


def _bundle(
    unit: UnitLayout, d_ff: int, names: Sequence[str], matrices: Sequence[Rows | torch.Tensor]
) -> Iterator[torch.Tensor]:
    """Yield rows of bundles, some MiB at a time. All pieces share one buffer."""
    rows = min(d_ff, max(1, PIECE_BYTES // unit.row_bytes))
    buffer = aligned_empty((rows, unit.numbers), unit.dtype)
    sources = [_neurons(part, matrix, rows) for part, matrix in zip(unit.parts, matrices, strict=True)]
    for neurons in zip(*sources, strict=True):
        block = buffer[: len(neurons[0])]
        for role, rows_of_part in zip(unit.roles, neurons, strict=True):
            block[:, unit.columns(role)] = rows_of_part
        if not all(math.isfinite(value) for value in torch.aminmax(block)):  # with a NaN, both are NaN
            finite = [bool(torch.isfinite(block[:, unit.columns(role)]).all()) for role in unit.roles]
            raise InvalidWeightsError(
                "the source weights contain NaN or infinite values",
                where=names[finite.index(False)],
                hint="the source is damaged: download it again",
            )
        yield block


def _neurons(part: Part, matrix: Rows | torch.Tensor, rows: int) -> Iterator[torch.Tensor]:
    """Yield one part of every neuron, [up to `rows`, width] at a time. The next piece may overwrite it."""
    units = part.units(matrix.shape)
    pieces = (slice(at, min(at + rows, units.stop)) for at in range(units.start, units.stop, rows))
    if isinstance(matrix, torch.Tensor) and part.stored == COLUMN:
        yield from (_transposed(matrix[:, piece]) for piece in pieces)
    elif isinstance(matrix, torch.Tensor) or part.is_half:
        yield from (matrix[piece] for piece in pieces)
    else:
        yield from matrix.pieces(rows)


def _transposed(matrix: torch.Tensor) -> torch.Tensor:
    """Make a contiguous transposed copy of some MiB. torch transposes a contiguous matrix eight times faster."""
    return matrix.contiguous().T.contiguous()


def unbundle(layer: LayerStore) -> Iterator[torch.Tensor]:
    """Yield a layer's matrices as in the plain checkpoint, in the order of the parts, contiguous, one in memory at a time."""
    for name, (dtype, shape) in layer.plain_specs.items():
        matrix = new_tensor(shape, dtype)
        for part in layer.parts_of(name):
            _fill(part.by_unit(matrix), layer.part(part.role), max(1, PIECE_BYTES // layer.bundle_bytes))
        yield matrix


def _fill(by_unit: torch.Tensor, rows: Rows, step: int) -> None:
    """Copy rows into `by_unit`, a view of the matrix that they belong to, `step` rows at a time."""
    by_column = not by_unit.is_contiguous()
    for at in range(0, len(by_unit), step):
        some = rows[at : at + step]
        if by_column:
            by_unit.T[:, at : at + step] = _transposed(some)
        else:
            by_unit[at : at + step] = some


def place_layer(layer: LayerStore, place: npt.NDArray[np.int32]) -> None:
    """Write a layer file again with neuron `i` in row `place[i]`. One step replaces the old file, once the new one is complete.

    Args:
        place: int32 [d_ff], a permutation.

    Raises:
        StoreFormatError: the old file is damaged, which a new checksum would hide.
    """
    order = np.argsort(place)  # the neuron of each row
    source = order if layer.place is None else layer.place[order]
    bundles, rows = layer.rows(by_neuron=False), max(1, PIECE_BYTES // layer.bundle_bytes)
    if (found := crc_of_file(layer.path)) != layer.crc32:
        raise StoreFormatError(
            "the layer file is damaged",
            where=layer.path,
            expected=f"CRC-32 {layer.crc32}",
            got=found,
            hint="download or repack the model again",
        )

    def pieces() -> Iterator[torch.Tensor]:
        for at in range(0, layer.d_ff, rows):
            part = source[at : at + rows]
            yield bundles.gather(part, new_tensor((len(part), layer.unit.numbers), layer.dtype))
        yield torch.from_numpy(place)

    specs = {layer.key: layer.spec, f"{layer.prefix}.place": (torch.int32, (layer.d_ff,))}
    version = PLACED_VERSION if layer.unit.parts == TWO_MATRICES else parts_version(layer.unit.parts)
    metadata = read_header(layer.path)[1] | {META + "format_version": str(version), META + "crc32": _NO_CRC}
    write_safetensors(layer.path, specs, pieces(), metadata)


def predictor_metadata(variant: str, store: Mapping[str, str]) -> dict[str, str]:
    """Make the metadata of a predictor file: its variant, and the checkpoint it was made from, which is the store's."""
    return _metadata(predictor=variant, fingerprint=store["fingerprint"], revision=store["revision"])


def calibration_metadata(report: str, store: Mapping[str, str]) -> dict[str, str]:
    """Make the metadata of a calibration file: what was measured, as JSON, and the checkpoint it was measured on."""
    return _metadata(calibration=report, fingerprint=store["fingerprint"], revision=store["revision"])


def rest_metadata() -> dict[str, str]:
    """Make the metadata of a file with the weights that are not FFN matrices."""
    return _metadata(rest="1")


def _metadata(**values: str) -> dict[str, str]:
    return {META + k: v for k, v in {"format_version": str(FORMAT_VERSION), "crc32": _NO_CRC, **values}.items()}
