"""The gate of `hf-flash serve`: what every request is checked for before transformers' server sees it.

    who asks        Host and Origin. A web page must not reach a server on this machine: neither by a plain POST, nor by a name
                    of its own that it lets point here (DNS rebinding)
    how much        the size of the body, the time between its parts, the number of requests at once
    what            JSON with finite numbers, valid text and bounded depth; then the check that the server gives

Every refusal is JSON in OpenAI's form, with a reason. When a client goes away, the event [`gone`] of its request is set.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import math
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, Final
from urllib.parse import urlsplit

from hf_flash.errors import HfFlashError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
Check = Callable[[str, dict[str, Any]], Awaitable[dict[str, Any]]]

MOST_REQUESTS: Final = 128  # with a body, at once
MOST_DEPTH: Final = 64  # of nested JSON
_PATIENCE_S: Final = 30  # for the next part of a body
_SAFE: Final = ("GET", "HEAD", "OPTIONS")
_LOCAL: Final = ("localhost", "ip6-localhost")
_PORTS: Final = {"http": 80, "https": 443}

gone: ContextVar[asyncio.Event | None] = ContextVar("gone", default=None)
"""Of the request under way: set when its client is no longer there. Other threads may ask whether it is set."""


class Refused(Exception):
    """A request that goes no further."""

    def __init__(self, status: int, reason: object) -> None:
        super().__init__(str(reason))
        self.status = status


def failure(status: int, reason: object) -> dict[str, Any]:
    """Make the body of a refusal in OpenAI's form, as their clients show it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": str(reason), "type": kind, "param": None, "code": None}}


class Guard:
    """An ASGI application around another.

    Args:
        app: what answers.
        check: gets the path and the JSON object of a request; returns what goes on, or raises `HfFlashError` or `Refused`.
        routes: the paths with a JSON object as their body. Others get no body.
        reset: the path that unloads the model. It is refused while others are served.
        host: the name or address that the server listens on.
        local: whether only this machine can reach it.
        most_bytes: of a body.
        open_to_pages: whether web pages from anywhere may call.
    """

    def __init__(
        self,
        app: App,
        check: Check,
        *,
        routes: tuple[str, ...],
        reset: str,
        host: str,
        local: bool,
        most_bytes: int,
        open_to_pages: bool,
    ) -> None:
        self._app, self._check, self._routes, self._reset = app, check, routes, reset
        self._host, self._local, self._most_bytes, self._open = host.lower(), local, most_bytes, open_to_pages
        self._busy, self._resetting = 0, False

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Refuse, or hand on."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        try:
            self._check_caller(scope)
            if scope["method"] in _SAFE:
                return await self._app(scope, receive, send)
            if self._resetting or self._busy >= MOST_REQUESTS:
                raise Refused(503, "too many requests at once, or the model is being unloaded: try again")
            if scope["path"] == self._reset and self._busy:
                raise Refused(409, "requests are under way: the model is unloaded when there are none")
            with self._counted(scope, send) as counted:
                await self._serve(scope, receive, counted)
        except Refused as refused:
            await self._answer(send, refused)

    @contextmanager
    def _counted(self, scope: Message, send: Send) -> Iterator[Send]:
        """Count a request until the last part of its answer is sent: what its client asks next must not find it under way."""
        over, self._resetting = False, scope["path"] == self._reset
        self._busy += 1

        def end() -> None:
            nonlocal over
            if not over:
                over, self._resetting = True, False
                self._busy -= 1

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body"):
                end()
            await send(message)

        try:
            yield counted
        finally:
            end()

    async def _serve(self, scope: Message, receive: Receive, send: Send) -> None:
        body = await self._body(scope, receive)
        if scope["method"] == "POST" and scope["path"] in self._routes:
            kind = _header(scope, "content-type").partition(";")[0].strip().lower()
            if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
                raise Refused(415, f"the body must be JSON, with Content-Type: application/json, not {kind or 'none'!r}")
            try:
                checked = await self._check(scope["path"], parsed(body))
            except HfFlashError as error:
                raise Refused(400 if isinstance(error, ValueError) else 503, error) from error
            body = json.dumps(checked).encode()
            scope = dict(scope) | {"headers": [(b"content-length", str(len(body)).encode())] + [
                row for row in scope["headers"] if row[0] not in (b"content-length", b"transfer-encoding")
            ]}  # fmt: skip
        await _watched(self._app, scope, body, receive, send)

    def _check_caller(self, scope: Message) -> None:
        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        if len(hosts) > 1:
            raise Refused(400, "more than one Host")
        name = _name(f"//{hosts[0]}") if hosts else ""
        if hosts and self._local and name != self._host and not is_local(name):
            raise Refused(403, f"this server is {self._host!r}, not {hosts[0]!r}: it listens for this machine alone")
        if self._open:
            return
        origin, site = _header(scope, "origin"), _header(scope, "sec-fetch-site")
        if origin and not (hosts and _same(origin, hosts[0])):
            raise Refused(403, f"web pages of {origin!r} may not call this server: start it with --enable-cors to let them")
        if site not in ("", "none", "same-origin") and scope["method"] not in _SAFE:
            raise Refused(403, "web pages of other sites may not call this server: start it with --enable-cors to let them")

    async def _body(self, scope: Message, receive: Receive) -> bytes:
        most = self._most_bytes
        too_long = Refused(413, f"the body is too long: {most} bytes at most, more than the model's context can hold")
        length = _header(scope, "content-length")
        if length.isdecimal() and int(length[:20]) > most:
            raise too_long
        body = bytearray()
        while True:
            try:
                part = await asyncio.wait_for(receive(), _PATIENCE_S)
            except TimeoutError:
                raise Refused(408, f"no more of the body came for {_PATIENCE_S} s") from None
            body += part.get("body", b"")
            if len(body) > most:
                raise too_long
            if not part.get("more_body"):
                return bytes(body)

    async def _answer(self, send: Send, refused: Refused) -> None:
        body = json.dumps(failure(refused.status, refused)).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        headers += [(b"connection", b"close")] if refused.status in (408, 413) else []  # the rest of the body is not read
        headers += [(b"access-control-allow-origin", b"*")] if self._open else []
        await send({"type": "http.response.start", "status": refused.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


async def _watched(app: App, scope: Message, body: bytes, receive: Receive, send: Send) -> None:
    """Let `app` answer a request whose body is here, and set `gone` when the client goes away meanwhile."""
    left, read = asyncio.Event(), False

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        left.set()

    async def replay() -> Message:
        nonlocal read
        if not read:
            read = True
            return {"type": "http.request", "body": body, "more_body": False}
        await left.wait()
        return {"type": "http.disconnect"}

    watching, token = asyncio.create_task(watch()), gone.set(left)
    try:
        await app(scope, replay, send)
    finally:
        gone.reset(token)
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching


def parsed(body: bytes) -> dict[str, Any]:
    """Parse the JSON object in a body; leave out nulls on its top level.

    Raises:
        Refused: it is none, is nested too deeply, or has numbers or text that are none.
    """
    try:
        found = json.loads(body.decode("utf-8"), parse_constant=_no_number)
        for value in _values(found, MOST_DEPTH):
            if isinstance(value, str):
                value.encode("utf-8")
            elif isinstance(value, float) and not math.isfinite(value):
                _no_number("a number beyond all bounds")
    except UnicodeEncodeError:
        raise Refused(400, "the body has text that is no Unicode: half of a surrogate pair") from None
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is no valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise Refused(400, f"the body must be a JSON object, not {type(found).__name__}")
    return {name: value for name, value in found.items() if value is not None or name == "stream"}


def _values(value: Any, depth: int) -> Iterator[Any]:
    if depth < 0:
        raise ValueError(f"it is nested more than {MOST_DEPTH} deep")
    yield value
    if isinstance(value, dict):
        yield from value
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _values(item, depth - 1)


def texts(value: Any) -> list[str]:
    """Return all text in a JSON value, names of fields included."""
    return [item for item in _values(value, MOST_DEPTH) if isinstance(item, str)]


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is not a number of JSON")


def _header(scope: Message, wanted: str) -> str:
    return next((value.decode("latin-1") for name, value in scope["headers"] if name == wanted.encode()), "")


def _name(url: str) -> str:
    try:
        return (urlsplit(url).hostname or "").rstrip(".")
    except ValueError:
        return ""


def is_local(name: str) -> bool:
    """Tell whether a host names this machine alone."""
    try:
        return name.lower() in _LOCAL or name.lower().endswith(".localhost") or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _same(origin: str, host: str) -> bool:
    """Tell whether a page of `origin` came from the server that it calls `host`."""
    try:
        page, called = urlsplit(origin), urlsplit(f"{urlsplit(origin).scheme}://{host}")
        ports = [part.port or _PORTS.get(part.scheme) for part in (page, called)]
    except ValueError:
        return False
    return page.scheme in _PORTS and page.hostname == called.hostname and ports[0] == ports[1]
