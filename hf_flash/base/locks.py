"""Shared locks that tell whether some process uses a file. A lock lasts as long as the file is open or mapped.

Where the system has no such locks, none is taken and no file counts as in use.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

if sys.platform != "win32":  # Windows does not remove open files anyway
    import fcntl


def hold(fd: int) -> None:
    """Take a shared lock on an open file, so that others see that it is in use. Several processes may hold it."""
    if sys.platform == "win32":
        return
    for _ in range(100):
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return
        except BlockingIOError:  # somebody is testing it in `is_held`
            time.sleep(0.001)
        except OSError:  # a file system without locks
            return


def has_locks(path: Path) -> bool:
    """Tell whether the file system of an existing file has locks. Some have none, such as Lustre mounted without `flock`."""
    if sys.platform == "win32":
        return True
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Hold a shared lock on a folder while the block runs, where the system can open folders."""
    if sys.platform == "win32":
        yield
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        hold(fd)
        yield
    finally:
        os.close(fd)


def is_held(paths: Iterable[Path]) -> bool:
    """Tell whether anybody holds one of these files or folders."""
    return any(map(_is_held, paths))


def _is_held(path: Path) -> bool:
    if sys.platform == "win32":
        return False
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # cannot be known
        return False
    finally:
        os.close(fd)
    return False
