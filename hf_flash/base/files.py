"""Files that somebody else may have made (contract C11): opened without waiting, of bounded size, inside their folder.

Only regular files are opened, and never by a way that could wait: a FIFO or a device of a shard's name is an error at once.
Bytes come by `pread`, not through a memory map: a file that is cut short meanwhile is an error then, not a signal that ends the
process. What the system refuses keeps its `errno`, so that "not now" is never taken for "damaged".
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any, Final

import numpy as np

from hf_flash.base.arrays import Bytes
from hf_flash.errors import (
    DiskSpaceError,
    HfFlashError,
    RepackError,
    StoreError,
    StoreFormatError,
    StoreMissingError,
    StoreReadError,
)

TEXT_BYTES: Final = 32 << 20  # of a header, an index or a config: 200 000 tensors. safetensors itself allows 100 MB
DIGITS: Final = 18  # of a number in metadata: below 2^63
_HINTS: Final = {
    errno.EACCES: "check who may read it",
    errno.EPERM: "check who may read it",
    errno.EMFILE: "raise the limit on open files: ulimit -n",
    errno.ENFILE: "the system has too many files open: try again",
    errno.EIO: "the disk did not deliver: look at the system's log",
}
_KINDS: Final = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


class StoredFile:
    """An open regular file. Closed with its last reference, or by `close`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with reading(path):
            _regular(path, os.stat(path))  # before it is opened: opening a device can have effects
            flags = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_CLOEXEC", "O_NONBLOCK", "O_BINARY"))
            self._fd = os.open(path, flags)
            self.close = weakref.finalize(self, os.close, self._fd)
            state = os.fstat(self._fd)
            _regular(path, state)
        self.nbytes = state.st_size

    def __enter__(self) -> StoredFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def read_into(self, out: Bytes, offset: int) -> None:
        """Fill `out`, uint8 [n], from byte `offset` on.

        Raises:
            StoreReadError: the disk does not deliver, or the file ends before that.
        """
        view, at = out.data, 0
        with reading(self.path):
            while at < len(view):
                count = _pread(self._fd, view[at:], offset + at)
                if not count:
                    raise StoreReadError(
                        "the file ends too early: it was cut short while it was read",
                        where=self.path,
                        expected=f"{len(view)} bytes at {offset}",
                        got=at,
                        hint="load the model again when nobody writes it any more",
                    )
                at += count

    def read(self, nbytes: int, offset: int) -> bytes:
        """So many bytes from `offset` on."""
        out = np.empty(nbytes, np.uint8)
        self.read_into(out, offset)
        return out.tobytes()

    def blocks(self, offset: int, size: int = 1 << 22) -> Iterator[Bytes]:
        """Everything from `offset` on, in one buffer that is used again and again."""
        buffer = np.empty(min(size, max(1, self.nbytes - offset)), np.uint8)
        for at in range(offset, self.nbytes, size):
            block = buffer[: min(size, self.nbytes - at)]
            self.read_into(block, at)
            yield block


def _pread(fd: int, out: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(fd, [out], offset)
    os.lseek(fd, offset, os.SEEK_SET)
    data = os.read(fd, min(len(out), 1 << 20))
    out[: len(data)] = data
    return len(data)


def _regular(path: Path, state: os.stat_result) -> None:
    if not stat.S_ISREG(state.st_mode):
        kind = next((name for test, name in _KINDS if test(state.st_mode)), "something else")
        raise StoreFormatError("not a regular file", where=path, got=kind, hint="download or repack the model again")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns the operating system's errors about `path` into ours. They keep their `errno`."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> StoreError:
    """Our error for one of the operating system's: not there, or not to be had just now."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        hint = "download or repack the model again"
        ours: StoreError = StoreMissingError("a file of the checkpoint is not there", where=path, hint=hint)
    else:
        ours = StoreReadError(
            "a file cannot be read now",
            where=path,
            got=f"{error.strerror or error} ({errno.errorcode.get(error.errno or 0, 'no errno')})",
            hint=_HINTS.get(error.errno or 0),
        )
    ours.errno = error.errno
    return ours


def absolute(path: str | os.PathLike[str]) -> Path:
    """A path that means the same file after `chdir`. Links and `..` stay as they are."""
    path = Path(path)
    with reading(path):
        return path.absolute()


def exists(path: Path) -> bool:
    """Whether there is something. An error if that cannot be known, where `Path.exists` may say no."""
    with reading(path):
        try:
            os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True


def listing(folder: Path) -> list[Path]:
    """What is in a folder, sorted. An error if that cannot be known, where `Path.glob` finds nothing."""
    with reading(folder):
        return sorted(folder / name for name in os.listdir(folder))


# --- text ----------------------------------------------------------------------------------------------------------------


def number(text: object) -> int | None:
    """A number as metadata has it: at most `DIGITS` ASCII digits. `None` for everything else."""
    whole = isinstance(text, str) and re.fullmatch(rf"[0-9]{{1,{DIGITS}}}", text) is not None
    return int(str(text)) if whole else None


def parse_json(text: bytes | str, where: object, **hooks: Any) -> Any:
    """JSON in UTF-8, whoever wrote it.

    Raises:
        StoreFormatError: it is something else, or nested too deeply.
    """
    try:
        return json.loads(text.decode("utf-8") if isinstance(text, bytes) else text, **hooks)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise StoreFormatError(
            "not a JSON file", where=where, got=str(error)[:200], hint="the file is damaged: download or repack it again"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    with StoredFile(path) as file:
        if file.nbytes > TEXT_BYTES:
            raise StoreFormatError(
                "too large for a JSON file", where=path, expected=f"up to {TEXT_BYTES} bytes", got=file.nbytes
            )
        value = parse_json(file.read(file.nbytes, 0), path)
    if not isinstance(value, dict):
        raise StoreFormatError("not a JSON object", where=path, got=type(value).__name__)
    return value


# --- names ---------------------------------------------------------------------------------------------------------------

_links: set[tuple[str, str]] = set()  # of this process: the folder of a link, and where it leads


def link(target: Path, name: Path) -> None:
    """Make a link out of a folder, which then counts as inside: for what is uploaded."""
    real = os.path.realpath(target)
    name.symlink_to(real)
    _links.add((os.path.realpath(name.parent), real))


def check_inside(folder: Path, paths: Iterable[Path]) -> None:
    """Refuse files that lie outside a folder, by links or otherwise. The Hub cache's own links count as inside.

    Raises:
        StoreFormatError: with the file and where it leads.
    """
    home = os.path.realpath(folder)
    for path in paths:
        real = os.path.realpath(path)
        if _within(real, home) or _within(real, _blobs(home)) or (os.path.realpath(path.parent), real) in _links:
            continue
        raise StoreFormatError(
            "a file of the checkpoint lies outside its folder",
            where=path,
            expected=f"a file in {folder}",
            got=real,
            hint="copy it there, if you trust who made the folder",
        )


def _within(path: str, folder: str | None) -> bool:
    return folder is not None and path.startswith(os.path.join(folder, ""))


def _blobs(folder: str) -> str | None:
    """Where the files of a snapshot in the Hub's cache really lie: `snapshots/COMMIT/NAME` is a link to `blobs/HASH`."""
    for part in (Path(folder), *Path(folder).parents):
        repo = part.parent.parent
        if part.parent.name == "snapshots" and repo.name.startswith("models--"):
            blobs = os.path.realpath(repo / "blobs")
            return blobs if _within(blobs, str(repo)) else None
    return None


def plain_name(name: object) -> bool:
    """Whether a name that an index gives can only mean something inside the folder of the index, on every system."""
    if not isinstance(name, str) or not name or "\0" in name or "\\" in name:
        return False
    try:
        name.encode()
    except UnicodeEncodeError:  # half a surrogate pair
        return False
    windows = PureWindowsPath(name)
    return not (PurePosixPath(name).is_absolute() or windows.drive or windows.root or ".." in PurePosixPath(name).parts)


def listed_files(index: Path) -> list[Path]:
    """The files that a checkpoint's index lists, whether they exist or not: inside its folder, of the index's kind.

    Raises:
        StoreFormatError: it lists anything else.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise StoreFormatError("not a checkpoint index", where=index, expected="a weight_map from tensors to file names")
    names = sorted(set(weight_map.values()))
    safe = index.name.startswith("model.safetensors.index")
    wrong = [name for name in names if not plain_name(name) or (safe and not name.endswith(".safetensors"))]
    if wrong:
        raise StoreFormatError(
            "the index lists files that do not belong to it",
            where=index,
            expected="names of safetensors files in its folder" if safe else "names of files in its folder",
            got=", ".join(map(ascii, wrong[:5])),
            hint="do not load it, unless you know who made it",
        )
    check_inside(index.parent, paths := [index.parent / name for name in names])
    return paths


_NO_SYNC: Final = {getattr(errno, name) for name in ("EINVAL", "ENOSYS", "ENOTSUP", "EOPNOTSUPP", "EROFS")}


def new_file(path: Path) -> IO[bytes]:
    """A file to write, a new one: what has the name goes, so that nothing is written through a link or into a FIFO."""
    with suppress(FileNotFoundError):
        os.unlink(path)
    return open(path, "xb")


def to_disk(file: IO[bytes]) -> None:
    """Make what was written survive a power cut, where the file system can: some refuse to be asked."""
    file.flush()
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


class writing:
    """Turns the operating system's errors while writing `path` into ours, and removes what was half written."""

    def __init__(self, path: Path, needed: int = 0) -> None:
        self.path, self.needed = path, needed

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            return
        with suppress(OSError):  # the error at hand is the one to report
            self.path.with_name(self.path.name + ".tmp").unlink(missing_ok=True)
        if not isinstance(error, OSError) or isinstance(error, HfFlashError):
            return
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            ours: RepackError = DiskSpaceError(
                "the disk is full",
                where=self.path,
                expected=f"room for {self.needed} bytes",
                hint="free some space and run it again: finished layers are kept",
            )
        else:
            ours = RepackError(
                "cannot write",
                where=self.path,
                got=error.strerror or str(error),
                hint="check that the folder exists and that you may write there",
            )
        ours.errno = error.errno
        raise ours from error


def write_text(path: Path, text: str) -> None:
    """Write a text file so that it appears complete or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        with new_file(temporary) as file:
            file.write(text.encode("utf-8"))
            to_disk(file)
        os.replace(temporary, path)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object so that it appears complete or not at all."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")
