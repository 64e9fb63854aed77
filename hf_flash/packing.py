"""Repack a plain checkpoint for flash, and back.

`repack`        plain checkpoint -> folder with bundles, predictor and everything else (store.py has the layout)
`restore`       such a folder -> the plain checkpoint, every tensor bit for bit
`cached_store`  plain checkpoint -> bundles and predictor only, in the flash cache: what `from_pretrained` uses
`save_folder`   a loaded model -> such a folder; the store is copied as it is

All of them stream: one layer's bundles in memory at most. The first three write into a folder beside the target,
`.<name>.partial`, and rename it at the end, so a run that dies leaves the source whole and nothing that looks finished; the
next run takes the layers that are complete from there and goes on. Saving may go into the model's own folder, so its files get
new names, and the index that lists them is replaced in one step.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any, Final, Literal

import torch
from huggingface_hub import constants
from huggingface_hub.utils import tqdm

from . import hub_cache
from .adapters import Adapter, FFNNames, adapter_for
from .checkpoint import Checkpoint, find_snapshot, resolve_folder
from .config import FlashOffloadConfig
from .errors import (
    ConfigError,
    HfFlashError,
    RepackError,
    StoreFormatError,
    StoreMissingError,
    UnsupportedModelError,
)
from .files import exists
from .files import link as link_inside
from .folders import (
    MARK,
    check_room,
    check_target,
    clear_away,
    copy_small_files,
    locked,
    partial_folder,
    put_aside,
    short,
)
from .header import TensorSpec, header_digest, nbytes_of, read_header
from .lowrank import LowRankFormat
from .memory import trim_heap
from .predictor import PredictorForm
from .quantized import QuantizedFormat, write_quantized
from .readme import without_ours
from .store import HEADERS, INDEX_NAME, LAYER_FILE, NOTICE, PREDICTOR_FILE, FlashStore, listed_files, read_json
from .writer import layer_spec, rest_metadata, unbundle, write_json, write_layer, write_safetensors, writing

logger = logging.getLogger("hf_flash")

_NOT_OURS: Final = (errno.EACCES, errno.EPERM, errno.EROFS)
_SHARD_BYTES: Final = 5_000_000_000
_OURS: Final = re.compile(r"model(-\d{5}-of-\d{5}(-\d+)?)?\.safetensors|flash-(layer-.+|predictor-.+|calibration)\.safetensors")


def repack(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    predictor: Literal["quantized", "none"] | None = None,
    predictor_bits: Literal[4, 8] | None = None,
    predictor_group_size: int | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
    subfolder: str = "",
    delete_source: bool = False,
) -> Path:
    """Write a checkpoint again with its FFN bundled for flash. Paper: section 3.2.

    Args:
        source: a folder or a Hub repository with a plain checkpoint, safetensors or `pytorch_model.bin`.
        target: the folder to make; it must not exist or be empty.
        predictor: which one to store; unset: `"quantized"` for ReLU models, `"none"` for others.
        predictor_bits, predictor_group_size: as in [`FlashOffloadConfig`].
        revision, token, cache_dir, local_files_only, subfolder: for the Hub, as in `from_pretrained`.
        delete_source: at the end, when every tensor of the source was compared with what was written, remove the source's
            weight files from the Hub's cache, as far as no other revision uses them. A local folder is never touched.

    Returns:
        The target folder.

    Raises:
        TargetExistsError, DiskSpaceError, InvalidWeightsError, RepackError: nothing is left at `target`.
        StoreError, UnsupportedModelError, ConfigError: the source cannot be repacked.
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
    config = read_json(folder / "config.json")
    if "quantization_config" in config:
        raise UnsupportedModelError(
            "the source is already quantized or repacked",
            where=folder,
            got=_method(config),
            hint="repack the plain checkpoint",
        )
    adapter = adapter_for(config)
    form = fresh_form(wish, adapter, config)
    if (found := find_snapshot(folder)) and not local:
        folder = resolve_folder(source, revision=found.commit, **hub)  # the commit that config.json is from
    checkpoint = Checkpoint.open_folder(folder)
    with locked(target), partial_folder(target, checkpoint.identity(checkpoint.origin()["fingerprint"])) as partial:
        store = build_store(partial, checkpoint, adapter, form, rest=True)
        wish.remember(**stored_choice(form))
        config["quantization_config"] = wish.to_dict()
        _finish_folder(partial, checkpoint, store, config, {})
        copy_small_files(folder, partial)
        checkpoint.check_unchanged()
    if delete_source:
        hub_cache.delete_source(checkpoint, target)
    return target


def _method(config: Mapping[str, Any]) -> Any:
    found = config["quantization_config"]
    return found.get("quant_method") if isinstance(found, dict) else ascii(found)


def stored_form(wish: FlashOffloadConfig, adapter: Adapter, config: Any, store: FlashStore) -> PredictorForm | None:
    """The predictor of a store that a wish means; `None` for none."""
    if wish.predictor != "lowrank":
        return fresh_form(wish, adapter, config)
    form = LowRankFormat.of(store)
    if form is None:
        raise _uncalibrated()
    return form


def _uncalibrated() -> StoreMissingError:
    return StoreMissingError(
        "the low-rank predictor is trained on text, and that has not been done for this model",
        where="predictor='lowrank'",
        hint="repack the model into a folder, run `hf-flash calibrate FOLDER --text FILE`, then load that folder",
    )


def fresh_form(wish: FlashOffloadConfig, adapter: Adapter, config: Any) -> QuantizedFormat | None:
    """The predictor to make from a plain checkpoint; `None` for none.

    Raises:
        UnsupportedModelError: a predictor was asked for and the activation leaves no exact zeros.
        StoreMissingError: a predictor that has to be trained was asked for.
    """
    if wish.predictor == "lowrank":
        raise _uncalibrated()
    name, sparse = adapter.activation_name(config), adapter.sparse(config)
    if wish.predictor == "none" or (wish.predictor is None and not sparse):
        return None
    if not sparse:
        raise UnsupportedModelError(
            "a predictor needs an activation that leaves exact zeros",
            where=adapter.activation_key,
            expected="relu",
            got=name,
            hint='use predictor="none"',
        )
    return QuantizedFormat(wish.predictor_bits, wish.predictor_group_size, wish.predictor_margin)


def stored_choice(form: PredictorForm | None) -> dict[str, Any]:
    """The arguments of `FlashOffloadConfig` that find a predictor again."""
    if isinstance(form, QuantizedFormat):
        return {"predictor": "quantized", "predictor_bits": form.bits, "predictor_group_size": form.group_size}
    return {"predictor": "none" if form is None else form.variant}


def build_store(
    folder: Path, checkpoint: Checkpoint, adapter: Adapter, form: QuantizedFormat | None, *, rest: bool
) -> FlashStore:
    """Write the layer files and the predictor into `folder`, passing over what is there already and complete.

    Args:
        rest: whether room for the other tensors is needed in `folder` too.
    """
    names, origin = adapter.names(checkpoint.specs), checkpoint.origin()
    todo = _forget_strangers(folder, names, origin, form)
    shapes = {layer_spec(checkpoint.specs[n.up], checkpoint.specs[n.down], n.up, n.down) for n in names}
    if len(shapes) > 1:
        raise StoreFormatError("FFN layers of different dtypes or shapes", where=origin["source"], got=sorted(map(str, shapes)))
    ((_, d_ff, d_model),) = shapes
    ffn = {name for layer in names for name in (layer.up, layer.down)}
    total = sum(nbytes_of(checkpoint.specs[n]) for layer in todo for n in (layer.up, layer.down))
    needed = total + len(names) * _predictor_bytes(form, d_ff, d_model)
    check_room(folder, needed + sum(nbytes_of(s) for n, s in checkpoint.specs.items() if rest and n not in ffn))
    with tqdm(total=total, unit="B", unit_scale=True, desc="Bundling FFN layers", delay=1) as bar:
        for layer in todo:
            up, down = checkpoint.rows(layer.up), checkpoint.in_memory(layer.down)
            write_layer(
                path := folder / LAYER_FILE.format(layer.index),
                layer.index,
                len(names),
                layer.bundles,
                (layer.up, layer.down),
                up,
                down,
                origin,
            )
            bar.update(up.nbytes + down.nbytes)
            try:
                checkpoint.check_unchanged()
            except HfFlashError:
                path.unlink()  # the next run might take it over
                raise
            trim_heap()
    return add_predictor(folder, form)


def _predictor_bytes(form: QuantizedFormat | None, d_ff: int, d_model: int) -> int:
    """What a layer's predictor takes on disk."""
    return sum(map(nbytes_of, form.shapes("", d_ff, d_model).values())) if form else 0


def add_predictor(folder: Path, form: QuantizedFormat | None) -> FlashStore:
    """Make a predictor from the layer files in `folder`, unless it is there."""
    store = FlashStore.open_folder(folder)
    if form is None or form.variant in store.predictors:
        return store
    first = store.layers[0]
    check_room(folder, len(store.layers) * _predictor_bytes(form, first.d_ff, first.d_model))
    write_quantized(
        folder / PREDICTOR_FILE.format(form.variant),
        store,
        form,
        lambda layers: tqdm(layers, desc="Making predictors", unit="layer", delay=1),
    )
    return FlashStore.open_folder(folder)


def _forget_strangers(
    folder: Path, names: list[FFNNames], origin: Mapping[str, str], form: QuantizedFormat | None
) -> list[FFNNames]:
    """Remove what an earlier run left in `folder` and this one will not take over. Returns the layers still to do."""
    done = {LAYER_FILE.format(layer.index): layer for layer in names}
    predictor = PREDICTOR_FILE.format(form.variant) if form else ""
    for path in list(folder.iterdir()):
        if path.name not in (*done, predictor, MARK) or (path.name != MARK and not _complete(path, origin["fingerprint"])):
            with writing(path):
                clear_away(path)
    return [layer for name, layer in done.items() if not (folder / name).exists()]


def _complete(path: Path, fingerprint: str) -> bool:
    """Whether an earlier run finished this file, from the same source."""
    try:
        return read_header(path)[1].get("hf_flash.fingerprint") == fingerprint
    except StoreFormatError:
        return False


# --- the flash cache -----------------------------------------------------------------------------------------------


def cache_folder(cache_dir: str | None) -> Path:
    """Where plain checkpoints are repacked to: `cache_dir`, else `$HF_FLASH_CACHE`, else `flash` in the Hugging Face home.

    Raises:
        ConfigError: that begins with the home of a user who has none, or with a current folder that was removed.
    """
    folder = Path(cache_dir or os.environ.get("HF_FLASH_CACHE") or Path(constants.HF_HOME) / "flash")
    try:
        return folder.expanduser().absolute()
    except (RuntimeError, OSError) as error:
        hint = "name a whole path in HF_FLASH_CACHE or cache_dir, or set HOME"
        raise ConfigError("there is no place for the flash cache", where=folder, got=error, hint=hint) from error


def cached_store(checkpoint: Checkpoint, adapter: Adapter, form: QuantizedFormat | None, cache_dir: str | None) -> FlashStore:
    """The bundles and predictor of a plain checkpoint, made once per source, revision and format.

    Several processes may ask at once: one works, the others wait for it.
    """
    origin = checkpoint.origin()
    key = checkpoint.identity(origin["fingerprint"], 1_000_000_000) if origin["revision"] else origin["fingerprint"]
    source = short(origin["source"].replace("/", "--"), 200)
    name = "--".join(filter(None, [source, origin["revision"][:12], key[:16]]))
    target = cache_folder(cache_dir) / name
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(target, keep=True))
        except RepackError as error:
            if error.errno in _NOT_OURS and (ready := _ready(target, form)):
                return ready
            raise
        if exists(target):
            try:
                return add_predictor(target, form)
            except (StoreFormatError, StoreMissingError) as error:  # proven by what is there; not: cannot be read just now
                logger.warning("hf_flash: a damaged entry of the flash cache is made again: %s", error)
                shutil.rmtree(put_aside(target), ignore_errors=True)
        logger.info("hf_flash: repacking the FFN of %s into %s, once", origin["source"], target)
        with partial_folder(target, checkpoint.identity(origin["fingerprint"])) as partial:
            build_store(partial, checkpoint, adapter, form, rest=False)
            checkpoint.check_unchanged()
        return FlashStore.open_folder(target)


def _ready(target: Path, form: QuantizedFormat | None) -> FlashStore | None:
    """A complete entry of a cache that may not be written to: on a read-only disk, or somebody else's. No lock is needed:
    whoever replaces an entry renames it as a whole, and a model that is being loaded notices."""
    if not exists(target):
        return None
    store = FlashStore.open_folder(target)
    return store if form is None or form.variant in store.predictors else None


def _finish_folder(
    folder: Path,
    checkpoint: Checkpoint,
    store: FlashStore,
    config: Mapping[str, Any],
    changed: Mapping[str, torch.Tensor],
) -> None:
    """Write what makes a folder with a store a checkpoint: the other tensors with tombstones, the index, config.json.

    Args:
        checkpoint: where the other tensors come from: the plain checkpoint, or a repacked one.
        changed: tensors whose values differ from the checkpoint's by now, or that it has not.
    """
    rest = other_weights(checkpoint, store)
    rest |= {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in changed.items()}
    tombstones: dict[str, TensorSpec] = {}
    for layer in store.layers:
        tombstones |= {
            layer.up_name: (layer.dtype, (0, layer.d_model)),
            layer.down_name: (layer.dtype, (layer.d_model, 0)),
        }
    tombstones[NOTICE] = (store.layers[0].dtype, (0,))
    _write_index(folder, store, _write_rest(folder, tombstones | rest, checkpoint, changed), {})
    write_json(folder / "config.json", config)


def _write_index(folder: Path, store: FlashStore, weight_map: dict[str, str], headers: Mapping[str, str]) -> None:
    """List the store's files in `folder` beside the other weights, `weight_map`, of which `headers` says what they are.

    What a file of other weights is, nothing but the index says. The store's own files say what they belong to, and they may
    be written again before the index is.
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
    """The tensors of a checkpoint, plain or repacked, that are neither FFN matrices nor the store's."""
    passed_over = store.keys | store.ffn_names | {NOTICE}
    return {name: spec for name, spec in checkpoint.specs.items() if name not in passed_over}


def _write_rest(
    folder: Path, specs: Mapping[str, TensorSpec], checkpoint: Checkpoint, changed: Mapping[str, torch.Tensor]
) -> dict[str, str]:
    """Write the weights that are not FFN matrices; returns which file has which tensor.

    The files have names of their own. So the folder is what it was until its index is replaced, which is one step, and they may
    be copies of files that the index lists until then.
    """
    weight_map: dict[str, str] = {}
    shards = _shards(specs)
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
    """Names of files that do not exist yet."""
    for turn in count():
        end = f"-of-{shards:05d}{f'-{turn}' if turn else ''}.safetensors"
        names = [f"model-{number:05d}{end}" for number in range(1, shards + 1)]
        if not any(os.path.lexists(folder / name) for name in names):
            break
    return names


def _shards(specs: Mapping[str, TensorSpec]) -> list[dict[str, TensorSpec]]:
    """Specs divided into files of at most `_SHARD_BYTES`, or one tensor."""
    shards: list[dict[str, TensorSpec]] = [{}]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + nbytes_of(spec) > _SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = spec
        size += nbytes_of(spec)
    return shards


# --- back, and save -------------------------------------------------------------------------------------------------


def restore(folder: str | os.PathLike[str], target: str | os.PathLike[str]) -> Path:
    """Undo [`repack`]: every tensor of the plain checkpoint with its name, dtype, shape and bytes, in safetensors files.

    Args:
        folder: a repacked checkpoint.
        target: the folder to make; it must not exist or be empty.

    Returns:
        The target folder.
    """
    folder, target = Path(folder), Path(target).resolve()
    check_target(target)
    store = FlashStore.open_folder(folder)
    store.check_others()
    checkpoint = Checkpoint.open_folder(folder)
    ffn: dict[str, TensorSpec] = {}
    for layer in store.layers:
        ffn |= {
            layer.up_name: (layer.dtype, (layer.d_ff, layer.d_model)),
            layer.down_name: (layer.dtype, (layer.d_model, layer.d_ff)),
        }
    rest = other_weights(checkpoint, store)
    config = repacked_config(folder)
    del config["quantization_config"]
    with locked(target), partial_folder(target) as partial:
        shards = _shards(rest | ffn)
        pieces = _restored(checkpoint, store, rest)
        weight_map: dict[str, str] = {}
        for number, specs in enumerate(tqdm(shards, desc="Restoring", unit="shard", delay=1), start=1):
            name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            write_safetensors(partial / name, specs, (piece for _ in specs for piece in next(pieces)), {})
            weight_map |= dict.fromkeys(specs, name)
        if len(shards) > 1:
            size = sum(map(nbytes_of, (rest | ffn).values()))
            write_json(partial / INDEX_NAME, {"metadata": {"total_size": size}, "weight_map": weight_map})
        write_json(partial / "config.json", config)
        copy_small_files(folder, partial)
        _plain_card(partial / "README.md")
        store.check_unchanged()
        checkpoint.check_unchanged()
    return target


def _plain_card(path: Path) -> None:
    """Take our part out of a model card that came from the Hub; one that is nothing else is removed."""
    card = path.read_bytes() if path.exists() else b""
    try:
        plain = without_ours(card.decode("utf-8-sig")).encode()
    except UnicodeDecodeError:  # not written by us
        return
    if card != plain:
        path.unlink()
        if plain:
            path.write_bytes(plain)


def repacked_config(folder: Path) -> dict[str, Any]:
    """config.json of a repacked checkpoint; an error if the folder is something else."""
    config = read_json(folder / "config.json")
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "flash":
        raise StoreFormatError(
            "not a repacked checkpoint",
            where=folder / "config.json",
            expected="quant_method: flash",
            hint="take what `hf_flash.repack` or `save_pretrained` made",
        )
    return config


def _restored(checkpoint: Checkpoint, store: FlashStore, rest: Mapping[str, TensorSpec]) -> Iterator[Iterable[torch.Tensor]]:
    """The pieces of each tensor."""
    for name in rest:
        yield checkpoint.pieces(name)
    for layer in store.layers:
        for matrix in unbundle(layer):
            yield [matrix]


def link_or_copy(path: Path, name: Path) -> None:
    """Make `name` a link to a file; a copy where there are no links."""
    try:
        link_inside(path, name)
    except OSError:  # Windows without the right to
        shutil.copyfile(path, name)


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
        link: link to the store's files where the system can, for a folder that does not outlive them.
    """
    with writing(target):
        target.mkdir(parents=True, exist_ok=True)
    for path in tqdm(store.files, desc="Copying the store", unit="file", delay=1):
        copy = target / path.name
        temporary = copy.with_name(copy.name + ".tmp")
        if not (copy.exists() and os.path.samefile(path, copy)):
            with writing(copy, needed=path.stat().st_size):
                temporary.unlink(missing_ok=True)
                if link:
                    link_or_copy(path, temporary)
                else:
                    shutil.copyfile(path, temporary)
                os.replace(temporary, copy)
    _finish_folder(target, checkpoint, store, config, changed)
    current = {path.name for path in listed_files(target / INDEX_NAME)}
    for path in target.iterdir():  # of an earlier save; transformers would prefer a `model.safetensors`
        left = path.name.removesuffix(".tmp").removesuffix(".new")  # by a save that was killed, of this version or an older one
        if _OURS.fullmatch(left) and path.name not in current:
            path.unlink()
