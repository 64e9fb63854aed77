"""Saving and sharing a flash model: the store's files are copied or uploaded as they are, never rewritten."""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import huggingface_hub
import torch
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

from hf_flash.base import locks as inuse
from hf_flash.base.files import write_text
from hf_flash.base.folders import locked
from hf_flash.errors import ConfigError, UsageError
from hf_flash.hub.card import base_model, model_card
from hf_flash.packing.checkpoint_folder import link_or_copy, save_folder
from hf_flash.packing.flash_cache import cache_folder
from hf_flash.runtime.devices import METHODS
from hf_flash.runtime.flash_weights import Matrix, OnFlash, checked
from hf_flash.runtime.model import FlashRuntime, find_runtime
from hf_flash.store.checkpoint import Checkpoint
from hf_flash.store.layout import FlashStore

logger = logging.getLogger("hf_flash")

_CARD: Final = "README.md"
_GENERATION: Final = "generation_config.json"
_SHOWN: Final = 4  # of names in an error
_PUSH: Final = frozenset({"commit_message", "commit_description", "private", "revision", "create_pr", "bench"})
_NOT_PUSHED: Final = ["*.tmp", ".*"]
_TOKENIZER: Final = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "vocab.txt", "tokenizer.model", "spiece.model", "chat_template.jinja",
)  # fmt: skip
# What an earlier checkpoint in the repository may have left: transformers would prefer it to the index.
_REPLACED: Final = [
    "model.safetensors",
    "model-?????-of-?????.safetensors",
    "model-?????-of-?????-*.safetensors",
    "model.safetensors.index.json",
    "flash-layer-*.safetensors",
    "flash-predictor-*.safetensors",
    "flash-calibration.safetensors",
    "pytorch_model.bin",
    "pytorch_model-?????-of-?????.bin",
    "pytorch_model.bin.index.json",
]


def bind(model: Any) -> None:
    """Give a loaded model its own `save_pretrained` and `push_to_hub`: the stock ones would rewrite the store, unaligned.
    And what `devices` has for it.

    By a subclass of its class for this one model, under the same name: methods on the instance would be a reference cycle,
    and a model that is dropped would keep its memory until the next garbage collection.
    """
    stock = type(model)
    own = {"save_pretrained": save_pretrained, "push_to_hub": push_to_hub, **METHODS}
    model.__class__ = type(stock.__name__, (stock,), {"__module__": stock.__module__, "__doc__": stock.__doc__, **own})


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
    """Save a flash model: the store is copied as it is, tensors that were changed are written as they are now.

    Takes the place of `PreTrainedModel.save_pretrained` on the instance. With a PEFT adapter on it, the adapter alone is
    saved, as transformers does. `max_shard_size`, `save_original_format` and `save_function` have no say: files are as the
    store has them.

    Args:
        save_directory: a new folder, or the one the model was loaded from.
        state_dict: what to save in place of the model's own tensors. All of them; FFN matrices as they are on flash.
        push_to_hub: upload it afterwards; `repo_id`, `token` and `kwargs` go to [`push`].

    Raises:
        ConfigError: `state_dict` lacks tensors, or an argument is unknown or asks for other files than safetensors ones
            under their usual names.
        UsageError: the model's layers are not those that were loaded, or `state_dict` has other FFN matrices.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        super(type(model), model).save_pretrained(
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
    _honoured("save_pretrained", refused)
    _known("save_pretrained", kwargs)
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
    """Upload a flash model, with a card. Takes the place of `PreTrainedModel.push_to_hub` on the instance.

    The store is uploaded from where it lies; only the other weights pass through a temporary folder in the flash cache. The
    tokenizer that lies beside the model's files comes along where the repository has none.

    Args:
        repo_id: the repository, created if it is not there.
        token: as in huggingface_hub.
        max_shard_size: has no say: files are as the store has them.
        tags: more of them for the card.
        kwargs: as in [`push`].
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        return super(type(model), model).push_to_hub(repo_id, token=token, **kwargs)
    _honoured("push_to_hub", {"variant": variant is not None, "safe_serialization": safe_serialization is False})
    _known("push_to_hub", kwargs)
    with _staging() as place:
        beside = find_runtime(model).checkpoint.files[0].parent
        _save(model, place, link=True)
        for name in (_CARD, *_TOKENIZER):
            if (beside / name).is_file():
                shutil.copyfile(beside / name, place / name)
        return _upload(place, repo_id, token=token, if_missing=_TOKENIZER, tags=tags, **kwargs)


def push(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    bench: str | os.PathLike[str] | None = None,
) -> Any:
    """Upload a repacked folder to the Hub, its files as they are. Weights of another layout in the repository are replaced.

    A model card is written for the repository: where the model comes from, its licence, how to load it, what it takes. The
    folder's own README.md is kept below it, else that of the repository, else the source's, and its metadata merged; the
    folder stays as it is. An upload that was interrupted goes on when it is started again: what the Hub has is not sent again.

    Args:
        folder: as [`repack`] or `save_pretrained` made it.
        repo_id: the repository, created if it is not there.
        commit_message, commit_description: of the commit.
        private: for a new repository.
        revision: branch to upload to, created if it is not there.
        create_pr: open a pull request instead.
        bench: a JSON report of `hf-flash bench` on this model, for the card: without one it says nothing about speed.

    Returns:
        The Hub's `CommitInfo`.

    Raises:
        StoreError: the folder is no repacked checkpoint.
        ConfigError: both `revision` and `create_pr`, `bench` is of another model, or the metadata of README.md cannot be read.
    """
    folder = Path(folder)
    text = folder / _CARD
    model_card(folder, repo_id, _read(text) if text.is_file() else "", bench=bench)  # what is wrong is known before the Hub is
    with _staging() as place:
        for path in folder.rglob("*"):
            inside = path.relative_to(folder)
            if path.is_file() and not any(part.startswith(".") for part in inside.parts):
                (place / inside).parent.mkdir(parents=True, exist_ok=True)
                link_or_copy(path, place / inside)
        return _upload(
            place, repo_id, token=token, commit_message=commit_message, commit_description=commit_description, private=private,
            revision=revision, create_pr=create_pr, bench=bench,
        )  # fmt: skip


@contextmanager
def _staging() -> Iterator[Path]:
    """A folder in the flash cache for what is uploaded: links to large files, and the files that are made for it."""
    cache = cache_folder(None)
    cache.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        with locked(cache / "push"):
            for left in cache.glob(".push-*"):  # by a push that was killed
                if not inuse.held([left]):
                    shutil.rmtree(left, ignore_errors=True)
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=cache, prefix=".push-")))
            stack.enter_context(inuse.holding(folder))
        yield folder


def _upload(
    folder: Path,
    repo_id: str,
    *,
    token: str | bool | None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    bench: str | os.PathLike[str] | None = None,
    if_missing: Sequence[str] = (),
    tags: Sequence[str] | None = None,
) -> Any:
    """Write the card into a staging folder, which may be written to, and upload it as [`push`] says.

    Args:
        if_missing: files to upload only if the repository has none of them.
    """
    if create_pr and revision is not None:
        raise ConfigError("a pull request goes to the default branch", where="push", got="create_pr and revision")
    api = huggingface_hub.HfApi(token=token)
    name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(name, branch=revision, exist_ok=True)
    kept = if_missing if set(if_missing) & set(api.list_repo_files(name, revision=revision)) else ()
    text = _card_so_far(api, folder, name, revision)
    card = model_card(folder, name, text, bench=bench)
    if tags:
        tagged = huggingface_hub.ModelCard(card)
        tagged.data.tags = [*dict.fromkeys([*(tagged.data.tags or ()), *tags])]
        card = str(tagged)
    (folder / _CARD).unlink(missing_ok=True)  # a link
    (folder / _CARD).write_bytes(card.encode())
    return api.upload_folder(
        repo_id=name,
        folder_path=folder,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message or "Upload flash model",
        commit_description=commit_description,
        ignore_patterns=[*_NOT_PUSHED, *kept],
        delete_patterns=_REPLACED,
    )


def _card_so_far(api: huggingface_hub.HfApi, folder: Path, name: str, revision: str | None) -> str:
    """The folder's own card, else the repository's, else that of the source, from which the licence is known."""
    if (folder / _CARD).is_file():
        return _read(folder / _CARD)
    store = FlashStore.open_folder(folder)
    base = base_model(store)
    for repo, commit in [(name, revision), (base, store.metadata["revision"])]:
        try:
            if repo is not None:
                return _read(Path(api.hf_hub_download(repo, _CARD, revision=commit)))
        except (HfHubHTTPError, LocalEntryNotFoundError) as error:
            if repo == base and not isinstance(error, EntryNotFoundError):
                logger.warning(
                    "hf_flash: the card of %s cannot be read, so that its licence is not carried over: %s", base, error
                )
    return ""


def _read(card: Path) -> str:
    """The text as it is, with its line ends."""
    try:
        return card.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError("the model card is not UTF-8", where=card, got=str(error)) from error


def _honoured(where: str, refused: Mapping[str, bool]) -> None:
    """Refuse arguments that a folder with a store cannot follow."""
    if any(refused.values()):
        raise ConfigError(
            "a flash model is saved from its store",
            where=where,
            expected="safetensors files under their usual names",
            got=", ".join(name for name, wrong in refused.items() if wrong),
            hint="leave it out, or `hf_flash.restore` the plain checkpoint first",
        )


def _known(where: str, kwargs: dict[str, Any]) -> None:
    """Refuse what neither stock nor [`push`] would understand before anything is written."""
    if kwargs.keys() - _PUSH:
        raise ConfigError(
            "unknown arguments", where=where, expected=f"of {', '.join(sorted(_PUSH))}", got=", ".join(kwargs.keys() - _PUSH)
        )


def _save(model: Any, folder: Path, state_dict: Mapping[str, Any] | None = None, *, link: bool = False) -> None:
    runtime = find_runtime(model)
    changed = _changed(_whole(model, runtime, state_dict), runtime.checkpoint, runtime.store)
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    config = json.loads(model.config.to_json_string())
    save_folder(folder, runtime.checkpoint, runtime.store, config, changed, link=link)
    if folder.resolve() == runtime.checkpoint.files[0].parent.resolve():
        runtime.checkpoint = Checkpoint.open_folder(folder)  # its files are not the ones that were opened
    if model.can_generate():
        write_text(folder / _GENERATION, model.generation_config.to_json_string(use_diff=True))


def _whole(model: Any, runtime: FlashRuntime, state_dict: Mapping[str, Any] | None) -> Mapping[str, torch.Tensor]:
    """A model's tensors that are not on flash, if they and the store are what its config describes.

    Raises:
        UsageError: they are not, so that what would be written could not be loaded.
        ConfigError: `state_dict` lacks tensors.
    """
    state = model.state_dict() if state_dict is None else state_dict
    with torch.device("meta"):
        described = type(model).__mro__[1](copy.deepcopy(model.config)).state_dict()
    lacking = sorted(described.keys() - state.keys() - set(model.all_tied_weights_keys))
    if lacking and state_dict is not None:
        raise ConfigError(
            "a flash model is saved from its store, and whole",
            where="save_pretrained",
            expected="a state_dict with all of the model's tensors",
            got=f"a state_dict without {_some(lacking)}",
            hint="leave it out, or `hf_flash.restore` the plain checkpoint first",
        )
    wrong = lacking + [name for name, value in described.items() if name in state and state[name].shape != value.shape]
    found = [part.matrix for _, part in model.named_modules(remove_duplicate=False) if isinstance(part, OnFlash)]
    loaded = [Matrix(layer, down, runtime.engine.dtype) for layer in runtime.store.layers for down in (False, True)]
    if wrong or found != loaded:
        order = [matrix.layer.index for matrix in found if matrix is not None and not matrix.down]
        raise UsageError(
            "the model's layers are not those that were loaded, but the store can only be copied as it is",
            where="saving",
            expected=f"the {len(runtime.store.layers)} layers of the store, and the tensors that the config describes",
            got=f"layers {order} of it{'; without or with other ' if wrong else ''}{_some(wrong)}",
            hint="change the plain model (`hf_flash.restore` writes it), save and repack that",
        )
    return {name: value for name, value in checked(model, state).items() if isinstance(value, torch.Tensor)}


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (" ..." if len(names) > _SHOWN else "")


def _changed(state: Mapping[str, torch.Tensor], checkpoint: Checkpoint, store: FlashStore) -> dict[str, torch.Tensor]:
    """Tensors of the model that are not what its checkpoint says, under the checkpoint's names, and those it has not."""
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
        if value.shape != stored.shape or not _same(value, stored):
            changed[name] = value
    return changed | {n: v for n, v in state.items() if n not in matched and v.data_ptr() not in seen}


def _same(value: torch.Tensor, stored: torch.Tensor) -> bool:
    """Whether `value` is `stored` in its own dtype; compared in parts, since embeddings are large."""
    mine, theirs = value.reshape(-1), stored.reshape(-1)
    step = 1 << 22
    parts = (slice(at, at + step) for at in range(0, len(mine), step))
    return all(torch.equal(mine[part], theirs[part].to(value.dtype)) for part in parts)
