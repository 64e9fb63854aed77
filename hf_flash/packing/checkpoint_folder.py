"""Turning a folder with a store into a checkpoint: the other weights, tombstones, the index and config.json.

`finish_folder`  writes these; `repack` calls it
`save_folder`    writes a loaded model as such a folder; the store's files are copied as they are
`list_store`     brings the index up to date after files of the store were added or replaced

The target may be the folder that the model was loaded from. So the files with the other weights get new names, and the index
that lists them is replaced in one step.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any, Final

import torch
from huggingface_hub.utils import tqdm

from hf_flash.base.files import link_inside, listed_files, read_json, write_json, writing
from hf_flash.config_arguments import METHOD
from hf_flash.errors import StoreFormatError
from hf_flash.store.checkpoint import Checkpoint
from hf_flash.store.layout import FlashStore
from hf_flash.store.names import HEADERS, INDEX_NAME, NOTICES
from hf_flash.store.safetensors_files import TensorSpec, header_digest, nbytes_of, read_header
from hf_flash.store.writer import rest_metadata, write_safetensors

_SHARD_BYTES: Final = 5_000_000_000
_OURS: Final = re.compile(
    r"model(-\d{5}-of-\d{5}(-\d+)?|-added-\d{5})?\.safetensors|flash-(layer-.+|predictor-.+|calibration)\.safetensors"
)


def finish_folder(
    folder: Path,
    checkpoint: Checkpoint,
    store: FlashStore,
    config: Mapping[str, Any],
    changed: Mapping[str, torch.Tensor],
) -> None:
    """Turn a folder with a store into a checkpoint: write the other tensors with tombstones, the index and config.json.

    Args:
        checkpoint: where the other tensors come from: the plain checkpoint, or a repacked one.
        config: the content of config.json.
        changed: tensors that now differ from the checkpoint's, or that the checkpoint lacks.
    """
    rest = other_weights(checkpoint, store)
    rest |= {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in changed.items()}
    tombstones: dict[str, TensorSpec] = {}
    for layer in store.layers:
        shapes = (part.plain_shape(0, layer.d_model) for part in layer.unit.parts)
        tombstones |= {name: (layer.dtype, shape) for name, shape in zip(layer.names, shapes, strict=True)}
    tombstones[NOTICES[0]] = (store.layers[0].dtype, (0,))
    _write_index(folder, store, _write_rest(folder, tombstones | rest, checkpoint, changed), {})
    write_json(folder / "config.json", config)


def _write_index(folder: Path, store: FlashStore, weight_map: dict[str, str], headers: Mapping[str, str]) -> None:
    """Write the index of `folder`: the store's files, and the other weights in `weight_map` with a digest of each file.

    Only the index identifies a file of other weights. The store's own files say what they belong to, and may be rewritten
    before the index is.

    Args:
        weight_map: the file of each tensor that is not the store's.
        headers: digests that are known already, by file name.
    """
    rest = sorted(set(weight_map.values()))
    for path in store.files:
        weight_map |= dict.fromkeys(read_header(folder / path.name)[0], path.name)
    digests = {name: headers.get(name) or header_digest(folder / name) for name in rest}
    size = sum((folder / name).stat().st_size for name in {*rest, *(path.name for path in store.files)})
    write_json(folder / INDEX_NAME, {"metadata": {"total_size": size, HEADERS: digests}, "weight_map": weight_map})


def list_store(folder: Path) -> None:
    """Bring the index of a repacked folder up to date after files of its store were added or replaced."""
    store = FlashStore.open_folder(folder)
    ours = {path.name for path in store.files}
    listed_files(folder / INDEX_NAME)
    weight_map: dict[str, str] = read_json(folder / INDEX_NAME)["weight_map"]
    rest = {tensor: name for tensor, name in weight_map.items() if name not in ours}
    _write_index(folder, store, rest, store.headers)


def other_weights(checkpoint: Checkpoint, store: FlashStore) -> dict[str, TensorSpec]:
    """Return the tensors of a plain or repacked checkpoint that are neither FFN matrices nor part of the store."""
    passed_over = store.keys | store.ffn_names | {*NOTICES}
    return {name: spec for name, spec in checkpoint.specs.items() if name not in passed_over}


def _write_rest(
    folder: Path, specs: Mapping[str, TensorSpec], checkpoint: Checkpoint, changed: Mapping[str, torch.Tensor]
) -> dict[str, str]:
    """Write the weights that are not FFN matrices. Returns the file of each tensor.

    The files get unused names. So the folder stays valid until its index is replaced, which is one step, and the weights may be
    copied from files that the old index lists.
    """
    weight_map: dict[str, str] = {}
    shards = divide_into_shards(specs)
    names = _free_names(folder, len(shards))
    try:
        for name, shard in zip(names, shards, strict=True):
            real = (n for n, (_, shape) in shard.items() if 0 not in shape)
            pieces = (piece for n in real for piece in ([changed[n]] if n in changed else checkpoint.pieces(n)))
            write_safetensors(folder / name, shard, pieces, rest_metadata())
            weight_map |= dict.fromkeys(shard, name)
    except BaseException:
        for name in names:
            (folder / name).unlink(missing_ok=True)
        raise
    return weight_map


def _free_names(folder: Path, shards: int) -> list[str]:
    """Return names for shards that do not exist in the folder yet."""
    for turn in count():
        end = f"-of-{shards:05d}{f'-{turn}' if turn else ''}.safetensors"
        names = [f"model-{number:05d}{end}" for number in range(1, shards + 1)]
        if not any(os.path.lexists(folder / name) for name in names):
            break
    return names


def divide_into_shards(specs: Mapping[str, TensorSpec]) -> list[dict[str, TensorSpec]]:
    """Divide specs into files of at most `_SHARD_BYTES`. A larger tensor gets its own file."""
    shards: list[dict[str, TensorSpec]] = [{}]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + nbytes_of(spec) > _SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = spec
        size += nbytes_of(spec)
    return shards


def repacked_config(folder: Path) -> dict[str, Any]:
    """Read config.json of a repacked or saved checkpoint; raises an error if the folder is something else."""
    config = read_json(folder / "config.json")
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != METHOD:
        raise StoreFormatError(
            "not a repacked checkpoint",
            where=folder / "config.json",
            expected=f"quant_method: {METHOD}",
            hint="take what `hf_flash.repack` or `save_pretrained` made",
        )
    return config


def link_or_copy(path: Path, name: Path) -> None:
    """Make `name` a link to a file, or a copy where links are not possible."""
    try:
        link_inside(path, name)
    except OSError:  # Windows without the privilege
        shutil.copyfile(path, name)


def is_same_file(path: Path, other: Path) -> bool:
    """Tell whether both paths are the same file."""
    return other.exists() and os.path.samefile(path, other)


def copy_whole(path: Path, name: Path, *, link: bool = False) -> None:
    """Copy a file, which appears under its new name when it is complete. Does nothing if both paths are the same file.

    Args:
        link: make a link instead where the system can.
    """
    if is_same_file(path, name):
        return
    temporary = name.with_name(name.name + ".tmp")
    with writing(name, needed=path.stat().st_size):
        temporary.unlink(missing_ok=True)
        if link:
            link_or_copy(path, temporary)
        else:
            shutil.copyfile(path, temporary)
        os.replace(temporary, name)


def save_folder(
    target: Path,
    checkpoint: Checkpoint,
    store: FlashStore,
    config: Mapping[str, Any],
    changed: Mapping[str, torch.Tensor],
    *,
    link: bool = False,
) -> None:
    """Write a loaded model as a repacked checkpoint; the store's files are copied byte for byte.

    `target` may be the folder the model was loaded from; its store is then left alone.

    Args:
        config, changed: as in [`finish_folder`].
        link: link to the store's files where the system can, for a folder that does not outlive them.
    """
    with writing(target):
        target.mkdir(parents=True, exist_ok=True)
    for path in tqdm(store.files, desc="Copying the store", unit="file", delay=1):
        copy_whole(path, target / path.name, link=link)
    finish_folder(target, checkpoint, store, config, changed)
    remove_stale(target, {path.name for path in listed_files(target / INDEX_NAME)})


def remove_stale(target: Path, current: set[str]) -> None:
    """Remove weight files of an earlier save: transformers would prefer a `model.safetensors` to the index.

    Args:
        current: names of the files that belong to the checkpoint now.
    """
    for path in target.iterdir():
        left = path.name.removesuffix(".tmp").removesuffix(".new")  # of a killed save, by this version or an older one
        if _OURS.fullmatch(left) and path.name not in current:
            path.unlink()
