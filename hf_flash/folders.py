"""Folders that appear whole or not at all: locks, room, a partial folder that is renamed at the end."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from filelock import FileLock, Timeout

from .budget import format_bytes
from .errors import DiskSpaceError, HfFlashError, TargetExistsError
from .writer import writing

logger = logging.getLogger("hf_flash")

_MOST_BYTES: Final = 240  # of a name: file systems take 255, and hidden files beside it have longer ones
_NOT_COPIED: Final = re.compile(
    r"(.*\.(safetensors|bin|pt|pth|h5|msgpack|ot|onnx|gguf|tmp|lock)|.*\.index\.json|config\.json|\..*)", re.IGNORECASE
)


def check_room(folder: Path, needed: int) -> None:
    """Refuse to start when the disk cannot hold what will be written."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DiskSpaceError(
            "not enough room on the disk",
            where=folder,
            expected=f"{format_bytes(needed)} ({needed} bytes) free",
            got=f"{format_bytes(free)} ({free} bytes)",
            hint="free some space or choose another disk",
        )


def lock_file(target: Path) -> Path:
    """The file beside a target whose lock says that somebody is at work on it."""
    return beside(target, ".lock")


def short(name: str, most: int = _MOST_BYTES) -> str:
    """A name that file systems take; one that is too long gets a hash for its end."""
    raw = os.fsencode(name)
    if len(raw) <= most:
        return name
    return raw[: most - 17].decode(errors="ignore") + "-" + hashlib.sha256(raw).hexdigest()[:16]


def beside(target: Path, suffix: str) -> Path:
    """The hidden file or folder beside a target that belongs to it."""
    return target.with_name(f".{short(target.name)}{suffix}")


@contextmanager
def scratch_folder(parent: Path, purpose: str) -> Iterator[Path]:
    """A folder that is gone afterwards, however often the user interrupts. Its name is known before it is made, and `finally`
    is entered: an interrupt within `tempfile.TemporaryDirectory` can leave one behind."""
    folder = parent / f".hf-flash-{purpose}-{os.getpid()}-{time.monotonic_ns()}"
    try:
        with writing(folder):
            folder.mkdir(mode=0o700)
        yield folder
    finally:
        _remove(folder)


def _remove(folder: Path) -> None:
    interrupted: BaseException | None = None
    while folder.exists():
        try:
            shutil.rmtree(folder)
        except OSError:  # somebody else's matter; there may be an error on its way already
            break
        except KeyboardInterrupt as error:
            interrupted = error
    if interrupted is not None:
        raise interrupted


@contextmanager
def scratch_file(parent: Path, purpose: str, nbytes: int, pieces: Iterable[Any]) -> Iterator[Path]:
    """A file of `nbytes` on the disk, of `pieces`, that is gone afterwards."""
    check_room(parent, nbytes)
    with scratch_folder(parent, purpose) as folder:
        path = folder / "scratch"
        with writing(path, needed=nbytes), open(path, "wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        yield path


@contextmanager
def locked(target: Path, *, keep: bool = False) -> Iterator[None]:
    """Hold a lock beside the target; says so when it has to wait.

    Args:
        keep: leave the lock file, where many processes come and go. Otherwise the next owner must check the target again.
    """
    path = lock_file(target)
    with writing(target):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()  # a folder that cannot be written to is an error here; a FileLock would wait for it
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("hf_flash: another process is writing %s; waiting for it", target)
        lock.acquire()
    try:
        yield
    finally:
        if not keep:
            path.unlink(missing_ok=True)
        lock.release()


@contextmanager
def partial_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` that becomes it when the block ends well, and stays for the next run when it does not.

    The caller holds the target's lock.
    """
    check_target(target)
    partial = beside(target, ".partial")
    with writing(partial):
        partial.mkdir(exist_ok=True)
    try:
        yield partial
    except HfFlashError:
        with suppress(OSError):
            partial.rmdir()  # if nothing was finished
        raise
    with writing(target):
        if target.is_dir():
            target.rmdir()
        os.rename(partial, target)
        _sync(target.parent)


def _sync(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut, where the system lets us."""
    if hasattr(os, "O_DIRECTORY"):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def check_target(target: Path) -> None:
    """Refuse a target that is no empty folder, or whose place cannot be taken by a rename."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise TargetExistsError("the target is not an empty folder", where=target, hint="choose another one, or remove it")
    if target.exists() and os.path.ismount(target):
        raise TargetExistsError("the target is a mount point", where=target, hint="name a new folder inside it")


def copy_small_files(source: Path, target: Path) -> None:
    """Tokenizer, generation config, licence, model card: everything that is not weights."""
    for path in sorted(source.iterdir()):
        if path.is_file() and not _NOT_COPIED.fullmatch(path.name):
            with writing(target / path.name):
                shutil.copyfile(path, target / path.name)
