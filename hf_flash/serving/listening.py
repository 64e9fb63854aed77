"""The address of the server, and the HTTP server (uvicorn) on it."""

from __future__ import annotations

import asyncio
import errno
import socket
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Final

import uvicorn

from hf_flash.errors import ConfigError

_GRACE_S: Final = 1  # after Ctrl-C, for the token that answers under way are at


def open_socket(host: str, port: int) -> socket.socket:
    """Take an address before the model is loaded; port 0 takes a free one. Nobody can connect yet.

    Raises:
        ConfigError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    taken = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # named, or asyncio leaves Nagle on: 40 ms an answer
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((host, port))
    except (OSError, OverflowError) as error:
        taken.close()
        is_taken = isinstance(error, OSError) and error.errno in (errno.EADDRINUSE, errno.EACCES)
        hint = "another --port; 0 takes one that is free" if is_taken else "a --host that is an address of this machine"
        raise ConfigError("cannot listen there", where=f"{host}:{port}", got=error, hint=hint) from error
    return taken


class HttpServer(uvicorn.Server):
    """Runs an application. A signal that ends it ends the answers under way, too: nobody waits until they are whole.

    Args:
        app: an ASGI application.
        stop: set on SIGINT and SIGTERM.
        end_answers: called then, on a thread of its own.
        log_level: of uvicorn's own lines.
    """

    def __init__(self, app: Any, stop: threading.Event, end_answers: Callable[[], None], log_level: str) -> None:
        super().__init__(uvicorn.Config(app, log_level=log_level, timeout_graceful_shutdown=_GRACE_S))
        self._stop, self._end_answers = stop, end_answers

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Set `stop`, then shut down."""
        self._stop.set()
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the answers, then the connections."""
        await asyncio.to_thread(self._end_answers)
        await super().shutdown(sockets)
