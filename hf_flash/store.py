"""The store: FFN weights on flash, one neuron a row (contract C6).

A repacked checkpoint is an ordinary folder of safetensors files, all of them listed in `model.safetensors.index.json`:

    model-00001-of-00001.safetensors        everything but the FFN matrices, under the names of the source, and a
                                            zero-size "tombstone" in place of every FFN matrix: a loader that does not
                                            know hf_flash then fails on the shape instead of making up random weights,
                                            and names a tensor that says what is missing
    flash-layer-00000.safetensors           one file a layer with `<prefix>.fc1.bundles`, and `<prefix>.fc1.place` if its
                                            neurons are not in the order of their ids (placement.py)
    flash-predictor-int4-g64.safetensors    what a predictor needs, per layer
    flash-calibration.safetensors           what was measured on text, per layer (calibrate.py); only after calibration

A *bundle* is what one neuron needs, side by side, so that one read fetches it (paper: section 3.2):

    bundles[d_ff, 2 * d_model]    row place[i] = up_proj[i, :] | down_proj[:, i]
    place[d_ff]                   int32, a permutation; left out where place[i] = i

Ids never change: predictors, biases, calibration and arithmetic know nothing of places, so that placing neurons changes
where bytes lie and nothing else. Only what reads bundles looks at `place`. What did not would take other neurons' weights, so
files with places have a format version of their own, which older readers refuse.

One file a layer, because the safetensors format allows no holes between tensors and every bundle tensor has to start on
4 KiB for direct I/O: the header is padded with spaces, which the format does allow. It also makes writing resumable.
The metadata of every file says which format version it is and has a CRC-32 of the data for `check`; that of a layer file
also says where it came from, and the names and shapes that `restore` needs.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open

from .errors import (
    StoreFormatError,
    StoreMissingError,
    StoreVersionError,
)

FORMAT_VERSION: Final = 1
PLACED_VERSION: Final = 2  # of layer files with a `place`: each file has the lowest version that describes it
ALIGNMENT: Final = 4096
INDEX_NAME: Final = "model.safetensors.index.json"
LAYER_FILE: Final = "flash-layer-{:05d}.safetensors"
PREDICTOR_FILE: Final = "flash-predictor-{}.safetensors"
CALIBRATION_FILE: Final = "flash-calibration.safetensors"
META: Final = "hf_flash."
NOTICE: Final = "this model needs hf_flash: pip install hf-flash, then import hf_flash before loading it"  # an empty tensor

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
    place: npt.NDArray[np.int32] | None = field(default=None, compare=False)  # row of each neuron; `None`: its id

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
        """The memory-mapped tensor as it lies on flash, [d_ff, 2 * d_model]. Reading it faults pages in; do not write."""
        with safe_open(self.path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(self.key)
        return tensor

    def up(self) -> Half:
        """The up projection by neuron, [d_ff, d_model]."""
        return Half(self.bundles()[:, : self.d_model], self.place)

    def down(self) -> Half:
        """The down projection by neuron, [d_ff, d_model]: transposed."""
        return Half(self.bundles()[:, self.d_model :], self.place)


class Half:
    """Half of a layer's bundles, [d_ff, d_model], by neuron: memory-mapped, and fetched by slices of ids."""

    def __init__(self, rows: torch.Tensor, place: npt.NDArray[np.int32] | None) -> None:
        self._rows, self._place, self.shape = rows, place, rows.shape

    def __getitem__(self, ids: slice) -> torch.Tensor:
        return self._rows[ids] if self._place is None else self._rows[torch.from_numpy(self._place[ids])]


@dataclass(frozen=True)
class FlashStore:
    """An opened and checked store. Holds no file handle."""

    layers: tuple[LayerStore, ...]
    predictors: Mapping[str, Path]  # variant, such as "int4-g64" -> file
    calibration: Path | None
    others: tuple[Path, ...]  # files with the other weights of the checkpoint
    metadata: Mapping[str, str]  # source, revision, fingerprint

    @classmethod
    def open(cls, files: Iterable[str | os.PathLike[str]]) -> FlashStore:
        """Open the store that these safetensors files hold; files without bundles or predictors are passed over.

        Raises:
            StoreMissingError, StoreFormatError, StoreVersionError: with the file and what is wrong with it.
        """
        paths = [Path(path) for path in files]
        layers: dict[int, LayerStore] = {}
        predictors: dict[str, Path] = {}
        calibration: Path | None = None
        others: list[Path] = []
        metadata: dict[str, str] = {}
        for path in paths:
            if path.suffix != ".safetensors":
                continue
            tensors, meta = read_header(path)
            own = {k.removeprefix(META): v for k, v in meta.items() if k.startswith(META)}
            if not own:
                continue
            _check_version(path, own)
            if "rest" in own:
                others.append(path)
                continue
            if "predictor" in own:
                predictors[own["predictor"]] = path
                continue
            if "calibration" in own:
                calibration = path
                continue
            layer = _layer_of(path, tensors, own)
            if layer.index in layers:
                raise StoreFormatError("two files hold the same layer", where=path, got=layers[layer.index].path)
            layers[layer.index] = layer
            belongs = {k: own.get(k, "") for k in ("source", "revision", "fingerprint", "layers")}
            if metadata and metadata != belongs:
                raise StoreFormatError(
                    "a layer file of another checkpoint is among them", where=path, expected=metadata, got=belongs
                )
            metadata = belongs
        if not layers:
            raise StoreMissingError(
                "no flash layer files",
                where=paths[0].parent if paths else None,
                expected=LAYER_FILE.format(0),
                hint="a plain checkpoint is made one with `hf-flash repack FOLDER TARGET`",
            )
        count = int(metadata["layers"])
        missing = [i for i in range(min(count, len(layers) + 5)) if i not in layers]
        if missing or max(layers) >= count:
            raise StoreMissingError(
                "layer files are missing from the store",
                where=layers[min(layers)].path.parent,
                expected=f"{count} layers",
                got=f"{len(layers)}, without layers {missing} ...",
                hint="download or repack the model again",
            )
        shapes = {(layer.dtype, layer.d_ff, layer.d_model): layer.path.name for layer in layers.values()}
        if len(shapes) > 1:
            raise StoreFormatError("layers of different dtypes or shapes", where=layers[0].path.parent, got=shapes)
        return cls(tuple(layers[i] for i in range(count)), predictors, calibration, tuple(others), metadata)

    @classmethod
    def open_folder(cls, folder: str | os.PathLike[str]) -> FlashStore:
        """Open the store in a folder, a repacked checkpoint or an entry of the flash cache."""
        folder = Path(folder)
        if not folder.is_dir():
            raise StoreMissingError("not a folder", where=folder)
        listed: set[Path] = set()
        if (folder / INDEX_NAME).exists():
            listed = set(listed_files(folder / INDEX_NAME))
        files = sorted(listed | set(folder.glob("*.safetensors")))
        if not files:
            raise StoreMissingError("no safetensors files", where=folder, expected=LAYER_FILE.format(0))
        return cls.open(files)

    @property
    def files(self) -> list[Path]:
        calibration = [] if self.calibration is None else [self.calibration]
        return [layer.path for layer in self.layers] + list(self.predictors.values()) + calibration

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    @property
    def ffn_names(self) -> set[str]:
        """Names of the FFN matrices in the plain checkpoint."""
        return {name for layer in self.layers for name in (layer.up_name, layer.down_name)}

    @property
    def keys(self) -> set[str]:
        """Names of all tensors in the store's files."""
        return {name for path in self.files for name in read_header(path)[0]}

    def check_unchanged(self) -> None:
        """Refuse files that took the place of those that were opened: their neurons may lie elsewhere.

        Raises:
            StoreFormatError: with the file.
        """
        for layer in self.layers:
            if read_header(layer.path)[1].get(META + "crc32") != layer.crc32:
                raise StoreFormatError(
                    "the store changed while it was being opened", where=layer.path, hint="load the model again"
                )

    def check(self, progress: Any = iter) -> list[str]:
        """Read every file and compare its checksum; returns the problems found, one sentence each."""
        problems = []
        for path in progress([*self.files, *self.others]):
            expected, found = read_header(path)[1].get(META + "crc32"), crc_of_file(path)
            if found != expected:
                problems.append(f"{path.name}: CRC-32 of the data is {found}, the header says {expected}")
        return problems


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
    if int(version) > PLACED_VERSION:
        raise StoreVersionError(
            "this store was written by a newer hf_flash",
            where=path,
            expected=f"format version up to {PLACED_VERSION}",
            got=version,
            hint="pip install -U hf-flash",
        )


def _layer_of(path: Path, tensors: Mapping[str, tuple[TensorSpec, int]], own: Mapping[str, str]) -> LayerStore:
    """Check one layer file against the format."""
    keys = [name for name in tensors if name.endswith(".bundles")]
    lacking = [k for k in ("up", "down", "crc32") if k not in own]
    lacking += [k for k in ("layer", "layers", "d_model", "d_ff") if not own.get(k, "").isdecimal()]
    if len(keys) != 1 or lacking:
        raise StoreFormatError(
            "not a flash layer file",
            where=path,
            expected="one tensor `*.bundles` and its metadata",
            got=f"tensors {sorted(tensors)}; metadata {dict(own)}",
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
    place = _place_of(path, tensors, keys[0].removesuffix(".bundles") + ".place", int(own["format_version"]), d_ff)
    names = own["up"], own["down"], own["crc32"]
    return LayerStore(int(own["layer"]), path, offset, keys[0], d_ff, d_model, dtype, *names, place)


def _place_of(
    path: Path, tensors: Mapping[str, tuple[TensorSpec, int]], key: str, version: int, d_ff: int
) -> npt.NDArray[np.int32] | None:
    """The row of each neuron, as the file has it; `None` where rows are in the order of ids."""

    def wrong(what: str, expected: object, got: object) -> StoreFormatError:
        hint = "the file is damaged, or was rewritten by another tool: repack the model"
        return StoreFormatError(what, where=f"{path}: {key}", expected=expected, got=got, hint=hint)

    if (key in tensors) != (version >= PLACED_VERSION):  # bundles of other neurons would be read
        raise wrong(
            "the format version says otherwise than the tensors whether neurons have places of their own",
            f"this tensor from format version {PLACED_VERSION} on, and not before",
            f"format version {version}, tensors {sorted(tensors)}",
        )
    if key not in tensors:
        return None
    (dtype, shape), offset = tensors[key]
    if (dtype, shape) != (torch.int32, (d_ff,)):
        raise wrong("the places of the neurons have the wrong shape or dtype", f"({d_ff},), int32", f"{shape}, {dtype}")
    place = np.fromfile(path, dtype="<i4", count=d_ff, offset=offset)
    found = np.unique(place[(place >= 0) & (place < d_ff)])
    if len(found) < d_ff:
        raise wrong("the places of the neurons are no permutation", f"every number below {d_ff} once", f"{len(found)} of them")
    return place


def crc_of_file(path: Path) -> str:
    """CRC-32 of everything behind the header."""
    crc = 0
    with open(path, "rb") as file:
        file.seek(8 + struct.unpack("<Q", file.read(8))[0])
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


def listed_files(index: Path) -> list[Path]:
    """The files that a checkpoint's index lists, whether they exist or not."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise StoreFormatError("not a checkpoint index", where=index, expected="a weight_map from tensors to file names")
    return [index.parent / name for name in sorted(set(weight_map.values()))]
