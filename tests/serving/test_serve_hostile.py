"""`hf-flash serve` under attack, over real sockets: fields, bodies, web pages, clients that leave."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests

from hf_flash import ConfigError
from hf_flash.serving import fields, guard
from hf_flash.serving.server import Server
from tests.conftest import TINY_OPT, torch_threads
from tests.serving.test_serve import client, needs_batching, serving

PROMPT = "In the beginning"
CHAT = [{"role": "user", "content": "x"}]
QUESTION = {"q": {"type": "yes_no", "question": "is it?"}}
GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": CHAT, "max_tokens": 1},
    "/v1/completions": {"prompt": PROMPT, "max_tokens": 1},
    "/v1/responses": {"input": "x", "max_output_tokens": 1, "stream": False},
    "/v1/systemone": {"state": "x", "questions": QUESTION},
    "/load_model": {"model": str(TINY_OPT)},
}
DEEP = "[" * 40 + "]" * 40
BROKEN = [
    "1e400", "-1e400", "NaN", "Infinity", "9" * 5000, '"\\ud800"', '["\\ud800"]', '{"\\udfff": 1}', '{"a": NaN}', '[[1e999]]',
    "[" * 5000 + "]" * 5000, "[" * 70 + "]" * 70, "'x'", "", "x",
]  # fmt: skip
"""What is no JSON, or none that this server takes: in whatever field it is."""
WRONG = [
    "null", "[]", "{}", "true", "0", "-1", "1.5", "1e18", "9" * 4000, '""', '"\\u0000"', '"x"', '[null]', '[{}]', '["x"]',
    '{"": {}}', '[{"role": "user", "content": [{"type": "text"}]}]', '[{"role": "user", "content": 7}]',
    '[{"type": "text", "text": []}]', '[{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]',
    '[{"type": "function_call", "call_id": 1}]', '[{"type": "reasoning"}]', '{"tokenize": false, "messages": []}', '{"-1": 1}',
    DEEP,
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with torch_threads(1):
        yield


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(TINY_OPT) as found:
        yield found


@pytest.fixture
def root(server: Server) -> str:
    return server.url.removesuffix("/v1")


@pytest.fixture(scope="module")
def right(server: Server) -> str:
    """What the server says before anybody attacks it."""
    return answer(server)


@pytest.fixture(scope="module", autouse=True)
def _unharmed(server: Server, right: str) -> Iterator[None]:
    """After all attacks the server says what it said before, and holds what it may hold."""
    yield
    assert answer(server) == right
    found = server.stats()
    assert found.dram_bytes <= found.budget_bytes
    assert requests.get(f"{server.url.removesuffix('/v1')}/health", timeout=30).json() == {"status": "ok"}


def answer(server: Server) -> str:
    with client(server.url) as talk:
        found = talk.completions.create(model=str(TINY_OPT), prompt=PROMPT, max_tokens=8, temperature=0)
    return str(found.choices[0].text)


_sessions = threading.local()


def _session() -> requests.Session:
    """A connection for each thread."""
    if not hasattr(_sessions, "one"):
        _sessions.one = requests.Session()
    return _sessions.one  # type: ignore[no-any-return]


def post(root: str, path: str, body: str | bytes, **headers: str) -> requests.Response:
    given = {"Content-Type": "application/json"} | {name.replace("_", "-"): text for name, text in headers.items()}
    return _session().post(root + path, data=body.encode() if isinstance(body, str) else body, headers=given, timeout=60)


def refused(found: requests.Response, *statuses: int) -> str:
    """The reason of a refusal, which is in OpenAI's form."""
    assert 400 <= found.status_code < 500, (found.status_code, found.text)
    assert not statuses or found.status_code in statuses, (found.status_code, found.text)
    error = found.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    return str(error["message"])


@pytest.mark.parametrize("path", GOOD)
def test_every_field_with_every_wrong_value_is_answered_or_refused_with_a_reason(root: str, path: str) -> None:
    needed, also = fields.ROUTES[path]
    for name in (*needed, *also, "no_such_field"):
        for value in [*WRONG, *(BROKEN if name in needed else ())]:
            known = [f"{json.dumps(key)}: {json.dumps(good)}" for key, good in GOOD[path].items() if key != name]
            found = post(root, path, "{" + ", ".join([*known, f"{json.dumps(name)}: {value}"]) + "}")
            if found.status_code != 200 or value in BROKEN:
                refused(found)
            elif "text/event-stream" in found.headers["Content-Type"]:
                assert '"error"' not in found.text, (name, value, found.text)


@pytest.mark.parametrize(("path", "body"), [
    (path, GOOD[path] | {name: value})
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses")
    for name, value in [
        ("max_output_tokens" if path == "/v1/responses" else "max_tokens", 0),
        ("max_output_tokens" if path == "/v1/responses" else "max_tokens", -5), ("temperature", -1), ("temperature", "hot"),
        ("top_p", 2), ("seed", 1 << 70), ("stream", "yes"), ("model", []), ("generation_config", "{"),
        ("generation_config", "[]"),
        ("generation_config", '{"max_new_tokens": 0}'), ("generation_config", '{"num_beams": 1000}'),
        ("generation_config", '{"num_return_sequences": 3}'), ("generation_config", '{"cache_implementation": "static"}'),
        ("generation_config", '{"return_dict_in_generate": true}'), ("generation_config", '{"eos_token_id": 99999999}'),
        ("generation_config", "[" * 3000), ("generation_config", '{"temperature": NaN}'),
    ]
] + [
    ("/v1/completions", GOOD["/v1/completions"] | {name: value}) for name, value in [
        ("stop", ["x"] * 5), ("stop", ""), ("stop", "x" * 257), ("n", 2), ("best_of", 2), ("echo", True), ("logprobs", 5),
        ("frequency_penalty", -1), ("prompt", ["x", "y"]), ("no_such_field", 1),
    ]
] + [
    ("/v1/chat/completions", GOOD["/v1/chat/completions"] | {name: value}) for name, value in [
        ("logprobs", True), ("logit_bias", {"4096": 1}), ("messages", CHAT * (fields.MOST_MESSAGES + 1)), ("messages", []),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        ("chat_template_kwargs", {"chat_template": "{{ 1 }}"}), ("stop", [str(number) for number in range(5000)]),
    ]
] + [
    ("/v1/completions", {"max_tokens": 1}), ("/v1/chat/completions", {"max_tokens": 1}), ("/v1/responses", {"stream": False}),
    ("/v1/responses", {"input": [{"role": "user", "content": "x"}, {"type": "other"}]}),
])  # fmt: skip
def test_what_would_be_answered_wrongly_or_for_ever_is_refused(root: str, path: str, body: dict[str, Any]) -> None:
    refused(post(root, path, json.dumps(body)), 400, 422)


def test_a_huge_count_is_cut_to_the_context_and_nulls_are_no_fields(root: str) -> None:
    body = {"prompt": "and " * 200, "max_tokens": 10**30, "temperature": 0, "stop": None, "stream": None, "model": None}
    usage = post(root, "/v1/completions", json.dumps(body)).json()["usage"]
    assert usage["total_tokens"] <= 256
    body = {"messages": [*CHAT, {"role": "assistant", "content": "y", "tool_calls": None}, *CHAT], "chat_template_kwargs": None}
    assert post(root, "/v1/chat/completions", json.dumps(body | {"max_tokens": 1, "tools": None})).ok


@pytest.mark.parametrize("name", [
    f"{TINY_OPT}:other.gguf", f"{TINY_OPT}/", f"{TINY_OPT}@other", str(TINY_OPT).upper(), f"{TINY_OPT}@main:x.gguf", "gpt2",
    f"{TINY_OPT}/../tiny-opt", f" {TINY_OPT}", "", "\0", "../..", "x" * 10_000,
])  # fmt: skip
def test_no_other_name_loads_a_model(server: Server, root: str, name: str) -> None:
    for path, body in GOOD.items():
        if path != "/v1/systemone" or name:
            refused(post(root, path, json.dumps(body | {"model": name})), 400, 422)
    assert list(server._models.loaded_models) == [server._models.process_model_name(str(TINY_OPT))]


def test_the_model_itself_may_be_asked_for(server: Server, root: str) -> None:
    for name in (str(TINY_OPT), server._models.process_model_name(str(TINY_OPT))):  # from 5.24 on, a folder has no revision
        assert '"ready"' in post(root, "/load_model", json.dumps({"model": name})).text


def test_gguf_weights_are_not_served() -> None:
    with pytest.raises(ConfigError, match="GGUF"):
        Server(f"{TINY_OPT}:x.gguf", port=0)


@pytest.mark.parametrize(("body", "kind", "status"), [
    ("", "application/json", 400), ("{", "application/json", 400), ("[]", "application/json", 400),
    ("7", "application/json", 400), ('{"prompt": "x"}', "text/plain", 415), ('{"prompt": "x"}', "", 415),
    ("prompt=x", "application/x-www-form-urlencoded", 415),
    (b"\xff\xfe{", "application/json", 400), (b'{"prompt": "\xed\xa0\x80"}', "application/json", 400),
    ('{"prompt": "' + "x" * (2 << 20) + '"}', "application/json", 413), (b"\x1f\x8b\x08", "application/json", 400),
    ('{"prompt": ' * 50_000, "application/json", 400), ('{"prompt": "' + "a b " * 50_000 + '"}', "application/json", 400),
])  # fmt: skip
def test_bodies_that_are_none(root: str, body: str | bytes, kind: str, status: int) -> None:
    for path in GOOD:
        if "a b " in str(body)[:40] and path != "/v1/completions":
            continue
        refused(post(root, path, body, Content_Type=kind), status)


def test_other_paths_and_methods_are_refused_in_the_same_form(root: str) -> None:
    assert refused(requests.get(f"{root}/nothing", timeout=30), 404)
    assert refused(requests.get(f"{root}/v1/completions", timeout=30), 405)
    assert refused(requests.put(f"{root}/v1/completions", timeout=30), 405)
    assert "audio" in refused(requests.post(f"{root}/v1/audio/transcriptions", files={"file": b"RIFF"}, timeout=30), 400)
    assert refused(post(root, "/reset", b"x" * (2 << 20)), 413)


def raw(server: Server, request: bytes) -> bytes:
    """The answer to bytes that no client would send."""
    with socket.create_connection(("127.0.0.1", int(server.url.split(":")[2].removesuffix("/v1"))), timeout=30) as line:
        line.sendall(request)
        line.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: line.recv(1 << 16), b""))


def test_a_body_in_chunks_is_bounded_too(server: Server, root: str) -> None:
    piece = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += b"Transfer-Encoding: chunked\r\n\r\n"
    found = raw(server, head + piece * 20 + b"0\r\n\r\n")
    assert found.startswith(b"HTTP/1.1 413"), found[:300]


# --- who asks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("headers", "fine"), [
    ({}, True), ({"Host": "localhost:1"}, True), ({"Host": "127.0.0.1"}, True), ({"Host": "[::1]:9"}, True),
    ({"Host": "LOCALHOST"}, True), ({"Host": "evil.example"}, False), ({"Host": "evil.example:8000"}, False),
    ({"Host": ""}, False),
    ({"Host": "127.0.0.1.evil.example"}, False), ({"Host": "localhost@evil.example"}, False), ({"Host": "10.0.0.1"}, False),
    ({"Origin": "http://evil.example"}, False), ({"Origin": "null"}, False), ({"Origin": "file://"}, False),
    ({"Host": "localhost:80", "Origin": "http://localhost"}, True),
    ({"Host": "localhost:80", "Origin": "http://localhost:3000"}, False),
    ({"Host": "localhost:80", "Origin": "http://127.0.0.1"}, False), ({"Origin": "http://[::1"}, False),
    ({"Sec-Fetch-Site": "cross-site"}, False), ({"Sec-Fetch-Site": "same-site"}, False), ({"Sec-Fetch-Site": "none"}, True),
    ({"Sec-Fetch-Site": "same-origin"}, True), ({"Host": "evil.example", "Origin": "http://evil.example"}, False),
])  # fmt: skip
def test_web_pages_and_names_that_point_here_are_refused(
    server: Server, root: str, headers: dict[str, str], fine: bool
) -> None:
    for path, body in (("/reset", ""), ("/v1/completions", json.dumps(GOOD["/v1/completions"])), ("/load_model", "{}")):
        if fine and path == "/load_model":
            continue
        found = requests.post(
            root + path, data=body.encode(), headers={"Content-Type": "application/json"} | headers, timeout=60
        )
        assert found.ok if fine else refused(found, 403), (path, found.text)
    if not fine:
        assert server._models.loaded_models
    if "Sec-Fetch-Site" not in headers:
        assert requests.get(f"{root}/health", headers=headers, timeout=30).ok == fine


def test_answers_over_a_kept_connection_are_sent_at_once(server: Server) -> None:
    """asyncio turns Nagle's algorithm off for sockets of TCP by name; else every answer waits for the client's delayed ACK."""
    assert server._socket.proto == socket.IPPROTO_TCP


def test_two_hosts_are_refused(server: Server) -> None:
    found = raw(server, b"POST /reset HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\nContent-Length: 0\r\n\r\n")
    assert found.startswith(b"HTTP/1.1 400"), found[:300]


def test_with_cors_web_pages_may_call_and_read_why_they_are_refused(right: str) -> None:
    with serving(TINY_OPT, enable_cors=True) as server:
        root, page = server.url.removesuffix("/v1"), {"Origin": "http://page.example", "Sec_Fetch_Site": "cross-site"}
        good = post(root, "/v1/completions", json.dumps(GOOD["/v1/completions"]), **page)
        assert good.ok
        wrong = post(root, "/v1/completions", '{"prompt": 5}', **page)
        refused(wrong, 400)
        for found in (good, wrong):
            assert found.headers["access-control-allow-origin"] in ("*", page["Origin"])
        refused(post(root, "/reset", "", Host="evil.example", **page), 403)


# --- clients at once -----------------------------------------------------------------------------------------------


def begun(server: Server, stream: bool, count: int = 240) -> http.client.HTTPConnection:
    """A long answer that has begun."""
    port, before = int(server.url.split(":")[2].removesuffix("/v1")), server.stats().counters.tokens
    line = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = {"prompt": PROMPT, "max_tokens": count, "stream": stream, "generation_config": '{"eos_token_id": []}'}
    line.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    wait_for(lambda: server.stats().counters.tokens > before)
    return line


def wait_for(there: Callable[[], bool]) -> None:
    for _ in range(6000):
        if there():
            return
        time.sleep(0.005)
    pytest.fail("it never came")


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_ends_when_its_client_leaves(server: Server, stream: bool) -> None:
    """Not only the one under way: those that wait behind it do not begin."""
    before = server.stats().counters.tokens
    lines = [begun(server, stream)]
    port = lines[0].port
    for _ in range(5):
        line = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        body = {"prompt": PROMPT, "max_tokens": 240, "stream": stream}
        line.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        lines.append(line)
    for line in lines:
        line.close()
    assert answer(server)
    assert server.stats().counters.tokens - before < 2 * 240


def test_slow_and_long_requests_let_others_through(server: Server, root: str) -> None:
    """Bodies that never come, and prompts as long as the bound: the health check and short prompts are answered meanwhile."""
    port = int(server.url.split(":")[2].removesuffix("/v1"))
    slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
    for line in slow:
        line.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
        )
    long = json.dumps({"prompt": "a" * 300_000})
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(post, root, "/v1/completions", long) for _ in range(2)]
        assert answer(server)
        assert requests.get(f"{root}/health", timeout=30).ok
        for job in jobs:
            assert "too long" in refused(job.result(), 400)
    for line in slow:
        line.close()


def test_more_requests_than_the_bound_are_put_off(server: Server, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MOST_REQUESTS", 1)
    line = begun(server, stream=False)
    found = post(root, "/v1/completions", json.dumps(GOOD["/v1/completions"]))
    assert (found.status_code, found.json()["error"]["type"]) == (503, "server_error")
    assert requests.get(f"{root}/health", timeout=30).ok
    line.close()
    monkeypatch.undo()


def test_the_model_is_not_unloaded_under_an_answer(server: Server, root: str) -> None:
    """Else the next request would load a second one beside it."""
    line = begun(server, stream=False)
    assert "under way" in refused(post(root, "/reset", ""), 409)
    assert line.getresponse().status == 200
    line.close()


def test_a_request_is_over_when_its_answer_is_sent() -> None:
    """Its client may unload the model at once, and ask again at once when that is done, whatever the server still tidies up."""
    statuses: list[int] = []

    async def check(path: str, body: dict[str, Any]) -> dict[str, Any]:
        return body

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})
        if following:
            await ask(following.pop())

    gate = guard.Guard(
        app,
        check,
        routes=("/v1/completions",),
        reset="/reset",
        host="localhost",
        local=True,
        most_bytes=99,
        open_to_pages=False,
    )

    async def ask(path: str) -> None:
        async def receive() -> Any:
            return {"type": "http.request", "body": b"{}"} if not read.is_set() and not read.set() else await asyncio.Future()

        async def send(message: Any) -> None:
            statuses.extend([message["status"]] if "status" in message else [])

        read = asyncio.Event()
        await gate(
            {"type": "http", "method": "POST", "path": path, "headers": [(b"content-type", b"application/json")]}, receive, send
        )

    following = ["/v1/completions", "/reset"]
    asyncio.run(ask("/v1/completions"))
    assert statuses == [200, 200, 200]


def test_unloading_and_asking_at_once_never_fails(server: Server, root: str) -> None:
    statuses: set[int] = set()

    def ask(number: int) -> None:
        found = (
            post(root, "/reset", "") if number % 3 == 0 else post(root, "/v1/completions", json.dumps(GOOD["/v1/completions"]))
        )
        statuses.add(found.status_code)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(ask, range(30)))
    assert statuses <= {200, 409, 503}
    assert answer(server)
    assert len(server._models.loaded_models) == 1


def test_batched_answers_end_too_and_names_of_requests_may_be_the_same(right: str) -> None:
    needs_batching()
    with serving(TINY_OPT, kv_cache_bytes=32 << 20) as server:
        root = server.url.removesuffix("/v1")
        line = begun(server, stream=False)
        line.close()
        body = json.dumps({"prompt": PROMPT, "max_tokens": 8, "temperature": 0})
        with ThreadPoolExecutor(4) as pool:
            jobs = [pool.submit(post, root, "/v1/completions", body, X_Request_Id="the same") for _ in range(4)]
            assert [job.result().json()["choices"][0]["text"] for job in jobs] == [right] * 4
        wait_for(lambda: not server._generations._cb_manager._cb.batch_processor.scheduler.active_requests)
        refused(post(root, "/v1/completions", json.dumps({"prompt": "and " * 300})), 400)
