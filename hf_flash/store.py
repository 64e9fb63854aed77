"""The store: FFN weights on flash, one neuron a row (contract C6).

A repacked checkpoint is an ordinary folder of safetensors files, all of them listed in `model.safetensors.index.json`:

    model-00001-of-00001.safetensors        everything but the FFN matrices, under the names of the source, and a
                                            zero-size "tombstone" in place of every FFN matrix: a loader that does not
                                            know hf_flash then fails on the shape instead of making up random weights
    flash-layer-00000.safetensors           one file a layer with one tensor, `<prefix>.fc1.bundles`
    flash-predictor-int4-g64.safetensors    what a predictor needs, per layer

A *bundle* is what one neuron needs, side by side, so that one read fetches it (paper: section 3.2):

    bundles[d_ff, 2 * d_model]    row i = up_proj[i, :] | down_proj[:, i]

One file a layer, because the safetensors format allows no holes between tensors and every bundle tensor has to start on
4 KiB for direct I/O: the header is padded with spaces, which the format does allow. It also makes writing resumable.
The metadata of a layer file says which format version it is, where it came from, the names and shapes that `restore`
needs, and a CRC-32 of the data for `check`.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open

from .errors import (
    DiskSpaceError,
    InvalidWeightsError,
    RepackError,
    StoreFormatError,
    StoreMissingError,
    StoreVersionError,
)
from .memory import aligned_empty, copied

FORMAT_VERSION: Final = 1
ALIGNMENT: Final = 4096
INDEX_NAME: Final = "model.safetensors.index.json"
LAYER_FILE: Final = "flash-layer-{:05d}.safetensors"
PREDICTOR_FILE: Final = "flash-predictor-{}.safetensors"
_META: Final = "hf_flash."
_PIECE_BYTES: Final = 4 << 20
_NO_CRC: Final = "0" * 8

DTYPES: Final[dict[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}
TensorSpec = tuple[torch.dtype, tuple[int, ...]]


@dataclass(frozen=True)
class LayerStore:
    """Where one layer's bundles lie. Row `i` starts at byte `offset + i * bundle_bytes` of `path`."""

    index: int
    path: Path
    offset: int
    key: str
    d_ff: int
    d_model: int
    dtype: torch.dtype
    up_name: str  # names of the two matrices in the plain checkpoint
    down_name: str
    crc32: str

    @property
    def bundle_bytes(self) -> int:
        return 2 * self.d_model * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return self.d_ff * self.bundle_bytes

    @property
    def prefix(self) -> str:
        """What the names of this layer's predictor tensors begin with."""
        return self.key.removesuffix(".bundles")

    def bundles(self) -> torch.Tensor:
        """The memory-mapped tensor, [d_ff, 2 * d_model] in `dtype`. Reading it faults pages in; do not write."""
        with safe_open(self.path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(self.key)
        return tensor


@dataclass(frozen=True)
class FlashStore:
    """An opened and checked store. Holds no file handle."""

    layers: tuple[LayerStore, ...]
    predictors: Mapping[str, Path]  # variant, such as "int4-g64" -> file
    metadata: Mapping[str, str]  # source, revision, fingerprint

    @classmethod
    def open(cls, files: Iterable[str | os.PathLike[str]]) -> FlashStore:
        """Open the store that these safetensors files hold; files without bundles or predictors are passed over.

        Raises:
            StoreMissingError, StoreFormatError, StoreVersionError: with the file and what is wrong with it.
        """
        layers: dict[int, LayerStore] = {}
        predictors: dict[str, Path] = {}
        metadata: dict[str, str] = {}
        for path in map(Path, files):
            if path.suffix != ".safetensors":
                continue
            tensors, meta = read_header(path)
            own = {k.removeprefix(_META): v for k, v in meta.items() if k.startswith(_META)}
            if not own:
                continue
            _check_version(path, own)
            if "predictor" in own:
                predictors[own["predictor"]] = path
                continue
            layer = _layer_of(path, tensors, own)
            if layer.index in layers:
                raise StoreFormatError("two files hold the same layer", where=path, got=layers[layer.index].path)
            layers[layer.index] = layer
            metadata = {k: own.get(k, "") for k in ("source", "revision", "fingerprint", "layers")}
        if not layers:
            raise StoreMissingError("no flash layer files", expected=LAYER_FILE.format(0), hint="repack the checkpoint")
        count = int(metadata["layers"])
        missing = sorted(set(range(count)) - set(layers))
        if missing or max(layers) >= count:
            raise StoreMissingError(
                "layer files are missing from the store",
                where=layers[min(layers)].path.parent,
                expected=f"{count} layers",
                got=f"{len(layers)}, without {missing}",
                hint="download or repack the model again",
            )
        return cls(tuple(layers[i] for i in range(count)), predictors, metadata)

    @classmethod
    def open_folder(cls, folder: str | os.PathLike[str]) -> FlashStore:
        """Open the store in a folder, a repacked checkpoint or an entry of the flash cache."""
        folder = Path(folder)
        if not folder.is_dir():
            raise StoreMissingError("no such folder", where=folder)
        listed: set[Path] = set()
        if (folder / INDEX_NAME).exists():
            listed = {folder / name for name in set(read_json(folder / INDEX_NAME)["weight_map"].values())}
        return cls.open(sorted(listed | set(folder.glob("flash-*.safetensors"))))

    @property
    def files(self) -> list[Path]:
        return [layer.path for layer in self.layers] + list(self.predictors.values())

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def check(self, progress: Any = iter) -> list[str]:
        """Read every layer and compare its checksum; returns the problems found, one sentence each."""
        return [
            f"{layer.path.name}: CRC-32 of the data is {found}, the header says {layer.crc32}"
            for layer in progress(self.layers)
            if (found := _crc_of_file(layer.path, layer.offset)) != layer.crc32
        ]


def read_header(path: Path) -> tuple[dict[str, tuple[TensorSpec, int]], dict[str, str]]:
    """Names, dtypes, shapes and absolute offsets of a safetensors file, and its metadata.

    The safetensors library validates the file first: magic, header size, overlaps, holes, truncation.
    """
    try:
        with safe_open(path, framework="pt"):
            pass
        with open(path, "rb") as file:
            size = struct.unpack("<Q", file.read(8))[0]
            header = json.loads(file.read(size))
    except FileNotFoundError as error:
        raise StoreMissingError(
            "a file of the checkpoint is not there", where=path, hint="download or repack the model again"
        ) from error
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise StoreFormatError(
            "not a valid safetensors file",
            where=path,
            got=str(error),
            hint="the file is damaged or incomplete: download or repack it again",
        ) from error
    meta = header.pop("__metadata__", {})
    unknown = {info["dtype"] for info in header.values()} - DTYPES.keys()
    if unknown:
        raise StoreFormatError("tensors of a dtype that hf_flash cannot carry", where=path, got=sorted(unknown))
    return {
        name: ((DTYPES[info["dtype"]], tuple(info["shape"])), 8 + size + info["data_offsets"][0])
        for name, info in header.items()
    }, meta


def _check_version(path: Path, own: Mapping[str, str]) -> None:
    version = own.get("format_version", "")
    if not version.isdigit():
        raise StoreFormatError("the format version is missing or not a number", where=path, got=repr(version))
    if int(version) > FORMAT_VERSION:
        raise StoreVersionError(
            "this store was written by a newer hf_flash",
            where=path,
            expected=f"format version up to {FORMAT_VERSION}",
            got=version,
            hint="pip install -U hf-flash",
        )


def _layer_of(path: Path, tensors: Mapping[str, tuple[TensorSpec, int]], own: Mapping[str, str]) -> LayerStore:
    """Check one layer file against the format."""
    keys = [name for name in tensors if name.endswith(".bundles")]
    lacking = [k for k in ("layer", "layers", "d_model", "d_ff", "up", "down", "crc32") if k not in own]
    if len(keys) != 1 or lacking:
        raise StoreFormatError(
            "not a flash layer file",
            where=path,
            expected="one tensor `*.bundles` and its metadata",
            got=f"tensors {sorted(tensors)}, metadata without {lacking}",
        )
    (dtype, shape), offset = tensors[keys[0]]
    d_ff, d_model = int(own["d_ff"]), int(own["d_model"])
    if shape != (d_ff, 2 * d_model) or not dtype.is_floating_point:
        raise StoreFormatError(
            "the bundles have the wrong shape or dtype",
            where=f"{path}: {keys[0]}",
            expected=f"({d_ff}, {2 * d_model}), floating point",
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
    return LayerStore(int(own["layer"]), path, offset, keys[0], d_ff, d_model, dtype, own["up"], own["down"], own["crc32"])


# --- writing -------------------------------------------------------------------------------------------------------


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
    with writing(path, needed=end), open(temporary, "wb") as file:
        file.write(_encode(header))
        crc = written = 0
        for piece in pieces:
            data = piece.contiguous().reshape(-1).view(torch.uint8).numpy().data if piece.numel() else b""
            file.write(data)
            crc, written = zlib.crc32(data, crc), written + len(data)
        if written != end:
            raise RepackError("wrote another number of bytes than announced", where=path, expected=end, got=written)
        if _META + "crc32" in metadata:
            header["__metadata__"][_META + "crc32"] = f"{crc:08x}"
            file.seek(0)
            file.write(_encode(header))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _encode(header: dict[str, Any]) -> bytes:
    """The header, padded with spaces so that the data begins on `ALIGNMENT`."""
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


class writing:
    """Turns the operating system's errors while writing `path` into ours, and removes what was half written."""

    def __init__(self, path: Path, needed: int = 0) -> None:
        self.path, self.needed = path, needed

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            return
        self.path.with_name(self.path.name + ".tmp").unlink(missing_ok=True)
        if not isinstance(error, OSError) or isinstance(error, RepackError):
            return
        if error.errno in (28, 122):  # ENOSPC, EDQUOT
            raise DiskSpaceError(
                "the disk is full",
                where=self.path,
                expected=f"room for {self.needed} bytes",
                hint="free some space and run it again: finished layers are kept",
            ) from error
        raise RepackError(
            "cannot write",
            where=self.path,
            got=error.strerror or str(error),
            hint="check that the folder exists and that you may write there",
        ) from error


def layer_spec(up: TensorSpec, down: TensorSpec, up_name: str, down_name: str) -> tuple[torch.dtype, int, int]:
    """dtype, d_ff and d_model of a layer, from its two matrices in the plain checkpoint."""
    (dtype, up_shape), (down_dtype, down_shape) = up, down
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
    up: torch.Tensor,
    down: torch.Tensor,
    origin: Mapping[str, str],
) -> None:
    """Bundle one layer: `up` [d_ff, d_model] and `down` [d_model, d_ff] become `key` [d_ff, 2 * d_model] in `path`."""
    dtype, d_ff, d_model = layer_spec((up.dtype, tuple(up.shape)), (down.dtype, tuple(down.shape)), *names)
    metadata = {
        "format_version": str(FORMAT_VERSION),
        "layer": str(index),
        "layers": str(layers),
        "d_ff": str(d_ff),
        "d_model": str(d_model),
        "up": names[0],
        "down": names[1],
        "crc32": _NO_CRC,
        **origin,
    }
    write_safetensors(
        path, {key: (dtype, (d_ff, 2 * d_model))}, _bundle(up, down, names), {_META + k: v for k, v in metadata.items()}
    )


def _bundle(up: torch.Tensor, down: torch.Tensor, names: tuple[str, str]) -> Iterator[torch.Tensor]:
    """Rows of bundles, some MiB at a time. `down` is read once, in the order of its file, then transposed in memory.

    The same buffer is yielded again and again.
    """
    d_ff, d_model = up.shape
    down = copied(down)
    rows = min(d_ff, max(1, _PIECE_BYTES // (2 * d_model * up.dtype.itemsize)))
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
    """The two matrices of a plain checkpoint, `up` then `down`, as pieces for [`write_safetensors`]."""
    bundles = layer.bundles()
    yield bundles[:, : layer.d_model]
    yield bundles[:, layer.d_model :].T


def predictor_metadata(variant: str, fingerprint: str) -> dict[str, str]:
    return {
        _META + "format_version": str(FORMAT_VERSION),
        _META + "predictor": variant,
        _META + "fingerprint": fingerprint,
    }


def _crc_of_file(path: Path, offset: int) -> str:
    crc = 0
    with open(path, "rb") as file:
        file.seek(offset)
        while data := file.read(1 << 22):
            crc = zlib.crc32(data, crc)
    return f"{crc:08x}"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StoreMissingError("a file of the checkpoint is not there", where=path) from error
    except ValueError as error:
        raise StoreFormatError("not a JSON file", where=path, got=str(error)) from error
    if not isinstance(value, dict):
        raise StoreFormatError("not a JSON object", where=path, got=type(value).__name__)
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object so that it appears complete or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(temporary, path)
