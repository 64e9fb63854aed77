"""Folders that appear whole or not at all.

A folder is built beside its target, under a lock, and renamed to the target at the end. The target and the free space on the
disk are checked first.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, Final

from filelock import FileLock, SoftFileLock, Timeout

from hf_flash.base import locks
from hf_flash.base.files import sync_to_disk, write_text, writing
from hf_flash.base.sizes import format_bytes
from hf_flash.errors import DiskSpaceError, HfFlashError, TargetExistsError

logger = logging.getLogger("hf_flash")

MARK: Final = ".belongs-to"  # file in a partial folder that says what the folder is made from
_MOST_BYTES: Final = 240  # limit for a name: file systems allow 255, and the hidden files beside it have longer names
_NOT_COPIED: Final = re.compile(
    r"(.*\.(safetensors|bin|pt|pth|h5|msgpack|ot|onnx|gguf|tmp|new|partial|lock)|.*\.index\.json|config\.json|\..*)",
    re.IGNORECASE,
)


def check_room(folder: Path, needed: int) -> None:
    """Refuse to start when the disk cannot hold what will be written.

    Raises:
        DiskSpaceError: fewer than `needed` bytes are free.
    """
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
    """Return the lock file beside a target. Whoever writes the target holds its lock."""
    return path_beside(target, ".lock")


def shorten_name(name: str, most: int = _MOST_BYTES) -> str:
    """Return a name of at most `most` bytes: in a longer name, a hash replaces the end."""
    raw = os.fsencode(name)
    if len(raw) <= most:
        return name
    return raw[: most - 17].decode(errors="ignore") + "-" + hashlib.sha256(raw).hexdigest()[:16]


def path_beside(target: Path, suffix: str) -> Path:
    """Return the path of a hidden file or folder that lies beside a target and belongs to it."""
    return target.with_name(f".{shorten_name(target.name)}{suffix}")


@contextmanager
def scratch_folder(parent: Path, purpose: str) -> Iterator[Path]:
    """Make a folder that is removed after the block, however often the user interrupts.

    Its name is known before it is made, so `finally` can always remove it. An interrupt within `tempfile.TemporaryDirectory`
    can leave a folder behind.
    """
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
        except OSError:  # the folder stays; an error that is already being raised says more
            break
        except KeyboardInterrupt as error:
            interrupted = error
    if interrupted is not None:
        raise interrupted


@contextmanager
def scratch_file(parent: Path, purpose: str, nbytes: int, pieces: Iterable[Any]) -> Iterator[Path]:
    """Write `pieces`, which have `nbytes` in all, to a file on the disk. It is removed after the block."""
    check_room(parent, nbytes)
    with scratch_folder(parent, purpose) as folder:
        path = folder / "scratch"
        with writing(path, needed=nbytes), open(path, "wb") as file:
            for piece in pieces:
                file.write(piece)
            sync_to_disk(file)
        yield path


def make_lock(path: Path) -> Any:
    """Make the lock for an existing lock file. On a file system without locks, a second file beside it serves as the lock."""
    return FileLock(path) if locks.has_locks(path) else SoftFileLock(path.with_name(f"{path.name}.held"))


@contextmanager
def locked(target: Path, *, keep: bool = False) -> Iterator[None]:
    """Hold the lock of a target while the block runs. Waiting for it is logged as a warning.

    On a file system without locks, the existence of a file is the lock. A file left behind by a killed process of this machine
    does not count; one left by another machine has to be removed by hand.

    Args:
        keep: keep the lock file afterwards, for locks that many processes take. Otherwise the next owner must check the
            target again.
    """
    path = lock_file(target)
    with writing(target):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()  # without permission to write this fails at once; a FileLock would wait
        lock = make_lock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning(
            "hf_flash: another process is writing %s; waiting for it%s",
            target,
            f". If there is none, remove {lock.lock_file}" if isinstance(lock, SoftFileLock) else "",
        )
        lock.acquire()
    try:
        yield
    finally:
        if not keep:
            path.unlink(missing_ok=True)
        lock.release()


@contextmanager
def partial_folder(target: Path, belongs: str = "") -> Iterator[Path]:
    """Make a folder beside `target`. If the block succeeds it is renamed to `target`; otherwise it stays for the next run.

    The caller holds the target's lock.

    Args:
        belongs: identifies what the folder is made from. If an earlier run left a folder made from the same source, its files
            are still there; otherwise, or if `belongs` is empty, the folder is empty.
    """
    check_target(target)
    partial = path_beside(target, ".partial")
    mark = partial / MARK
    with writing(partial):
        if not belongs or _text_of(mark) != belongs:
            clear_away(partial)
        partial.mkdir(exist_ok=True)
        write_text(mark, belongs)
    try:
        yield partial
    except HfFlashError:
        with suppress(OSError):
            if os.listdir(partial) == [MARK]:  # nothing was finished
                mark.unlink()
                partial.rmdir()
        raise
    with writing(target):
        mark.unlink()
        if target.is_dir():
            target.rmdir()
        os.rename(partial, target)
    _sync(target.parent)


def _text_of(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def clear_away(path: Path) -> None:
    """Remove a file, a link, or a folder with its contents, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
        return
    with suppress(FileNotFoundError):
        os.unlink(path)


def put_aside(folder: Path) -> Path:
    """Rename a folder that is to be removed: it leaves its place at once, or not at all. Returns the new path."""
    for number in count():
        aside = folder.with_name(f".{folder.name}{f'.{number}' if number else ''}.removed")
        with suppress(OSError):  # another process is clearing it away
            clear_away(aside)  # left by a run that died here
        if not os.path.lexists(aside):
            break
    with writing(folder):
        os.rename(folder, aside)
    return aside


def _sync(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut, where the system can. The rename is done, so a refusal is not an error."""
    if hasattr(os, "O_DIRECTORY"):
        with suppress(OSError):
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)


def check_target(target: Path) -> None:
    """Refuse a target that exists and is not an empty folder, or that a rename cannot replace.

    Raises:
        TargetExistsError: the target is one of these.
        RepackError: the folder cannot be read.
    """
    with writing(target):
        _check_target(target)


def _check_target(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise TargetExistsError("the target is not an empty folder", where=target, hint="choose another one, or remove it")
    if target.exists() and os.path.ismount(target):
        raise TargetExistsError("the target is a mount point", where=target, hint="name a new folder inside it")


def copy_small_files(source: Path, target: Path) -> None:
    """Copy what belongs to a checkpoint besides weights and config.json: tokenizer, generation config, licence, model card."""
    for path in sorted(source.iterdir()):
        if path.is_file() and not _NOT_COPIED.fullmatch(path.name):
            with writing(target / path.name):
                shutil.copyfile(path, target / path.name)
