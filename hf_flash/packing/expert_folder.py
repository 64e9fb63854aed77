"""A mixture of experts as a folder: opening it before it is loaded, saving it afterwards, making it plain again.

Saving copies the checkpoint's files as they are, except for other weights that were changed. Nothing is converted: the folder
is a plain checkpoint whose config.json says to load it with hf_flash. A small file says where the checkpoint came from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from huggingface_hub.utils import tqdm

from hf_flash.base.files import read_json, write_json, writing
from hf_flash.errors import StoreFormatError, UsageError
from hf_flash.families.experts import experts_per_token, locate_experts, mixture_of
from hf_flash.families.quantized import scales_in
from hf_flash.packing.checkpoint_folder import copy_whole, divide_into_shards, is_same_file, remove_stale
from hf_flash.reading.experts import ExpertPlaces
from hf_flash.store.checkpoint import Checkpoint
from hf_flash.store.names import INDEX_NAME
from hf_flash.store.safetensors_files import TensorSpec
from hf_flash.store.writer import write_safetensors

_METADATA: Final = {"format": "pt"}
_SINGLE: Final = "model.safetensors"
SOURCE: Final = "flash-source.json"  # in a saved folder: where its checkpoint came from


@dataclass(frozen=True)
class Mixture:
    """A mixture of experts in a folder, before it is loaded.

    Attributes:
        folder: a plain checkpoint, or one that `save_pretrained` made.
        model: the model on the meta device, without memory.
        places: where its experts lie.
    """

    folder: Path
    model: Any
    checkpoint: Checkpoint
    places: ExpertPlaces

    @property
    def used(self) -> int:
        """Experts that a token uses in a layer."""
        return experts_per_token(self.model, self.places.layers)

    @property
    def active_bytes(self) -> int:
        """Bytes in the files of all experts that a token uses, over all layers."""
        return sum(min(self.used, layer.experts) * layer.expert_bytes for layer in self.places.layers)

    @property
    def source(self) -> dict[str, str]:
        """`source` and `revision`, as in a store's metadata: of the checkpoint that it was saved from, else its own."""
        return _source_of(self.checkpoint)


def mixture_in(folder: Path) -> Any:
    """Make the model in a folder, without memory, if it is a mixture of experts; else `None`. Only config.json is needed."""
    if not (folder / "config.json").is_file() or any(folder.glob("flash-layer-*.safetensors")):
        return None
    with suppress(Exception):  # no model can be made from this config: loading it will say what is wrong
        return mixture_of(folder)
    return None


def open_mixture(folder: Path) -> Mixture | None:
    """Open the mixture of experts in a folder; `None` if it holds something else.

    Raises:
        UnsupportedModelError, StoreError: the experts cannot be found in the folder's files.
    """
    model = mixture_in(folder)
    if model is None:
        return None
    checkpoint = Checkpoint.open_folder(folder)
    return Mixture(folder, model, checkpoint, ExpertPlaces(locate_experts(model, checkpoint), checkpoint))


def refuse_mixture(folder: Path, what: str) -> None:
    """Refuse to apply to a mixture of experts what applies to layers of neurons only.

    Args:
        what: a verb, for the message.

    Raises:
        UsageError: the folder holds a mixture of experts.
    """
    if mixture_in(folder) is not None:
        raise UsageError(
            f"there is nothing to {what} in a mixture of experts: its router says what a token needs, and its experts are read "
            "where they lie",
            where=folder,
            hint="load it as it is: from_pretrained(..., quantization_config=hf_flash.FlashOffloadConfig())",
        )


def _source_of(checkpoint: Checkpoint) -> dict[str, str]:
    path, names = checkpoint.files[0].parent / SOURCE, ("source", "revision")
    found = read_json(path) if path.is_file() else checkpoint.origin()
    if not all(isinstance(found.get(name), str) for name in names):
        raise StoreFormatError("not what says where a checkpoint came from", where=path, expected=", ".join(names))
    return {name: found[name] for name in names}


def copy_checkpoint(checkpoint: Checkpoint, target: Path) -> None:
    """Copy a checkpoint's weight files as they are, with their index, into another folder."""
    for path in tqdm(checkpoint.files, desc="Copying the checkpoint", unit="file", delay=1):
        copy_whole(path, target / path.name)
    if [path.name for path in checkpoint.files] != [_SINGLE]:
        copy_whole(checkpoint.files[0].parent / INDEX_NAME, target / INDEX_NAME)


def save_experts(
    target: Path, checkpoint: Checkpoint, config: Mapping[str, Any], changed: Mapping[str, torch.Tensor], *, link: bool = False
) -> None:
    """Write a loaded mixture of experts as a checkpoint.

    Args:
        target: a new folder; or the one that the model was loaded from, if nothing was changed.
        config: the content of config.json.
        changed: tensors that now differ from the checkpoint's, or that it lacks, under the checkpoint's names.
        link: link to unchanged files where the system can, for a folder that does not outlive them.

    Raises:
        UsageError: the model would overwrite files that it reads from.
    """
    with writing(target):
        target.mkdir(parents=True, exist_ok=True)
    if changed and any(is_same_file(path, target / path.name) for path in checkpoint.files):
        raise UsageError(
            "a mixture of experts reads its weights from this folder, and they were changed in memory",
            where=target,
            got=", ".join(list(changed)[:4]),
            hint="save it to another folder",
        )
    weight_map: dict[str, str] = {}
    by_file = checkpoint.tensors_by_file()
    without = {scales_in(checkpoint, name) for name in changed}  # changed tensors are plain numbers, without scales
    for path in tqdm(checkpoint.files, desc="Copying the checkpoint", unit="file", delay=1):
        specs = {name: checkpoint.specs[name] for name in by_file[path] if name not in without}
        if path.name == _SINGLE:  # transformers would read no other file
            specs |= {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in changed.items() if name not in specs}
        mine = {name: changed[name] for name in specs if name in changed}
        if mine or len(specs) < len(by_file[path]):
            _write(target / path.name, specs, checkpoint, mine)
        else:
            copy_whole(path, target / path.name, link=link)
        weight_map |= dict.fromkeys(specs, path.name)
    added = {name: tensor for name, tensor in changed.items() if name not in weight_map}
    weight_map |= _write_added(target, added)
    _write_index(target, weight_map)
    write_json(target / SOURCE, _source_of(checkpoint))
    write_json(target / "config.json", config)
    remove_stale(target, set(weight_map.values()))


def _write(name: Path, specs: Mapping[str, TensorSpec], checkpoint: Checkpoint, changed: Mapping[str, torch.Tensor]) -> None:
    """Write a file of the checkpoint with some tensors in place of its own."""
    specs = {key: (changed[key].dtype, tuple(changed[key].shape)) if key in changed else spec for key, spec in specs.items()}

    def pieces() -> Iterator[torch.Tensor]:
        for key in specs:
            yield from [changed[key]] if key in changed else checkpoint.pieces(key)

    write_safetensors(name, specs, pieces(), _METADATA)


def _write_added(target: Path, added: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Write the tensors that the checkpoint lacks to files of their own. Returns the file of each tensor."""
    weight_map: dict[str, str] = {}
    specs: dict[str, TensorSpec] = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in added.items()}
    for number, shard in enumerate(divide_into_shards(specs) if specs else [], start=1):
        name = f"model-added-{number:05d}.safetensors"
        write_safetensors(target / name, shard, (added[key] for key in shard), _METADATA)
        weight_map |= dict.fromkeys(shard, name)
    return weight_map


def _write_index(target: Path, weight_map: Mapping[str, str]) -> None:
    """Write the index, unless `model.safetensors` is the only file: without an index, transformers looks for that one."""
    files = sorted(set(weight_map.values()))
    if files == [_SINGLE]:
        (target / INDEX_NAME).unlink(missing_ok=True)
        return
    size = sum((target / name).stat().st_size for name in files)
    write_json(target / INDEX_NAME, {"metadata": {"total_size": size}, "weight_map": dict(weight_map)})
