"""Dying at the k-th event of writing: a write, a rename, an fsync, a file removed, a message sent.

What writes is wrapped in the process itself, which then kills itself. A write that dies has left half of its bytes in the file.
"""

from __future__ import annotations

import builtins
import io
import itertools
import os
import shutil
import signal
import socket
from collections.abc import Callable
from typing import Any, Final

# what changes a disk or is sent, each call an event; writes are `_Watched`
_EVENTS: Final[list[tuple[Any, str]]] = [
    *((os, name) for name in ("replace", "rename", "fsync", "unlink", "remove", "rmdir", "mkdir", "symlink", "link")),
    *((os, name) for name in ("truncate", "ftruncate")),
    (shutil, "copyfile"),
    *((socket.socket, name) for name in ("send", "sendall")),
]


class Events:
    """Counts events, and dies before the one of number `last`, counted from 1; `None`: never."""

    def __init__(self, last: int | None = None) -> None:
        self.last, self.count = last, 0

    def watch(self) -> Events:
        """From now on."""
        for owner, name in _EVENTS:
            setattr(owner, name, self._wrapped(name, getattr(owner, name)))
        plain = builtins.open
        builtins.open = io.open = self._opening(plain)  # type: ignore[assignment]
        return self

    def happen(self, half: Callable[[], Any] = lambda: None) -> None:
        """An event is about to be; `half` does a part of it."""
        self.count += 1
        if self.count == self.last:
            half()
            os.kill(os.getpid(), signal.SIGKILL)

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def event(*args: Any, **kwargs: Any) -> Any:
            self.happen((lambda: _copy_half(*args)) if name == "copyfile" else lambda: None)
            return real(*args, **kwargs)

        return event

    def _opening(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if not set(mode) & set("wxa+"):
                return plain(file, mode, *args, **kwargs)
            self.happen()
            return _Watched(plain(file, mode, *args, **kwargs), self)

        return opened


def _copy_half(source: Any, target: Any) -> None:
    with open(source, "rb") as read:
        data = read.read()
    fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.write(fd, data[: len(data) // 2])


class _Watched:
    """A file open for writing, each of whose writes is an event."""

    def __init__(self, file: Any, events: Events) -> None:
        self._file, self._events = file, events

    def write(self, data: Any) -> Any:
        self._events.happen(lambda: (self._file.write(data[: len(data) // 2]), self._file.flush()))
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Watched:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __iter__(self) -> Any:
        return iter(self._file)


def evenly(total: int, wanted: int) -> list[int]:
    """At most `wanted` of the numbers 1 to `total`, spread evenly."""
    if wanted >= total:
        return list(range(1, total + 1))
    return sorted({1 + at * (total - 1) // max(1, wanted - 1) for at in itertools.islice(itertools.count(), wanted)})
