"""The address of the server, and the HTTP server (uvicorn) on it."""

from __future__ import annotations

import socket
import threading
from types import FrameType
from typing import Any, Final

import uvicorn

from hf_flash.errors import ConfigError

_GRACE_S: Final = 10  # after Ctrl-C, for the token that answers under way are at


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
        raise ConfigError("cannot listen there", where=f"{host}:{port}", got=error, hint="another --port") from error
    return taken


class HttpServer(uvicorn.Server):
    """Runs an application, and sets `stop` at once when a signal ends it: answers under way must not wait for their end.

    Args:
        app: an ASGI application.
        stop: set on SIGINT and SIGTERM.
        log_level: of uvicorn's own lines.
    """

    def __init__(self, app: Any, stop: threading.Event, log_level: str) -> None:
        super().__init__(uvicorn.Config(app, log_level=log_level, timeout_graceful_shutdown=_GRACE_S))
        self._stop = stop

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Set `stop`, then shut down."""
        self._stop.set()
        super().handle_exit(sig, frame)
