"""Write the layer files and the predictor of a store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub.utils import tqdm

from hf_flash.base.files import writing
from hf_flash.base.folders import MARK, check_room, clear_away
from hf_flash.base.heap import trim_heap
from hf_flash.errors import HfFlashError, StoreFormatError
from hf_flash.families.base import Family, LayerNames
from hf_flash.predictors.base import CopyFormat, write_copy
from hf_flash.predictors.choice import check_predictors
from hf_flash.store.checkpoint import Checkpoint
from hf_flash.store.layout import FlashStore
from hf_flash.store.names import LAYER_FILE, META, PREDICTOR_FILE
from hf_flash.store.safetensors_files import nbytes_of, read_header
from hf_flash.store.unit import COLUMN, UnitLayout
from hf_flash.store.writer import plain_unit, write_layer


def build_store(folder: Path, checkpoint: Checkpoint, family: Family, fmt: CopyFormat | None, *, rest: bool) -> FlashStore:
    """Write the layer files and the predictor into `folder`, except files that an earlier run has completed.

    Args:
        fmt: the predictor to make; `None` for none.
        rest: whether `folder` needs room for the other tensors too.
    """
    names, origin = family.names(checkpoint.specs), checkpoint.origin()
    todo = _forget_strangers(folder, names, origin, fmt)
    unit, widths = plain_layers(checkpoint, family)
    ffn = {name for layer in names for name in layer.matrices}
    total = sum(widths[layer.index] for layer in todo) * unit.row_bytes
    needed = total + _predictor_bytes(fmt, widths, unit.width)
    check_room(folder, needed + sum(nbytes_of(s) for n, s in checkpoint.specs.items() if rest and n not in ffn))
    with tqdm(total=total, unit="B", unit_scale=True, desc="Bundling FFN layers", delay=1) as bar:
        for layer in todo:
            path = folder / LAYER_FILE.format(layer.index)
            matrices = [
                checkpoint.rows(name) if part.stored != COLUMN else checkpoint.in_memory(name)
                for part, name in zip(family.parts, layer.matrices, strict=True)
            ]
            write_layer(path, layer.index, len(names), layer.bundles, family.parts, layer.matrices, matrices, origin)
            bar.update(widths[layer.index] * unit.row_bytes)
            try:
                checkpoint.check_unchanged()
            except HfFlashError:
                path.unlink()  # the next run might reuse it
                raise
            del matrices
            trim_heap()
    return add_predictor(folder, fmt)


def plain_layers(checkpoint: Checkpoint, family: Family) -> tuple[UnitLayout, tuple[int, ...]]:
    """Return the layout of a plain checkpoint's neurons, and how many each layer has.

    Raises:
        StoreFormatError: matrices are missing or do not fit together, or layers differ in dtype or width.
    """
    names = family.names(checkpoint.specs)
    found = [plain_unit(family.parts, [checkpoint.specs[name] for name in n.matrices], n.matrices) for n in names]
    units = {unit for unit, _ in found}
    if len(units) > 1:
        source = checkpoint.origin()["source"]
        raise StoreFormatError("FFN layers of different dtypes or widths", where=source, got=sorted(map(str, units)))
    return found[0][0], tuple(d_ff for _, d_ff in found)


def _predictor_bytes(fmt: CopyFormat | None, widths: Sequence[int], d_model: int) -> int:
    """Return the bytes that a model's predictor takes on disk."""
    return sum(nbytes_of(spec) for d_ff in widths for spec in fmt.shapes("", d_ff, d_model).values()) if fmt else 0


def add_predictor(folder: Path, fmt: CopyFormat | None) -> FlashStore:
    """Make a predictor from the layer files in `folder`, unless it exists."""
    store = FlashStore.open_folder(folder)
    check_predictors(store)
    if fmt is None or fmt.variant in store.predictors:
        return store
    check_room(folder, _predictor_bytes(fmt, store.widths, store.unit.width))
    write_copy(
        folder / PREDICTOR_FILE.format(fmt.variant),
        store,
        fmt,
        lambda layers: tqdm(layers, desc="Making predictors", unit="layer", delay=1),
    )
    return FlashStore.open_folder(folder)


def _forget_strangers(
    folder: Path, names: list[LayerNames], origin: Mapping[str, str], fmt: CopyFormat | None
) -> list[LayerNames]:
    """Remove what an earlier run left in `folder` and this run cannot reuse. Returns the layers still to be written."""
    done = {LAYER_FILE.format(layer.index): layer for layer in names}
    predictor = PREDICTOR_FILE.format(fmt.variant) if fmt else ""
    for path in list(folder.iterdir()):
        if path.name not in (*done, predictor, MARK) or (path.name != MARK and not _complete(path, origin["fingerprint"])):
            with writing(path):
                clear_away(path)
    return [layer for name, layer in done.items() if not (folder / name).exists()]


def _complete(path: Path, fingerprint: str) -> bool:
    """Tell whether an earlier run finished this file, from the same source."""
    try:
        return read_header(path)[1].get(META + "fingerprint") == fingerprint
    except StoreFormatError:
        return False
