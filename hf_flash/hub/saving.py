"""`save_pretrained` and `push_to_hub` of a loaded flash model: the store's files are copied as they are, never rewritten.

The other weights are written anew: from memory if they differ from the checkpoint, else as copies of it.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from hf_flash.base.files import write_text
from hf_flash.budget.routing import copy_routing
from hf_flash.errors import ConfigError, UsageError
from hf_flash.families.conversions import Conversions
from hf_flash.families.quantized import block_of, plain_tensor, quantization_of
from hf_flash.hub.uploading import CARD, staging, upload
from hf_flash.hub.uploading import push as push  # importable from here, beside the methods that call it
from hf_flash.packing.checkpoint_folder import save_folder
from hf_flash.packing.expert_folder import save_experts
from hf_flash.runtime.devices import METHODS
from hf_flash.runtime.flash_embedding import Table
from hf_flash.runtime.flash_weights import OnFlash, without_flash_weights
from hf_flash.runtime.model import ExpertRuntime, FlashRuntime, runtime_of
from hf_flash.runtime.model_class import add_methods, stock_class, stock_methods
from hf_flash.runtime.transformers_model import has_adapter, plain_state, tied_names
from hf_flash.store.checkpoint import Checkpoint
from hf_flash.store.layout import FlashStore

_GENERATION: Final = "generation_config.json"
_SHOWN: Final = 4  # names in an error, at most
_PUSH: Final = frozenset({"commit_message", "commit_description", "private", "revision", "create_pr", "bench"})
_TOKENIZER: Final = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "vocab.txt", "tokenizer.model", "spiece.model", "chat_template.jinja",
)  # fmt: skip


def give_flash_class(model: Any) -> None:
    """Give a loaded model its own `save_pretrained` and `push_to_hub`: the stock ones would rewrite the store, unaligned.

    It also gets the methods of runtime/devices.py, for devices, dtypes, copies and foreign weights.
    """
    add_methods(model, {"save_pretrained": save_pretrained, "push_to_hub": push_to_hub, **METHODS})


def save_pretrained(
    model: Any,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: Mapping[str, Any] | None = None,
    push_to_hub: bool = False,
    max_shard_size: int | str | None = None,
    variant: str | None = None,
    token: str | bool | None = None,
    save_peft_format: bool = True,
    save_original_format: bool = True,
    distributed_checkpoint: bool = False,
    safe_serialization: bool | None = True,
    save_function: Any = None,
    repo_id: str | None = None,
    **kwargs: Any,
) -> None:
    """Save a flash model: the store is copied as it is, and changed tensors are written with their present values.

    Replaces `PreTrainedModel.save_pretrained` on the instance. If the model has a PEFT adapter, only the adapter is saved, as
    transformers does. `max_shard_size`, `save_original_format` and `save_function` have no effect: the store determines the
    files.

    Args:
        save_directory: a new folder, or the one the model was loaded from.
        state_dict: what to save in place of the model's own tensors: all of them, with the FFN matrices that are on flash.
        push_to_hub: upload it afterwards; `repo_id`, `token` and `kwargs` go to [`push`].

    Raises:
        ConfigError: `state_dict` lacks tensors, or an argument is unknown or asks for anything but safetensors files under
            their usual names.
        UsageError: the model's layers are not those that were loaded, or `state_dict` has other FFN matrices.
    """
    if has_adapter(model):
        stock_methods(model).save_pretrained(
            save_directory,
            is_main_process=is_main_process,
            state_dict=state_dict,
            push_to_hub=push_to_hub,
            token=token,
            save_peft_format=save_peft_format,
            **kwargs,
        )
        return
    refused = {
        "variant": variant is not None,
        "safe_serialization": safe_serialization is False,
        "distributed_checkpoint": distributed_checkpoint,
    }
    _refuse("save_pretrained", refused)
    _check_known("save_pretrained", kwargs)
    if not is_main_process:
        return
    _save(model, Path(save_directory), state_dict)
    if push_to_hub:
        push(save_directory, repo_id or Path(save_directory).name, token=token, **kwargs)


def push_to_hub(
    model: Any,
    repo_id: str,
    *,
    token: str | bool | None = None,
    max_shard_size: int | str | None = None,
    safe_serialization: bool | None = True,
    variant: str | None = None,
    tags: Sequence[str] | None = None,
    **kwargs: Any,
) -> Any:
    """Upload a flash model, with a model card. Replaces `PreTrainedModel.push_to_hub` on the instance.

    The store is uploaded from its own folder; only the other weights pass through a temporary folder in the flash cache. The
    tokenizer beside the model's files is uploaded too if the repository has none.

    Args:
        repo_id: the repository, created if it does not exist.
        token: as in huggingface_hub.
        max_shard_size: has no effect: the store determines the files.
        tags: further tags for the card.
        kwargs: as in [`push`].
    """
    if has_adapter(model):
        return stock_methods(model).push_to_hub(repo_id, token=token, **kwargs)
    _refuse("push_to_hub", {"variant": variant is not None, "safe_serialization": safe_serialization is False})
    _check_known("push_to_hub", kwargs)
    with staging() as place:
        beside = runtime_of(model).checkpoint.files[0].parent
        _save(model, place, link=True)
        for name in (CARD, *_TOKENIZER):
            if (beside / name).is_file():
                shutil.copyfile(beside / name, place / name)
        return upload(place, repo_id, token=token, if_missing=_TOKENIZER, tags=tags, **kwargs)


def _refuse(where: str, refused: Mapping[str, bool]) -> None:
    """Refuse arguments that a folder with a store cannot honour."""
    if any(refused.values()):
        raise ConfigError(
            "a flash model is saved from its files",
            where=where,
            expected="safetensors files under their usual names",
            got=", ".join(name for name, wrong in refused.items() if wrong),
            hint="leave it out, or `hf_flash.restore` the plain checkpoint first",
        )


def _check_known(where: str, kwargs: dict[str, Any]) -> None:
    """Refuse arguments that neither stock transformers nor [`push`] knows, before anything is written."""
    if kwargs.keys() - _PUSH:
        raise ConfigError(
            "unknown arguments", where=where, expected=f"of {', '.join(sorted(_PUSH))}", got=", ".join(kwargs.keys() - _PUSH)
        )


def _save(model: Any, folder: Path, state_dict: Mapping[str, Any] | None = None, *, link: bool = False) -> None:
    runtime = runtime_of(model)
    state = _whole(model, runtime, state_dict)
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    config = json.loads(model.config.to_json_string())
    if isinstance(runtime, ExpertRuntime):
        save_experts(folder, runtime.checkpoint, config, _changed_beside_experts(model, runtime, state), link=link)
        copy_routing(runtime.checkpoint.files[0].parent, folder, runtime.plan.experts)
    else:
        changed = _changed(state, runtime.checkpoint, runtime.store)
        save_folder(folder, runtime.checkpoint, runtime.store, config, changed, link=link)
    if folder.resolve() == runtime.checkpoint.files[0].parent.resolve():
        runtime.checkpoint = Checkpoint.open_folder(folder)  # its files were replaced
    if model.can_generate():
        write_text(folder / _GENERATION, model.generation_config.to_json_string(use_diff=True))


def _whole(
    model: Any, runtime: FlashRuntime | ExpertRuntime, state_dict: Mapping[str, Any] | None
) -> Mapping[str, torch.Tensor]:
    """Return a model's tensors that are not on flash, if these and those on flash are what its config describes.

    Raises:
        UsageError: they are not, so what would be written could not be loaded.
        ConfigError: `state_dict` lacks tensors.
    """
    state = model.state_dict() if state_dict is None else state_dict
    with torch.device("meta"):
        described = stock_class(model)(copy.deepcopy(model.config)).state_dict()
    lacking = sorted(described.keys() - state.keys() - tied_names(model))
    if lacking and state_dict is not None:
        raise ConfigError(
            "a flash model is saved from its files, and whole",
            where="save_pretrained",
            expected="a state_dict with all of the model's tensors",
            got=f"a state_dict without {_some(lacking)}",
            hint="leave it out, or `hf_flash.restore` the plain checkpoint first",
        )
    wrong = lacking + [name for name, value in described.items() if name in state and state[name].shape != value.shape]
    found = [
        stored
        for _, part in model.named_modules(remove_duplicate=False)
        if isinstance(part, OnFlash)
        for stored in part.flash_weights.values()
    ]
    loaded = runtime.stored_weights()
    layers, wanted = ([stored for stored in some if not isinstance(stored, Table)] for some in (found, loaded))
    if wrong or layers != wanted or any(stored not in loaded for stored in found):
        order = list(dict.fromkeys(stored.layer_name for stored in found))
        raise UsageError(
            "the model's layers are not those that were loaded, but what is on flash can only be copied as it is",
            where="saving",
            expected=f"the {len({stored.layer_name for stored in loaded})} layers on flash, and what the config describes",
            got=f"layers {', '.join(order)} of it{'; without or with other ' if wrong else ''}{_some(wrong)}",
            hint="change the plain model (`hf_flash.restore` writes it), and save that",
        )
    return {name: value for name, value in without_flash_weights(model, state).items() if isinstance(value, torch.Tensor)}


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (" ..." if len(names) > _SHOWN else "")


def _changed(state: Mapping[str, torch.Tensor], checkpoint: Checkpoint, store: FlashStore) -> dict[str, torch.Tensor]:
    """Return the model's tensors that differ from its checkpoint, under the checkpoint's names, and those that it lacks."""
    ffn, seen = store.ffn_names, set[int]()
    changed: dict[str, torch.Tensor] = {}
    matched: set[str] = set()
    for name in checkpoint.specs:
        mine = next((n for n in (name, f"model.{name}", name.removeprefix("model.")) if n in state), None)
        if mine is None or name in ffn:
            continue
        value, stored = state[mine], checkpoint.tensor(name)
        matched.add(mine)
        seen.add(value.data_ptr())
        if not _same(value, stored):
            changed[name] = value
    return changed | {n: v for n, v in state.items() if n not in matched and v.data_ptr() not in seen}


def _changed_beside_experts(model: Any, runtime: ExpertRuntime, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same for a mixture, whose checkpoint has other names than the model; transformers converts the names back."""
    checkpoint, experts = runtime.checkpoint, {name for layer in runtime.ffns for row in layer.layer.tensors for name in row}
    beside = [name for name in checkpoint.specs if name not in experts]
    sources, tied = Conversions(model).sources_of(set(state), beside), tied_names(model)
    block = block_of(quantization_of(model.config))
    changed: dict[str, torch.Tensor] = {}
    others: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        tensor = sources[name].as_it_is if name in sources else None
        if tensor is None:
            others |= {} if name in tied else {name: value}
        elif not _same(value, plain_tensor(checkpoint, tensor, value.dtype, block)):
            changed[tensor] = value
    for name, value in plain_state(model, others).items():
        known = checkpoint.specs.get(name)
        if name in experts:
            continue
        if known is None or not _same(value, plain_tensor(checkpoint, name, value.dtype, block)):
            changed[name] = value
    return changed


def _same(value: torch.Tensor, stored: torch.Tensor) -> bool:
    """Tell whether `value` equals `stored` in the dtype of `value`. It compares in parts, since embeddings are large."""
    if value.shape != stored.shape:
        return False
    mine, theirs = value.reshape(-1), stored.reshape(-1)
    step = 1 << 22
    parts = (slice(at, at + step) for at in range(0, len(mine), step))
    return all(torch.equal(mine[part].cpu(), theirs[part].to(value.dtype)) for part in parts)
