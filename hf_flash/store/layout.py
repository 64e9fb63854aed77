"""The store: FFN weights on flash, one neuron a row (contract C6).

A repacked checkpoint is an ordinary folder of safetensors files, all of them listed in `model.safetensors.index.json`:

    model-00001-of-00001.safetensors        everything but the FFN matrices, under the names of the source, and a
                                            zero-size "tombstone" in place of every FFN matrix: a loader that does not
                                            know hf_flash then fails on the shape instead of making up random weights,
                                            and names a tensor that says what is missing
    flash-layer-00000.safetensors           one file a layer with `<prefix>.fc1.bundles`, and `<prefix>.fc1.place` if its
                                            neurons are not in the order of their ids (calibration/placement.py)
    flash-predictor-int4-g64.safetensors    what a predictor needs, per layer
    flash-calibration.safetensors           what was measured on text, per layer (calibration/job.py); only after calibration

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

import os
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from hf_flash.base.files import StoredFile, absolute, check_inside, exists, listed_files, listing, number, read_json
from hf_flash.errors import StoreFormatError, StoreMissingError, StoreVersionError
from hf_flash.store.safetensors_files import DTYPE_NAMES, Rows, TensorSpec, data_offset, header_digest, read_header, read_tensor

FORMAT_VERSION: Final = 1
PLACED_VERSION: Final = 2  # of layer files with a `place`: each file has the lowest version that describes it
ALIGNMENT: Final = 4096
INDEX_NAME: Final = "model.safetensors.index.json"
LAYER_FILE: Final = "flash-layer-{:05d}.safetensors"
PREDICTOR_FILE: Final = "flash-predictor-{}.safetensors"
CALIBRATION_FILE: Final = "flash-calibration.safetensors"
META: Final = "hf_flash."
HEADERS: Final = "hf_flash_headers"  # in the index's metadata: what identifies each file of other weights, by name
NOTICE: Final = "this model needs hf_flash: pip install hf-flash, then import hf_flash before loading it"  # an empty tensor
_MOST: Final = 1 << 24  # neurons, or layers, or columns: what is as long as this is read at once
_VARIANT: Final = re.compile(r"int4-g[1-9][0-9]{0,5}|int8|lowrank")


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

    def rows(self, columns: slice = slice(None), *, by_neuron: bool = True) -> Rows:
        """The bundles, [d_ff, 2 * d_model] or some columns of them, by neuron or as they lie; read by slices.

        Raises:
            StoreReadError, StoreMissingError: the file cannot be opened now, and so when rows are read.
        """
        spec = self.dtype, (self.d_ff, 2 * self.d_model)
        return Rows(StoredFile(self.path), spec, self.offset, columns, self.place if by_neuron else None)

    def bundles(self) -> torch.Tensor:
        """All of them in memory, as they lie on flash, [d_ff, 2 * d_model]."""
        return self.rows(by_neuron=False)[:]

    def up(self) -> Half:
        """The up projection by neuron, [d_ff, d_model]."""
        return self.rows(slice(self.d_model))

    def down(self) -> Half:
        """The down projection by neuron, [d_ff, d_model]: transposed."""
        return self.rows(slice(self.d_model, None))


Half = Rows  # half of a layer's bundles, [d_ff, d_model], by neuron: fetched by slices of ids


@dataclass(frozen=True)
class FlashStore:
    """An opened and checked store. Holds no file handle."""

    layers: tuple[LayerStore, ...]
    predictors: Mapping[str, Path]  # variant, such as "int4-g64" -> file
    calibration: Path | None
    others: tuple[Path, ...]  # files with the other weights of the checkpoint
    metadata: Mapping[str, str]  # source, revision, fingerprint
    strangers: tuple[Path, ...] = ()  # files that the index lists and that are none of the store's
    headers: Mapping[str, str] = field(default_factory=dict)  # what the index says of `others`, by file name

    @classmethod
    def open(cls, files: Iterable[str | os.PathLike[str]]) -> FlashStore:
        """Open the store that these safetensors files hold; files without bundles or predictors are passed over.

        Raises:
            StoreMissingError, StoreFormatError, StoreVersionError: with the file and what is wrong with it.
        """
        paths = [absolute(path) for path in files]
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
                _check_variant(path, own["predictor"], predictors)
                predictors[own["predictor"]] = path
                continue
            if "calibration" in own:
                if calibration is not None:
                    raise StoreFormatError("two files hold a calibration", where=path, got=calibration)
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
        _check_layers(layers, int(metadata["layers"]))
        headers = _headers(paths[0].parent / INDEX_NAME)
        return cls(tuple(layers[i] for i in sorted(layers)), predictors, calibration, tuple(others), metadata, (), headers)

    @classmethod
    def open_folder(cls, folder: str | os.PathLike[str]) -> FlashStore:
        """Open the store in a folder, a repacked checkpoint or an entry of the flash cache."""
        folder = absolute(folder)
        if not exists(folder) or not folder.is_dir():
            raise StoreMissingError("not a folder", where=folder)
        there = [path for path in listing(folder) if path.suffix == ".safetensors" and not path.name.startswith(".")]
        check_inside(folder, there)
        listed = listed_files(folder / INDEX_NAME) if exists(folder / INDEX_NAME) else []
        files = sorted({*listed, *there})
        if not files:
            raise StoreMissingError("no safetensors files", where=folder, expected=LAYER_FILE.format(0))
        store = cls.open(files)
        strangers = set(listed) - {*store.files, *store.others}
        return replace(store, strangers=tuple(sorted(strangers)))

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
        """Read every file, compare its checksum and what the index says of it; the problems found, one sentence each."""
        problems = [f"{path.name}: the index lists it, and it is no file of this store" for path in self.strangers]
        for path in progress([*self.files, *self.others]):
            expected, found = read_header(path)[1].get(META + "crc32"), crc_of_file(path)
            if found != expected:
                problems.append(f"{path.name}: CRC-32 of the data is {found}, the header says {expected}")
            elif self.headers.get(path.name, digest := header_digest(path)) != digest:
                problems.append(f"{path.name}: it is another file than the index was written for")
        return problems

    def check_others(self) -> None:
        """Refuse files with other weights that lack what the index lists (transformers makes it up), and damaged ones of ours.

        Raises:
            StoreFormatError: with the file.
        """
        index = self.layers[0].path.parent / INDEX_NAME
        if not exists(index):
            return
        hint = "download or repack the model again"
        others, weight_map = set(listed_files(index)) - set(self.files), read_json(index)["weight_map"]
        for path in sorted(others):
            lost = {name for name, file in weight_map.items() if file == path.name} - read_header(path)[0].keys()
            if lost:
                raise StoreFormatError("tensors are missing from a file", where=path, expected=sorted(lost)[:3], hint=hint)
            expected = self.headers.get(path.name)
            if expected and path in self.others and header_digest(path) != expected:
                raise StoreFormatError("another file than the index was written for", where=path, expected=expected, hint=hint)


def _headers(index: Path) -> dict[str, str]:
    """What identifies each file, as the index says, if there is one. Those of 0.1 say nothing."""
    metadata = read_json(index).get("metadata") if exists(index) else None
    found = metadata.get(HEADERS) if isinstance(metadata, dict) else None
    return {name: value for name, value in found.items() if isinstance(value, str)} if isinstance(found, dict) else {}


def _check_layers(layers: Mapping[int, LayerStore], count: int) -> None:
    """Refuse a store that lacks layers, or whose layers are not alike."""
    folder = next(iter(layers.values())).path.parent
    missing = [i for i in range(min(count, len(layers) + 5)) if i not in layers]
    if missing or max(layers) >= count:
        raise StoreMissingError(
            "layer files are missing from the store",
            where=folder,
            expected=f"{count} layers",
            got=f"{len(layers)}, without layers {missing} ...",
            hint="download or repack the model again",
        )
    shapes = {(layer.dtype, layer.d_ff, layer.d_model): layer.path.name for layer in layers.values()}
    if len(shapes) > 1:
        raise StoreFormatError("layers of different dtypes or shapes", where=folder, got=shapes)
    names = [name for layer in layers.values() for name in (layer.key, layer.up_name, layer.down_name)]
    if len(set(names)) < len(names):
        raise StoreFormatError("layers that claim the same tensors", where=folder, got=sorted(names)[:10])


def _check_variant(path: Path, variant: str, others: Mapping[str, Path]) -> None:
    if not _VARIANT.fullmatch(variant):
        raise StoreFormatError("no such predictor", where=path, expected="int4-gN, int8 or lowrank", got=ascii(variant)[:80])
    if variant in others:
        raise StoreFormatError("two files hold the same predictor", where=path, got=others[variant])


def _check_version(path: Path, own: Mapping[str, str]) -> None:
    text = own.get("format_version", "")
    version = number(text)
    if version is None:
        raise StoreFormatError("the format version is missing or not a number", where=path, got=repr(text[:80]))
    if version > PLACED_VERSION:
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
    sizes = {k: number(own.get(k)) for k in ("layer", "layers", "d_model", "d_ff", "format_version")}
    lacking += [k for k, value in sizes.items() if value is None or value > _MOST or (value == 0 and k != "layer")]
    if len(keys) != 1 or lacking:
        raise StoreFormatError(
            "not a flash layer file",
            where=path,
            expected="one tensor `*.bundles` and its metadata",
            got=f"tensors {sorted(tensors)[:10]}; metadata {dict(own)}"[:1000],
        )
    (dtype, shape), offset = tensors[keys[0]]
    index, d_model, d_ff, version = (int(sizes[k] or 0) for k in ("layer", "d_model", "d_ff", "format_version"))
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
    place = _place_of(path, tensors, keys[0].removesuffix(".bundles") + ".place", version, d_ff)
    names = own["up"], own["down"], own["crc32"]
    return LayerStore(index, path, offset, keys[0], d_ff, d_model, dtype, *names, place)


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
    with StoredFile(path) as file:
        place = read_tensor(file, (dtype, shape), offset).numpy()
    found = np.unique(place[(place >= 0) & (place < d_ff)])
    if len(found) < d_ff:
        raise wrong("the places of the neurons are no permutation", f"every number below {d_ff} once", f"{len(found)} of them")
    return place


def crc_of_file(path: Path) -> str:
    """CRC-32 of everything behind the header."""
    crc = 0
    with StoredFile(path) as file:
        for block in file.blocks(data_offset(file)):
            crc = zlib.crc32(block.data, crc)
    return f"{crc:08x}"
