"""Reading files that somebody else may have made (contract C11), and writing our own whole or not at all.

Only regular files are opened, and opening one never waits: a FIFO or a device in place of a shard is an immediate error.
Bytes are read with `pread`, not through a memory map, so a file that is cut short while it is read raises an error instead of
a signal that ends the process. Operating system errors keep their `errno`, so that nobody mistakes "not now" for "damaged".

Importing this module imports neither numpy nor torch.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, TYPE_CHECKING, Any, Final

from hf_flash.errors import (
    DiskSpaceError,
    HfFlashError,
    RepackError,
    StoreError,
    StoreFormatError,
    StoreMissingError,
    StoreReadError,
)

if TYPE_CHECKING:
    from hf_flash.base.arrays import Bytes

TEXT_BYTES: Final = 32 << 20  # limit for a header, an index or a config: 200 000 tensors. safetensors itself allows 100 MB
DIGITS: Final = 18  # limit for a number in metadata, so that it is below 2^63
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
    """An open regular file. It is closed by `close`, or when its last reference is gone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with reading(path):
            _check_regular(path, os.stat(path))  # before opening it: opening a device can have side effects
            flags = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_CLOEXEC", "O_NONBLOCK", "O_BINARY"))
            self._fd = os.open(path, flags)
            self.close = weakref.finalize(self, os.close, self._fd)
            state = os.fstat(self._fd)
            _check_regular(path, state)
        self.nbytes = state.st_size

    def __enter__(self) -> StoredFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def read_into(self, out: Bytes, offset: int) -> None:
        """Fill `out`, uint8 [n], with the bytes from `offset` on.

        Raises:
            StoreReadError: the disk does not deliver the bytes, or the file ends before `out` is full.
        """
        self._fill(out.data, offset)

    def _fill(self, view: memoryview, offset: int) -> None:
        at = 0
        with reading(self.path):
            while at < len(view):
                count = read_at(self._fd, [view[at:]], offset + at)
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
        """Read `nbytes` bytes from `offset` on."""
        out = bytearray(nbytes)
        self._fill(memoryview(out), offset)
        return bytes(out)

    def blocks(self, offset: int, size: int = 1 << 22) -> Iterator[Bytes]:
        """Yield the file from `offset` on in blocks, uint8 [up to `size`]. Each block overwrites the previous one."""
        import numpy as np

        buffer = np.empty(min(size, max(1, self.nbytes - offset)), np.uint8)
        for at in range(offset, self.nbytes, size):
            block = buffer[: min(size, self.nbytes - at)]
            self.read_into(block, at)
            yield block


def read_at(fd: int, views: Sequence[memoryview], offset: int) -> int:
    """Read once from byte `offset` of an open file into `views`, one after the other.

    A system without `preadv` fills the first view only, at most 1 MiB of it, and moves the file's position. Threads must not
    share a descriptor there.

    Args:
        fd: a descriptor that is open for reading.
        views: writable views of bytes.
        offset: in bytes.

    Returns:
        How many bytes were read: 0 at the end of the file; elsewhere possibly fewer than `views` can hold.

    Raises:
        OSError: as from `preadv`.
    """
    if hasattr(os, "preadv"):
        return os.preadv(fd, views, offset)
    os.lseek(fd, offset, os.SEEK_SET)
    data = os.read(fd, min(len(views[0]), 1 << 20))
    views[0][: len(data)] = data
    return len(data)


def _check_regular(path: Path, state: os.stat_result) -> None:
    if not stat.S_ISREG(state.st_mode):
        kind = next((name for test, name in _KINDS if test(state.st_mode)), "something else")
        raise StoreFormatError("not a regular file", where=path, got=kind, hint="download or repack the model again")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn the operating system's errors about `path` into ours while the block runs. They keep their `errno`."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        raise read_error(path, error) from error


def read_error(path: Path, error: OSError) -> StoreError:
    """Convert an operating system error into ours: the file is missing, or it cannot be read at the moment."""
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
    """Return a path that names the same file after `chdir`. Links and `..` stay as they are."""
    path = Path(path)
    with reading(path):
        return path.absolute()


def exists(path: Path) -> bool:
    """Tell whether `path` exists. If that cannot be determined, this raises; `Path.exists` may answer no."""
    with reading(path):
        try:
            os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True


def nearest(path: Path, is_wanted: Callable[[Path], bool]) -> str | None:
    """What to do about a path that is not there: the one beside it with the most similar name; `None` if none is similar.

    Args:
        is_wanted: whether a path beside it may be meant.
    """
    try:
        names = [other.name for other in path.expanduser().parent.iterdir() if is_wanted(other)]
    except OSError:
        return None
    near = get_close_matches(path.name, names, 1)
    return f"did you mean {path.parent / near[0]}?" if near else None


def list_folder(folder: Path) -> list[Path]:
    """List the entries of a folder, sorted. If it cannot be listed, this raises; `Path.glob` would find nothing."""
    with reading(folder):
        return sorted(folder / name for name in os.listdir(folder))


# --- text ----------------------------------------------------------------------------------------------------------------


def parse_number(text: object) -> int | None:
    """Parse a number in metadata: at most `DIGITS` ASCII digits. Returns `None` for everything else."""
    whole = isinstance(text, str) and re.fullmatch(rf"[0-9]{{1,{DIGITS}}}", text) is not None
    return int(str(text)) if whole else None


def parse_json(text: bytes | str, where: object, **hooks: Any) -> Any:
    """Parse untrusted JSON in UTF-8. `hooks` go to `json.loads`.

    Raises:
        StoreFormatError: the text is not JSON, or is nested too deeply.
    """
    try:
        return json.loads(text.decode("utf-8") if isinstance(text, bytes) else text, **hooks)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise StoreFormatError(
            "not a JSON file", where=where, got=str(error)[:200], hint="the file is damaged: download or repack it again"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file of at most `TEXT_BYTES`."""
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

_links: set[tuple[str, str]] = set()  # made by this process: the folder of each link, and where it leads


def link_inside(target: Path, name: Path) -> None:
    """Make a link that leads out of its folder but that [`check_inside`] accepts: uploads consist of such links."""
    real = os.path.realpath(target)
    name.symlink_to(real)
    _links.add((os.path.realpath(name.parent), real))


def check_inside(folder: Path, paths: Iterable[Path]) -> None:
    """Refuse files that lie outside a folder, by links or otherwise. The Hub cache's own links count as inside.

    Raises:
        StoreFormatError: a file lies outside; the message names it and the path that it leads to.
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
    """Return the folder with the real files of a snapshot in the Hub's cache: `snapshots/COMMIT/NAME` links to `blobs/HASH`."""
    for part in (Path(folder), *Path(folder).parents):
        repo = part.parent.parent
        if part.parent.name == "snapshots" and repo.name.startswith("models--"):
            blobs = os.path.realpath(repo / "blobs")
            return blobs if _within(blobs, str(repo)) else None
    return None


def is_plain_name(name: object) -> bool:
    """Tell whether a name in an index can only refer to a file inside the index's folder, on every system."""
    if not isinstance(name, str) or not name or "\0" in name or "\\" in name:
        return False
    try:
        name.encode()
    except UnicodeEncodeError:  # half a surrogate pair
        return False
    windows = PureWindowsPath(name)
    return not (PurePosixPath(name).is_absolute() or windows.drive or windows.root or ".." in PurePosixPath(name).parts)


def listed_files(index: Path) -> list[Path]:
    """Return the files that a checkpoint's index lists, whether or not they exist.

    Raises:
        StoreFormatError: not an index, or one that lists files outside its folder or of another kind than it is for.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise StoreFormatError("not a checkpoint index", where=index, expected="a weight_map from tensors to file names")
    names = sorted(set(weight_map.values()))
    safe = index.name.startswith("model.safetensors.index")
    wrong = [name for name in names if not is_plain_name(name) or (safe and not name.endswith(".safetensors"))]
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


# --- writing -------------------------------------------------------------------------------------------------------------

_NO_SYNC: Final = {getattr(errno, name) for name in ("EINVAL", "ENOSYS", "ENOTSUP", "EOPNOTSUPP", "EROFS")}


def new_file(path: Path) -> IO[bytes]:
    """Create a file for writing. An existing entry of that name is removed, so that we never write through a link or a FIFO."""
    with suppress(FileNotFoundError):
        os.unlink(path)
    return open(path, "xb")


def sync_to_disk(file: IO[bytes]) -> None:
    """Make what was written survive a power cut. Some file systems refuse `fsync`; that is not an error."""
    file.flush()
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


class writing:
    """Turn the operating system's errors into ours while `path` is written, and remove the file if it is half written.

    Args:
        path: the file. While it is half written, its name ends in `.tmp`.
        needed: bytes to be written, for the error about a full disk.
    """

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
            sync_to_disk(file)
        os.replace(temporary, path)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object so that it appears complete or not at all."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")
