"""Whether some process has files open: a shared lock on each, that lasts as long as the file is open or mapped.

Where the system has no such locks nothing is known, and nothing is held.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

if sys.platform != "win32":  # which does not let go of open files anyway
    import fcntl


def hold(fd: int) -> None:
    """Let others see that this file is in use. Several may hold it."""
    if sys.platform == "win32":
        return
    for _ in range(100):
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return
        except BlockingIOError:  # somebody is just looking
            time.sleep(0.001)
        except OSError:  # a file system without locks
            return


def lockable(path: Path) -> bool:
    """Whether the file system has locks. Some have none, such as Lustre mounted without `flock`."""
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
def holding(folder: Path) -> Iterator[None]:
    """Hold a folder while the block runs, where folders can be opened."""
    if sys.platform == "win32":
        yield
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        hold(fd)
        yield
    finally:
        os.close(fd)


def held(paths: Iterable[Path]) -> bool:
    """Whether anybody holds one of these files or folders."""
    return any(map(_held, paths))


def _held(path: Path) -> bool:
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
