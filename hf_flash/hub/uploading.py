"""Uploading a repacked folder or a mixture of experts to the Hub: its files as they are, and a model card."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import huggingface_hub
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

from hf_flash.base.folders import locked
from hf_flash.base.locks import hold_folder, is_held
from hf_flash.errors import ConfigError
from hf_flash.hub.card import card_of, model_card
from hf_flash.hub.card_subjects import CardSubject, subject_of
from hf_flash.packing.checkpoint_folder import link_or_copy
from hf_flash.packing.expert_folder import SOURCE
from hf_flash.packing.flash_cache import cache_folder

logger = logging.getLogger("hf_flash")

CARD: Final = "README.md"
_NOT_PUSHED: Final = ["*.tmp", ".*"]
# Files that an earlier checkpoint may have left in the repository: transformers would prefer some of them to the index.
_REPLACED: Final = [
    "model.safetensors",
    "model-?????-of-?????.safetensors",
    "model-?????-of-?????-*.safetensors",
    "model-added-?????.safetensors",
    "model.safetensors.index.json",
    SOURCE,
    "flash-layer-*.safetensors",
    "flash-predictor-*.safetensors",
    "flash-calibration.safetensors",
    "pytorch_model.bin",
    "pytorch_model-?????-of-?????.bin",
    "pytorch_model.bin.index.json",
]


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
    """Upload a folder to the Hub, its files as they are. Weights of another layout in the repository are replaced.

    A model card is written for the repository: where the model comes from, its licence, how to load it, what it needs. The
    text of an existing card is kept below it and its metadata is merged: that of the folder's README.md, else the repository's,
    else the source's. The folder is not changed. An interrupted upload can be started again: the Hub keeps what it has.

    Args:
        folder: as [`repack`] or `save_pretrained` made it; `repack` makes none of a mixture of experts.
        repo_id: the repository, created if it does not exist.
        commit_message, commit_description: text of the commit.
        private: whether a new repository is private.
        revision: branch to upload to, created if it does not exist.
        create_pr: open a pull request instead.
        bench: a JSON report of `hf-flash bench` on this model, for the card; without it the card says nothing about speed.

    Returns:
        The Hub's `CommitInfo`.

    Raises:
        StoreError: the folder was made by neither.
        ConfigError: both `revision` and `create_pr`, `bench` is of another model, or the metadata of README.md cannot be read.
    """
    folder = Path(folder)
    text = folder / CARD
    # Makes the card once before the Hub is asked, so that errors come first.
    model_card(folder, repo_id, _read(text) if text.is_file() else "", bench=bench)
    with staging() as place:
        for path in folder.rglob("*"):
            inside = path.relative_to(folder)
            if path.is_file() and not any(part.startswith(".") for part in inside.parts):
                (place / inside).parent.mkdir(parents=True, exist_ok=True)
                link_or_copy(path, place / inside)
        return upload(
            place, repo_id, token=token, commit_message=commit_message, commit_description=commit_description, private=private,
            revision=revision, create_pr=create_pr, bench=bench,
        )  # fmt: skip


@contextmanager
def staging() -> Iterator[Path]:
    """Make a temporary folder in the flash cache for an upload: links to large files, and the files made for it."""
    cache = cache_folder(None)
    cache.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        with locked(cache / "push"):
            for left in cache.glob(".push-*"):  # by a killed push
                if not is_held([left]):
                    shutil.rmtree(left, ignore_errors=True)
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=cache, prefix=".push-")))
            stack.enter_context(hold_folder(folder))
        yield folder


def upload(
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
    """Write the card into a staging folder, and upload the folder as [`push`] says.

    Args:
        folder: from [`staging`].
        if_missing: files to upload only if the repository has none of them.
        tags: further tags for the card.
    """
    if create_pr and revision is not None:
        raise ConfigError("a pull request goes to the default branch", where="push", got="create_pr and revision")
    api = huggingface_hub.HfApi(token=token)
    name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(name, branch=revision, exist_ok=True)
    kept = if_missing if set(if_missing) & set(api.list_repo_files(name, revision=revision)) else ()
    subject = subject_of(folder)
    card = card_of(subject, name, _card_so_far(api, folder, subject, name, revision), bench=bench)
    if tags:
        tagged = huggingface_hub.ModelCard(card)
        tagged.data.tags = [*dict.fromkeys([*(tagged.data.tags or ()), *tags])]
        card = str(tagged)
    (folder / CARD).unlink(missing_ok=True)  # a link
    (folder / CARD).write_bytes(card.encode())
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


def _card_so_far(api: huggingface_hub.HfApi, folder: Path, subject: CardSubject, name: str, revision: str | None) -> str:
    """Return the folder's own card, else the repository's, else the source's, which says the licence."""
    if (folder / CARD).is_file():
        return _read(folder / CARD)
    base = subject.base
    for repo, commit in [(name, revision), (base, subject.source["revision"])]:
        try:
            if repo is not None:
                return _read(Path(api.hf_hub_download(repo, CARD, revision=commit)))
        except (HfHubHTTPError, LocalEntryNotFoundError) as error:
            if repo == base and not isinstance(error, EntryNotFoundError):
                logger.warning(
                    "hf_flash: the card of %s cannot be read, so that its licence is not carried over: %s", base, error
                )
    return ""


def _read(card: Path) -> str:
    """Read the text of a card, with its line ends unchanged."""
    try:
        return card.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError("the model card is not UTF-8", where=card, got=str(error)) from error
