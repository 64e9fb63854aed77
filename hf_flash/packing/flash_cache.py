"""The flash cache, into which plain checkpoints are repacked when they are loaded: its entries, and how to remove them.

An entry is a folder of the cache with the bundles of one checkpoint. An interrupted run leaves `.<name>.partial`, and an
interrupted upload `.push-*`. Every request for an entry touches its lock file, whose time says when it was last used.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from filelock import Timeout
from huggingface_hub import constants

from hf_flash.base import locks
from hf_flash.base.files import exists, list_folder, writing
from hf_flash.base.folders import (
    lock_file,
    locked,
    make_lock,
    partial_folder,
    put_aside,
    shorten_name,
)
from hf_flash.errors import (
    ConfigError,
    RepackError,
    StoreError,
    StoreFormatError,
    StoreMissingError,
    UsageError,
)
from hf_flash.families.base import Family
from hf_flash.packing.bundling import add_predictor, build_store
from hf_flash.predictors.base import CopyFormat
from hf_flash.store.checkpoint import Checkpoint
from hf_flash.store.layout import FlashStore

logger = logging.getLogger("hf_flash")

_NOT_OURS: Final = (errno.EACCES, errno.EPERM, errno.EROFS)
_LEFT: Final = re.compile(r"\.(?P<name>.+)\.(partial|removed)|\.push-.+")


@dataclass(frozen=True)
class Entry:
    """A folder in the flash cache.

    Attributes:
        source, revision: what it was made from; empty if that is unknown.
        state: "ready", "unfinished" (an interrupted run left it; the next run continues it), "damaged", or "unreadable" (it
            cannot be read now, or not by this version).
        last_used: seconds since the epoch.
    """

    path: Path
    source: str
    revision: str
    predictors: tuple[str, ...]
    size_bytes: int
    last_used: float
    state: str

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def in_use(self) -> bool:
        """Whether a process is known to be writing it, or to have a model loaded from it."""
        return locks.is_held([self.path, self._lock, *self.path.glob("*.safetensors")])

    @property
    def _lock(self) -> Path:
        """The lock file of this entry; for a leftover folder, that of the entry it was to become or used to be."""
        match = _LEFT.fullmatch(self.name)
        return lock_file(self.path.with_name(match["name"]) if match and match["name"] else self.path)

    def answers_to(self, target: str) -> bool:
        """Tell whether a name, a pattern or the beginning of a commit matches this entry."""
        if re.fullmatch(r"[0-9a-f]{7,40}", target) and self.revision.startswith(target):
            return True
        return any(fnmatchcase(known, target) for known in (self.name, self.source) if known)

    def remove(self) -> None:
        """Remove it from the disk. A finished entry leaves its place at once, or not at all.

        Raises:
            UsageError: it is in use.
            RepackError: the system cannot remove it.
        """
        try:
            alone = make_lock(self._lock).acquire(timeout=0) if self._lock.exists() else nullcontext()
            with alone, writing(self.path):
                if locks.is_held([self.path, *self.path.glob("*.safetensors")]):
                    raise UsageError("in use by a running process", where=self.path, hint="close the model first")
                shutil.rmtree(self.path if _LEFT.fullmatch(self.name) else put_aside(self.path))
        except Timeout as error:
            raise UsageError("a running process is writing it", where=self.path, hint="wait for it") from error

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        used = datetime.fromtimestamp(self.last_used, UTC).isoformat(timespec="seconds")
        facts = asdict(self) | {"path": str(self.path), "predictors": list(self.predictors), "last_used": used}
        return {"name": self.name} | facts | {"in_use": self.in_use}


def scan(cache_dir: str | None = None) -> list[Entry]:
    """List the entries of the flash cache, sorted by source.

    Args:
        cache_dir: as in `FlashOffloadConfig`.
    """
    folder = cache_folder(cache_dir)
    paths = [path for path in list_folder(folder) if path.is_dir()] if exists(folder) else []
    entries = (_entry(path) for path in paths if not path.name.startswith(".") or _LEFT.fullmatch(path.name))
    return sorted((entry for entry in entries if entry is not None), key=lambda entry: (entry.source, entry.name))


def _entry(path: Path) -> Entry | None:
    source, revision, state = "", "", "unfinished"
    predictors: tuple[str, ...] = ()
    try:
        if not _LEFT.fullmatch(path.name):
            state = "damaged"
            store = FlashStore.open_folder(path)
            source, revision, state = store.metadata["source"], store.metadata["revision"], "ready"
            predictors = tuple(store.predictors)
    except (StoreFormatError, StoreMissingError):
        pass
    except StoreError:  # somebody else's, of a newer version, or not readable at the moment
        state = "unreadable"
    try:
        size = sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())
        clock = next(present for present in (lock_file(path), path) if present.exists())
        return Entry(path, source, revision, predictors, size, clock.stat().st_mtime, state)
    except (OSError, StopIteration):  # gone in the meantime
        return None


def chosen(entries: Iterable[Entry], targets: Sequence[str]) -> tuple[list[Entry], list[str]]:
    """Return the entries that the targets match, and the targets that match none."""
    entries = list(entries)
    found = [entry for entry in entries if any(map(entry.answers_to, targets))]
    return found, [target for target in targets if not any(entry.answers_to(target) for entry in entries)]


# --- making and finding an entry -----------------------------------------------------------------------------------


def cache_folder(cache_dir: str | None) -> Path:
    """Return where plain checkpoints are repacked to: `cache_dir`, `$HF_FLASH_CACHE`, or `flash` in the Hugging Face home.

    Raises:
        ConfigError: the path needs a home folder that the user lacks, or a current folder that was removed.
    """
    folder = Path(cache_dir or os.environ.get("HF_FLASH_CACHE") or Path(constants.HF_HOME) / "flash")
    try:
        return folder.expanduser().absolute()
    except (RuntimeError, OSError) as error:
        hint = "name a whole path in HF_FLASH_CACHE or cache_dir, or set HOME"
        raise ConfigError("there is no place for the flash cache", where=folder, got=error, hint=hint) from error


def cached_store(checkpoint: Checkpoint, family: Family, fmt: CopyFormat | None, cache_dir: str | None) -> FlashStore:
    """Return the store with the bundles and predictor of a plain checkpoint. Each source, revision and format is made once.

    If several processes ask at once, one makes it and the others wait.
    """
    origin = checkpoint.origin()
    key = checkpoint.identity(origin["fingerprint"], 1_000_000_000) if origin["revision"] else origin["fingerprint"]
    source = shorten_name(origin["source"].replace("/", "--"), 200)
    name = "--".join(filter(None, [source, origin["revision"][:12], key[:16]]))
    target = cache_folder(cache_dir) / name
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(target, keep=True))
        except RepackError as error:
            if error.errno in _NOT_OURS and (ready := _ready(target, fmt)):
                return ready
            raise
        if exists(target):
            try:
                return add_predictor(target, fmt)
            except (StoreFormatError, StoreMissingError) as error:  # the files prove it; "cannot be read now" is another error
                logger.warning("hf_flash: a damaged entry of the flash cache is made again: %s", error)
                shutil.rmtree(put_aside(target), ignore_errors=True)
        logger.info("hf_flash: repacking the FFN of %s into %s, once", origin["source"], target)
        with partial_folder(target, checkpoint.identity(origin["fingerprint"])) as partial:
            build_store(partial, checkpoint, family, fmt, rest=False)
            checkpoint.check_unchanged()
        return FlashStore.open_folder(target)


def _ready(target: Path, fmt: CopyFormat | None) -> FlashStore | None:
    """Open a complete entry in a cache that we may not write to: on a read-only disk, or somebody else's.

    No lock is needed: entries are replaced by renaming whole folders, and a model that is being loaded notices.
    """
    if not exists(target):
        return None
    store = FlashStore.open_folder(target)
    return store if fmt is None or fmt.variant in store.predictors else None
