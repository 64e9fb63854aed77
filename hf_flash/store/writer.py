"""Writing the files of a store (store/layout.py has the layout): streamed, checksummed, complete or not there at all."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from hf_flash.base.buffers import aligned_empty
from hf_flash.base.files import new_file, to_disk, writing
from hf_flash.errors import InvalidWeightsError, RepackError, StoreFormatError
from hf_flash.store.layout import ALIGNMENT, FORMAT_VERSION, META, PLACED_VERSION, LayerStore, crc_of_file
from hf_flash.store.safetensors_files import DTYPE_NAMES, PIECE_BYTES, Rows, TensorSpec, new_tensor, read_header

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
        pieces: their bytes in that order, in any pieces; only one piece is in memory at a time.
        metadata: text; a `hf_flash.crc32` in it is filled in with the CRC-32 of all the data.
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
            data = piece.contiguous().reshape(-1).view(torch.uint8).numpy().data if piece.numel() else b""
            file.write(data)
            crc, written = zlib.crc32(data, crc), written + len(data)
        if written != end:
            raise RepackError("wrote another number of bytes than announced", where=path, expected=end, got=written)
        if META + "crc32" in metadata:
            header["__metadata__"][META + "crc32"] = f"{crc:08x}"
            file.seek(0)
            file.write(_encode(header))
        to_disk(file)
    os.replace(temporary, path)


def _encode(header: dict[str, Any]) -> bytes:
    """The header, padded with spaces so that the data begins on `ALIGNMENT`."""
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def layer_spec(up: TensorSpec, down: TensorSpec, up_name: str, down_name: str) -> tuple[torch.dtype, int, int]:
    """dtype, d_ff and d_model of a layer, from its two matrices in the plain checkpoint."""
    (dtype, up_shape), (down_dtype, down_shape) = up, down
    if 0 in (*up_shape, *down_shape):
        raise StoreFormatError(
            "the FFN matrices are empty: this is a repacked checkpoint whose config does not say so",
            where=f"{up_name}, {down_name}",
            expected="a plain checkpoint, or a config with the repacked folder's own `quantization_config`",
            got=f"{list(up_shape)}, {list(down_shape)}",
            hint="load the repacked folder with its own config.json, or `hf_flash.restore` the plain checkpoint",
        )
    if (
        len(up_shape) != 2
        or down_shape != up_shape[::-1]
        or down_dtype != dtype
        or dtype not in (torch.float32, torch.float16, torch.bfloat16)
    ):
        raise StoreFormatError(
            "the FFN matrices do not fit together",
            where=f"{up_name}, {down_name}",
            expected="[d_ff, d_model] and [d_model, d_ff] in float32, float16 or bfloat16",
            got=f"{list(up_shape)} {dtype}, {list(down_shape)} {down_dtype}",
        )
    return dtype, up_shape[0], up_shape[1]


def write_layer(
    path: Path,
    index: int,
    layers: int,
    key: str,
    names: tuple[str, str],
    up: Rows | torch.Tensor,
    down: torch.Tensor,
    origin: Mapping[str, str],
) -> None:
    """Bundle one layer: `up` [d_ff, d_model] and `down` [d_model, d_ff] become `key` [d_ff, 2 * d_model] in `path`."""
    dtype, d_ff, d_model = layer_spec((up.dtype, tuple(up.shape)), (down.dtype, tuple(down.shape)), *names)
    numbers = {"layer": index, "layers": layers, "d_ff": d_ff, "d_model": d_model}
    metadata = _metadata(up=names[0], down=names[1], **origin, **{k: str(v) for k, v in numbers.items()})
    write_safetensors(path, {key: (dtype, (d_ff, 2 * d_model))}, _bundle(up, down, names), metadata)


def _bundle(up: Rows | torch.Tensor, down: torch.Tensor, names: tuple[str, str]) -> Iterator[torch.Tensor]:
    """Rows of bundles, some MiB at a time. `down` is in memory, or read once if it is mapped, and transposed there.

    The same buffer is yielded again and again.
    """
    d_ff, d_model = up.shape
    rows = min(d_ff, max(1, PIECE_BYTES // (2 * d_model * up.dtype.itemsize)))
    buffer = aligned_empty((rows, 2 * d_model), up.dtype)
    for start in range(0, d_ff, rows):
        block = buffer[: min(rows, d_ff - start)]
        block[:, :d_model] = up[start : start + rows]
        block[:, d_model:] = down[:, start : start + rows].T
        if not torch.isfinite(block).all():
            half = 0 if not torch.isfinite(block[:, :d_model]).all() else 1
            raise InvalidWeightsError(
                "the source weights contain NaN or infinite values",
                where=names[half],
                hint="the source is damaged: download it again",
            )
        yield block


def unbundle(layer: LayerStore) -> Iterator[torch.Tensor]:
    """The two matrices of a plain checkpoint, `up` then `down`, contiguous, one in memory at a time."""
    yield layer.up()[:]
    down, rows = new_tensor((layer.d_model, layer.d_ff), layer.dtype), layer.down()
    step = max(1, PIECE_BYTES // layer.bundle_bytes)
    for at in range(0, layer.d_ff, step):
        down[:, at : at + step] = rows[at : at + step].T
    yield down


def place_layer(layer: LayerStore, place: npt.NDArray[np.int32]) -> None:
    """Write a layer file again with neuron `i` in row `place[i]`. It is the old file until it is the new one, whole.

    Args:
        place: [d_ff], a permutation.

    Raises:
        StoreFormatError: the old file is damaged: a new checksum would hide that.
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
            yield bundles.gather(part, new_tensor((len(part), 2 * layer.d_model), layer.dtype))
        yield torch.from_numpy(place)

    specs = {
        layer.key: (layer.dtype, (layer.d_ff, 2 * layer.d_model)),
        f"{layer.prefix}.place": (torch.int32, (layer.d_ff,)),
    }
    metadata = read_header(layer.path)[1] | {META + "format_version": str(PLACED_VERSION), META + "crc32": _NO_CRC}
    write_safetensors(layer.path, specs, pieces(), metadata)


def predictor_metadata(variant: str, store: Mapping[str, str]) -> dict[str, str]:
    """Metadata of a predictor file: what it is, and the checkpoint it was made from, as the store's metadata has it."""
    return _metadata(predictor=variant, fingerprint=store["fingerprint"], revision=store["revision"])


def calibration_metadata(report: str, store: Mapping[str, str]) -> dict[str, str]:
    """Metadata of a calibration file: what was measured, as JSON, and the checkpoint it was measured on."""
    return _metadata(calibration=report, fingerprint=store["fingerprint"], revision=store["revision"])


def rest_metadata() -> dict[str, str]:
    """Metadata of a file with the weights that are not FFN matrices."""
    return _metadata(rest="1")


def _metadata(**values: str) -> dict[str, str]:
    return {META + k: v for k, v in {"format_version": str(FORMAT_VERSION), "crc32": _NO_CRC, **values}.items()}
