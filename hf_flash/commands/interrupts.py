"""Ctrl-C while a command runs: `KeyboardInterrupt`, but never within an import.

A library that is interrupted while it is imported swallows the interrupt, where it tries what may be missing, or stays half
imported, and what is raised then is an `ImportError`. So an interrupt during an import waits until the import is over.
"""

from __future__ import annotations

import _thread
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

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

    def interrupt(number: int, frame: FrameType | None) -> None:
        while frame is not None and frame.f_globals.get("__name__") != caller:
            if frame.f_code.co_filename == _IMPORTING:
                again = threading.Timer(_AGAIN_S, _thread.interrupt_main)
                again.daemon = True
                again.start()
                return
            frame = frame.f_back
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
