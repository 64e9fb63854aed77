"""A Python that starts fast: what tests run instead of `sys.executable` where a fresh interpreter is not what they look at.

Importing torch and what transformers takes from it (its compiler, its distributed parts, sympy, scipy) costs five seconds, and
the suite starts some two hundred processes. Here a *server* imports them once, and forks for each start. transformers and
huggingface_hub read the environment as they are imported: a second server, forked from the first, has them too, and is asked
where their part of the environment is as it was. hf_flash is always imported by the process itself.

    [*python(), "-c", code, ...]      [*python(), "-m", module, ...]      [*python(), "script.py", ...]

`python()` is a small *client*: it hands its arguments, folder, environment and streams to the server, passes on signals, and
ends as the process ends. If it is killed, so is the process. Where the environment differs in what torch or the interpreter
themselves read, it becomes a real interpreter instead. The process has a pid and a process group of its own.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from importlib import import_module
from typing import Any, NoReturn

PRELOADED = (
    "PIL.Image", "jinja2", "numpy", "psutil", "regex", "safetensors.torch", "scipy.optimize", "sympy", "tokenizers",
    "torch", "torch._dynamo", "torch.distributed._composable.fsdp", "torch.distributed.checkpoint", "torch.distributed.fsdp",
    "torch.distributed.tensor", "torch.export", "torch.utils.cpp_extension", "yaml",
)  # fmt: skip
WITH_TRANSFORMERS = (
    "accelerate", "huggingface_hub.hf_api", "peft", "transformers.models.opt.modeling_opt", "transformers.pipelines",
    "transformers.quantizers.auto",
)  # fmt: skip
READ_EARLY = (
    "ATEN_", "GLIBC_", "GOMP_", "KMP_", "LANG", "LC_", "LD_", "MALLOC_", "MKL_", "OMP_", "PYTHONC", "PYTHONI", "PYTHONU",
    "PYTHONW", "TORCH", "VIRTUAL",
)  # fmt: skip
READ_BY_TRANSFORMERS = ("ACCELERATE_", "DISABLE_", "HF_E", "HF_H", "HF_T", "HOME", "HUGGINGFACE_", "TRANSFORMERS_", "XDG_")
SECOND = "-transformers"  # behind the address of the first server
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


# --- the server


def serve(path: str) -> None:
    """Import, then fork for each client and tell it how its process ended, until stdin ends; as two servers."""
    _import(PRELOADED)
    if os.fork() == 0:
        _import(WITH_TRANSFORMERS)
        path += SECOND
    gc.freeze()
    with socket.socket(socket.AF_UNIX) as listening, selectors.DefaultSelector() as ready:
        listening.bind(path)
        listening.listen(64)
        print("ready", flush=True)
        ready.register(listening, selectors.EVENT_READ, lambda: _start_for(listening.accept()[0], ready))
        ready.register(sys.stdin, selectors.EVENT_READ, sys.exit)
        while True:
            for key, _ in ready.select():
                key.data()


def _import(names: Iterable[str]) -> None:
    for name in names:
        with suppress(ImportError):  # what is not installed nobody imports
            import_module(name)


def _start_for(client: socket.socket, ready: selectors.BaseSelector) -> None:
    """Fork the process that a client asks for. From then on pass signals on to it, and kill it when the client is gone."""
    message, streams, _, _ = socket.recv_fds(client, 1 << 22, 3)
    while not message.endswith(b"\n"):
        message += client.recv(1 << 22)
    pid = os.fork()
    if pid == 0:
        _become(json.loads(message), streams)
    for stream in streams:
        os.close(stream)
    process = os.pidfd_open(pid)

    def pass_on() -> None:
        number = client.recv(1)
        signal.pidfd_send_signal(process, number[0] if number else signal.SIGKILL)
        if not number:
            ready.unregister(client)

    def tell() -> None:
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with suppress(OSError):
            client.sendall(json.dumps(status).encode())
        for part in (client, process):
            with suppress(KeyError):
                ready.unregister(part)
        client.close()
        os.close(process)

    ready.register(client, selectors.EVENT_READ, pass_on)
    ready.register(process, selectors.EVENT_READ, tell)


def _become(told: dict[str, Any], streams: list[int]) -> NoReturn:
    """Be the process that a client asked for, with everything that ends an interpreter."""
    os.setpgid(0, 0)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.closerange(3, 256)
    os.chdir(told["folder"])
    os.environ.clear()
    os.environ.update(told["environment"])
    tempfile.tempdir = None  # the one in this environment
    sys.path[1:1] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    sys.stdin, sys.stdout = open(0, encoding="utf-8"), open(1, "w", encoding="utf-8")
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1)
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 0
    try:
        _run(told["arguments"])
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else 0 if ending.code is None else 1
        if isinstance(ending.code, str):
            print(ending.code, file=sys.stderr)
    except KeyboardInterrupt:
        traceback.print_exc()
        code = -signal.SIGINT
    except BaseException:  # noqa: BLE001  # as an interpreter does
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    if code < 0:
        _end_by(-code)
    os._exit(code)


def _end_by(number: int) -> None:
    """End by a signal."""
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _run(arguments: list[str]) -> None:
    """Do what an interpreter does with these arguments."""
    kind, *rest = arguments
    if kind == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        main = type(sys)("__main__")
        sys.modules["__main__"] = main
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    elif kind == "-m":
        sys.argv, sys.path[0] = rest, os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = arguments, os.path.dirname(os.path.abspath(kind))
        runpy.run_path(kind, run_name="__main__")


# --- the client


def ask(path: str, before: dict[str, str], with_transformers: bool, arguments: list[str]) -> NoReturn:
    """Run a process by one of the servers, or become one."""
    environment = dict(os.environ)
    if _differ(before, environment, READ_EARLY) or arguments[0].startswith(("-X", "-W", "-I")):
        os.execv(sys.executable, [sys.executable, *arguments])
    with socket.socket(socket.AF_UNIX) as server:
        second = with_transformers and not _differ(before, environment, READ_BY_TRANSFORMERS)
        server.connect(path + SECOND * second)
        told = {"arguments": arguments, "folder": os.getcwd(), "environment": environment}
        message = json.dumps(told).encode() + b"\n"
        sent = socket.send_fds(server, [message], [0, 1, 2])
        for number in PASSED_ON:
            signal.signal(number, lambda number, _: server.sendall(bytes([number])))
        server.sendall(message[sent:])
        status = json.loads(server.recv(64))
    if status < 0:
        _end_by(-status)
    os._exit(status)


def _differ(one: Mapping[str, str], other: Mapping[str, str], prefixes: tuple[str, ...]) -> bool:
    return any(one.get(name) != other.get(name) for name in one.keys() | other.keys() if name.startswith(prefixes))


# --- for tests


def python(*, with_transformers: bool = True) -> list[str]:
    """What to run: the servers are started with the first call, and end with this process.

    Args:
        with_transformers: false for a process that has not imported transformers in any case.
    """
    path, before = _servers()
    return [sys.executable, "-IS", __file__, "ask", path, json.dumps([before, with_transformers])]


@cache
def _servers() -> tuple[str, dict[str, str]]:
    """The address of the first, and what was in the environment that matters."""
    path = os.path.join(tempfile.mkdtemp(prefix="hf-flash-tests-"), "python")
    server = subprocess.Popen([sys.executable, __file__, "serve", path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    atexit.register(_stop, server, path)
    assert server.stdout is not None
    if [server.stdout.readline() for _ in "12"] != [b"ready\n"] * 2:
        raise RuntimeError("the Python that starts fast did not start")
    prefixes = READ_EARLY + READ_BY_TRANSFORMERS
    return path, {name: value for name, value in os.environ.items() if name.startswith(prefixes)}


def _stop(server: subprocess.Popen[bytes], path: str) -> None:
    server.communicate()
    shutil.rmtree(os.path.dirname(path))


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        ask(sys.argv[2], *json.loads(sys.argv[3]), sys.argv[4:])
