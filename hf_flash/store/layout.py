"""The store: feed-forward weights on flash, one neuron a row (contract C6).

A repacked checkpoint is an ordinary folder of safetensors files, all of them listed in `model.safetensors.index.json`:

    model-00001-of-00001.safetensors        everything but the FFN matrices, under the names of the source, and a
                                            zero-size "tombstone" in place of every FFN matrix: a loader that does not
                                            know hf_flash then fails on the shape instead of making up random weights,
                                            and names a tensor that says what is missing
    flash-layer-00000.safetensors           one file a layer with `<prefix>.bundles`, and `<prefix>.place` if its neurons
                                            are not in the order of their ids (calibration/placement.py)
    flash-predictor-int4-g64.safetensors    what a predictor needs, per layer
    flash-calibration.safetensors           what was measured on text, per layer; only after calibration

A *bundle* holds everything one neuron needs, side by side, so that one read fetches it (paper: section 3.2). It has a row or a
column of each matrix of the layer, as the layer's `UnitLayout` (unit.py) says:

    bundles[d_ff, parts * d_model]    row place[i] = up[i, :] | down[:, i], in gated layers gate[i, :] before them
    place[d_ff]                       int32, a permutation; left out where place[i] = i

Ids never change: predictors, biases, calibration and arithmetic know nothing of places, so placing neurons changes where bytes
lie and nothing else. Only code that reads bundles looks at `place`.

A program that does not know about places or other parts would use the weights of other neurons. So each file has the lowest
format version that describes it, and older readers refuse newer versions: 1 plain, 2 with places, 3 with a list of parts, and
4 with halves of a matrix in that list.

Each layer has its own file, because the safetensors format allows no holes between tensors and every bundle tensor has to start
on 4 KiB for direct I/O: the header is padded with spaces, which the format allows. It also makes writing resumable.
The metadata of every file holds its format version and a CRC-32 of the data for `check`; that of a layer file also says where
it came from, and has the names and shapes that `restore` needs (layer_file.py).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from hf_flash.base.files import absolute, check_inside, exists, list_folder, listed_files, read_json
from hf_flash.errors import StoreFormatError, StoreMissingError
from hf_flash.store.layer_file import LayerStore, check_version, crc_of_file, layer_of
from hf_flash.store.names import HEADERS, INDEX_NAME, LAYER_FILE, META
from hf_flash.store.safetensors_files import header_digest, read_header
from hf_flash.store.unit import UnitLayout

_VARIANT: Final = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")  # becomes part of a file name; predictors/choice.py knows the variants
_LONGEST_VARIANT: Final = 40


@dataclass(frozen=True)
class FlashStore:
    """An opened and checked store. Holds no file handle."""

    layers: tuple[LayerStore, ...]
    predictors: Mapping[str, Path]  # variant, such as "int4-g64" -> file
    calibration: Path | None
    others: tuple[Path, ...]  # files with the other weights of the checkpoint
    metadata: Mapping[str, str]  # source, revision, fingerprint
    strangers: tuple[Path, ...] = ()  # files that the index lists but that do not belong to the store
    headers: Mapping[str, str] = field(default_factory=dict)  # digest of each of `others` in the index, by file name

    @classmethod
    def open(cls, files: Iterable[str | os.PathLike[str]]) -> FlashStore:
        """Open the store that these safetensors files hold; files that belong to no store are skipped.

        Raises:
            StoreMissingError, StoreFormatError, StoreVersionError: a file is missing, not valid, or of a newer version; the
                message names it.
        """
        paths = [absolute(path) for path in files]
        found = _Found()
        for path in paths:
            if path.suffix == ".safetensors":
                found.add(path)
        if not found.layers:
            raise StoreMissingError(
                "no flash layer files",
                where=paths[0].parent if paths else None,
                expected=LAYER_FILE.format(0),
                hint="a plain checkpoint is made one with `hf-flash repack FOLDER TARGET`",
            )
        _check_layers(found.layers, int(found.metadata["layers"]))
        layers = tuple(found.layers[i] for i in sorted(found.layers))
        headers = _headers(paths[0].parent / INDEX_NAME)
        return cls(layers, found.predictors, found.calibration, tuple(found.others), found.metadata, (), headers)

    @classmethod
    def open_folder(cls, folder: str | os.PathLike[str]) -> FlashStore:
        """Open the store in a folder: a repacked checkpoint, or an entry of the flash cache."""
        folder = absolute(folder)
        if not exists(folder) or not folder.is_dir():
            raise StoreMissingError("not a folder", where=folder)
        present = [path for path in list_folder(folder) if path.suffix == ".safetensors" and not path.name.startswith(".")]
        check_inside(folder, present)
        listed = listed_files(folder / INDEX_NAME) if exists(folder / INDEX_NAME) else []
        files = sorted({*listed, *present})
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
    def unit(self) -> UnitLayout:
        """The layout of a neuron, the same in every layer."""
        return self.layers[0].unit

    @property
    def widths(self) -> tuple[int, ...]:
        """Neurons of each layer."""
        return tuple(layer.d_ff for layer in self.layers)

    @property
    def ffn_names(self) -> set[str]:
        """Names of the FFN matrices in the plain checkpoint."""
        return {name for layer in self.layers for name in layer.names}

    @property
    def keys(self) -> set[str]:
        """Names of all tensors in the store's files."""
        return {name for path in self.files for name in read_header(path)[0]}

    def check_unchanged(self) -> None:
        """Refuse layer files that have replaced the opened ones: their neurons may lie elsewhere.

        Raises:
            StoreFormatError: a layer file was replaced; the message names it.
        """
        for layer in self.layers:
            if read_header(layer.path)[1].get(META + "crc32") != layer.crc32:
                raise StoreFormatError(
                    "the store changed while it was being opened", where=layer.path, hint="load the model again"
                )

    def check(self, progress: Any = iter) -> list[str]:
        """Read every file and compare it with its checksum and the index. Returns the problems, one sentence each."""
        problems = [f"{path.name}: the index lists it, and it is no file of this store" for path in self.strangers]
        for path in progress([*self.files, *self.others]):
            expected, found = read_header(path)[1].get(META + "crc32"), crc_of_file(path)
            if found != expected:
                problems.append(f"{path.name}: CRC-32 of the data is {found}, the header says {expected}")
            elif self.headers.get(path.name, digest := header_digest(path)) != digest:
                problems.append(f"{path.name}: it is another file than the index was written for")
        return problems

    def check_others(self) -> None:
        """Refuse files of other weights that lack tensors of the index (transformers would make them up), or that we wrote and
        that are not the ones the index was written for.

        Raises:
            StoreFormatError: one of these; the message names the file.
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


@dataclass
class _Found:
    """Collects the files of a store, sorted by what they hold."""

    layers: dict[int, LayerStore] = field(default_factory=dict)
    predictors: dict[str, Path] = field(default_factory=dict)
    calibration: Path | None = None
    others: list[Path] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)

    def add(self, path: Path) -> None:
        """Add a safetensors file, sorted by its metadata. A file that belongs to no store is skipped."""
        tensors, header = read_header(path)
        metadata = {k.removeprefix(META): v for k, v in header.items() if k.startswith(META)}
        if not metadata:
            return
        check_version(path, metadata)
        if "rest" in metadata:
            self.others.append(path)
        elif "predictor" in metadata:
            _check_variant(path, metadata["predictor"], self.predictors)
            self.predictors[metadata["predictor"]] = path
        elif "calibration" in metadata:
            if self.calibration is not None:
                raise StoreFormatError("two files hold a calibration", where=path, got=self.calibration)
            self.calibration = path
        else:
            self._add_layer(layer_of(path, tensors, metadata), metadata)

    def _add_layer(self, layer: LayerStore, metadata: Mapping[str, str]) -> None:
        if layer.index in self.layers:
            raise StoreFormatError("two files hold the same layer", where=layer.path, got=self.layers[layer.index].path)
        self.layers[layer.index] = layer
        belongs = {k: metadata.get(k, "") for k in ("source", "revision", "fingerprint", "layers")}
        if self.metadata and self.metadata != belongs:
            raise StoreFormatError(
                "a layer file of another checkpoint is among them", where=layer.path, expected=self.metadata, got=belongs
            )
        self.metadata = belongs


def _headers(index: Path) -> dict[str, str]:
    """Read the digest that the index has of each file of other weights. It may have none: hf_flash 0.1 wrote none."""
    metadata = read_json(index).get("metadata") if exists(index) else None
    found = metadata.get(HEADERS) if isinstance(metadata, dict) else None
    return {name: value for name, value in found.items() if isinstance(value, str)} if isinstance(found, dict) else {}


def _check_layers(layers: Mapping[int, LayerStore], count: int) -> None:
    """Refuse a store that lacks layers, or whose layers differ in layout or claim the same tensors."""
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
    units = {layer.unit: layer.path.name for layer in layers.values()}
    if len(units) > 1:
        raise StoreFormatError("layers of different dtypes or widths", where=folder, got=units)
    names = [name for layer in layers.values() for name in (layer.key, *layer.plain_specs)]
    if len(set(names)) < len(names):
        raise StoreFormatError("layers that claim the same tensors", where=folder, got=sorted(names)[:10])


def _check_variant(path: Path, variant: str, others: Mapping[str, Path]) -> None:
    if len(variant) > _LONGEST_VARIANT or not _VARIANT.fullmatch(variant):
        expected = f"up to {_LONGEST_VARIANT} of a-z, 0-9 and hyphens between them, such as int4-g64"
        raise StoreFormatError("not the name of a predictor", where=path, expected=expected, got=ascii(variant)[:80])
    if variant in others:
        raise StoreFormatError("two files hold the same predictor", where=path, got=others[variant])
