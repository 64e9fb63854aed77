"""Ctrl-C while a command runs: `KeyboardInterrupt`, but never within an import.

A library that is interrupted while it is imported swallows the interrupt, where it tries what may be missing, or stays half
imported, and what is raised then is an `ImportError`. So an interrupt during an import waits until the import is over. A second
one meanwhile ends the process at once, as a signal that cannot be caught would.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final, NoReturn

INTERRUPTED: Final = 130  # the exit code
_AGAIN_S: Final = 0.05
_IMPORTING: Final = "<frozen importlib._bootstrap>"


@contextmanager
def interrupted_outside_imports(caller: str) -> Iterator[None]:
    """Within the block Ctrl-C waits for imports. Changes nothing where somebody else handles it, or outside the main thread.

    Args:
        caller: `__name__` of the module with the block. What it is imported by itself does not count.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _Handler(caller))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class _Handler:
    """Of SIGINT; argument as in [`interrupted_outside_imports`]."""

    def __init__(self, caller: str) -> None:
        self._caller, self._main = caller, threading.get_ident()
        self._waits = self._is_again = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        again, self._is_again = self._is_again, False
        if not self._in_import(frame):
            self._waits = False
            raise KeyboardInterrupt
        if self._waits and not again:
            end_at_once()
        self._waits = True
        timer = threading.Timer(_AGAIN_S, self._interrupt_again)
        timer.daemon = True
        timer.start()

    def _in_import(self, frame: FrameType | None) -> bool:
        while frame is not None and frame.f_globals.get("__name__") != self._caller:
            if frame.f_code.co_filename == _IMPORTING:
                return True
            frame = frame.f_back
        return False

    def _interrupt_again(self) -> None:
        self._is_again = True
        signal.pthread_kill(self._main, signal.SIGINT)  # a real one, which ends what the main thread waits for


def end_at_once(*_: object) -> NoReturn:
    """End the process as an interrupt does, whatever it is at. A handler of SIGINT, too."""
    os.write(2, b"hf-flash: interrupted; run it again to go on\n")
    os._exit(INTERRUPTED)
