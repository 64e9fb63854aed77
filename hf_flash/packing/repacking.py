"""Repack a plain checkpoint for flash, and back.

`repack`     plain checkpoint -> folder with bundles, predictor and everything else (store/layout.py has the layout)
`restore`    such a folder -> the plain checkpoint, every tensor bit for bit

Both stream: at most one layer's bundles are in memory. They write into a folder beside the target, `.<name>.partial`, and
rename it at the end. So a run that dies leaves the source intact and nothing that looks finished, and the next run of `repack`
reuses the complete layers in that folder.

A mixture of experts is never repacked. One that `save_pretrained` wrote is restored by copying its files (expert_folder.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import tqdm

from hf_flash.base.files import read_json, write_json
from hf_flash.base.folders import check_target, copy_small_files, locked, partial_folder
from hf_flash.config import FlashOffloadConfig
from hf_flash.config_arguments import CopiedName, PredictorBits
from hf_flash.errors import ConfigError, UnsupportedModelError
from hf_flash.families import family_of
from hf_flash.families.quantized import quantization_of
from hf_flash.packing import source_cache
from hf_flash.packing.bundling import build_store
from hf_flash.packing.checkpoint_folder import divide_into_shards, finish_folder, other_weights, repacked_config
from hf_flash.packing.expert_folder import SOURCE, copy_checkpoint, open_mixture, refuse_mixture
from hf_flash.packing.readme import without_ours
from hf_flash.predictors.choice import check_predictors, fresh_format, stored_choice
from hf_flash.store.checkpoint import Checkpoint, find_snapshot, resolve_folder
from hf_flash.store.layout import FlashStore
from hf_flash.store.names import INDEX_NAME
from hf_flash.store.safetensors_files import TensorSpec, nbytes_of
from hf_flash.store.writer import unbundle, write_safetensors


def repack(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    predictor: CopiedName | None = None,
    predictor_bits: PredictorBits | None = None,
    predictor_group_size: int | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
    subfolder: str = "",
    delete_source: bool = False,
) -> Path:
    """Write a copy of a checkpoint with its FFN bundled for flash. Paper: section 3.2.

    Args:
        source: a folder or a Hub repository with a plain checkpoint, safetensors or `pytorch_model.bin`.
        target: the folder to make; it must be empty, or must not exist.
        predictor: which predictor to store. Unset: `"quantized"` for ReLU models, `"none"` for others.
        predictor_bits, predictor_group_size: as in [`FlashOffloadConfig`].
        revision, token, cache_dir, local_files_only, subfolder: for the Hub, as in `from_pretrained`.
        delete_source: at the end, after comparing every tensor of the source with what was written, remove the source's weight
            files from the Hub's cache, except those that another revision uses. A local folder is never touched.

    Returns:
        The target folder.

    Raises:
        TargetExistsError, DiskSpaceError, InvalidWeightsError, RepackError: it failed, and nothing is left at `target`.
        StoreError, UnsupportedModelError, ConfigError: the source cannot be repacked.
        UsageError: it is a mixture of experts, which is loaded as it is.
    """
    target = Path(target).resolve()
    wish = FlashOffloadConfig(predictor=predictor, predictor_bits=predictor_bits, predictor_group_size=predictor_group_size)
    check_target(target)
    local = Path(source).is_dir()
    if delete_source and local:
        raise ConfigError(
            "only what can be downloaded again is deleted: the source is a local folder",
            where="delete_source",
            got=source,
            hint="remove its weights yourself afterwards; `hf_flash.restore` makes the same checkpoint again",
        )
    hub: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only, "subfolder": subfolder}
    folder = resolve_folder(source, config_only=True, revision=revision, **hub)
    refuse_mixture(folder, "repack")
    config = _plain_config(folder)
    family = family_of(config)
    fmt = fresh_format(wish, family, config)
    if (found := find_snapshot(folder)) and not local:
        folder = resolve_folder(source, revision=found.commit, **hub)  # of the same commit as config.json
    checkpoint = Checkpoint.open_folder(folder)
    with locked(target), partial_folder(target, checkpoint.identity(checkpoint.origin()["fingerprint"])) as partial:
        store = build_store(partial, checkpoint, family, fmt, rest=True)
        wish.remember(**stored_choice(fmt))
        config["quantization_config"] = wish.to_dict()
        finish_folder(partial, checkpoint, store, config, {})
        copy_small_files(folder, partial)
        checkpoint.check_unchanged()
    if delete_source:
        source_cache.delete_source(checkpoint, target)
    return target


def _plain_config(folder: Path) -> dict[str, Any]:
    """Read config.json of a plain checkpoint; raises an error if the folder is something else."""
    config = read_json(folder / "config.json")
    if "quantization_config" in config:
        found = config["quantization_config"]
        raise UnsupportedModelError(
            "the source is already quantized or repacked",
            where=folder,
            got=found.get("quant_method") if isinstance(found, dict) else ascii(found),
            hint="repack the plain checkpoint",
        )
    return config


def restore(folder: str | os.PathLike[str], target: str | os.PathLike[str]) -> Path:
    """Undo [`repack`]: write every tensor of the plain checkpoint, the same in name, dtype, shape and bytes, as safetensors.

    Args:
        folder: a repacked checkpoint; or a mixture of experts that `save_pretrained` wrote, whose files are copied unchanged.
        target: the folder to make; it must be empty, or must not exist.

    Returns:
        The target folder.

    Raises:
        TargetExistsError, DiskSpaceError, RepackError: it failed, and nothing is left at `target`.
        StoreError: the folder is neither of the two, or is damaged.
    """
    folder, target = Path(folder), Path(target).resolve()
    check_target(target)
    mixture = open_mixture(folder)
    if mixture is None:
        _restore_neurons(folder, target)
        return target
    config = repacked_config(folder)
    with locked(target), partial_folder(target) as partial:
        copy_checkpoint(mixture.checkpoint, partial)
        _finish_plain(folder, partial, config)
        (partial / SOURCE).unlink(missing_ok=True)
        mixture.checkpoint.check_unchanged()
    return target


def _restore_neurons(folder: Path, target: Path) -> None:
    """Write the plain checkpoint of a repacked one."""
    store = FlashStore.open_folder(folder)
    check_predictors(store)
    store.check_others()
    checkpoint = Checkpoint.open_folder(folder)
    ffn: dict[str, TensorSpec] = {}
    for layer in store.layers:
        ffn |= layer.plain_specs
    rest = other_weights(checkpoint, store)
    config = repacked_config(folder)
    with locked(target), partial_folder(target) as partial:
        shards = divide_into_shards(rest | ffn)
        pieces = _restored(checkpoint, store, rest)
        weight_map: dict[str, str] = {}
        for number, specs in enumerate(tqdm(shards, desc="Restoring", unit="shard", delay=1), start=1):
            name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            write_safetensors(partial / name, specs, (piece for _ in specs for piece in next(pieces)), {})
            weight_map |= dict.fromkeys(specs, name)
        if len(shards) > 1:
            size = sum(map(nbytes_of, (rest | ffn).values()))
            write_json(partial / INDEX_NAME, {"metadata": {"total_size": size}, "weight_map": weight_map})
        _finish_plain(folder, partial, config)
        store.check_unchanged()
        checkpoint.check_unchanged()


def _finish_plain(folder: Path, partial: Path, config: dict[str, Any]) -> None:
    """Write everything except the weights of a plain checkpoint."""
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    if quantization := quantization_of(config):
        plain["quantization_config"] = quantization
    write_json(partial / "config.json", plain)
    copy_small_files(folder, partial)
    _plain_card(partial / "README.md")


def _plain_card(path: Path) -> None:
    """Take our part out of a model card that came from the Hub. A card with nothing else is removed."""
    card = path.read_bytes() if path.exists() else b""
    try:
        plain = without_ours(card.decode("utf-8-sig")).encode()
    except UnicodeDecodeError:  # not written by us
        return
    if card != plain:
        path.unlink()
        if plain:
            path.write_bytes(plain)


def _restored(checkpoint: Checkpoint, store: FlashStore, rest: Mapping[str, TensorSpec]) -> Iterator[Iterable[torch.Tensor]]:
    """Yield the pieces of each tensor."""
    for name in rest:
        yield checkpoint.pieces(name)
    for layer in store.layers:
        for matrix in unbundle(layer):
            yield [matrix]
