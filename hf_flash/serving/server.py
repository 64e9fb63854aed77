"""`hf-flash serve`: transformers' own OpenAI-compatible server around one flash model. Needs the `serve` extra.

Routes, requests and answers are those of `transformers serve`. What is added:

    the model           is loaded with its FFN on flash, plain or repacked, and stays loaded
    /v1/models          lists that model, under the name the server was started with, which requests may leave out
    /flash/stats        gives what `hf_flash.stats` returns, as JSON (application.py)
    /metrics            gives the same for Prometheus
    the context         bounds an answer: a prompt that leaves no position free is refused (context.py)
    who may ask         programs of this machine, and web pages only with `enable_cors` (guard.py)
    bounds              hold for bodies and for every field that is used; the answer names the bound (guard.py, fields.py)
    clients that leave  end their answer (transformers_serving.py)
    errors              give their reason where OpenAI's clients show it; a wrong request is never answered with 500

A request passes guard.py, fields.py through admission.py, the routes of application.py, and transformers' handlers.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, TemplateSyntaxError
from rich.table import Table
from transformers import ContinuousBatchingConfig

from hf_flash.base.sizes import format_bytes
from hf_flash.base.tables import facts
from hf_flash.errors import ConfigError, HfFlashError, UsageError
from hf_flash.runtime.counters import FlashStats
from hf_flash.runtime.model import stats
from hf_flash.serving import fields
from hf_flash.serving.admission import Admission
from hf_flash.serving.application import make_application
from hf_flash.serving.context import context_length
from hf_flash.serving.guard import Guard, is_local
from hf_flash.serving.listening import HttpServer, open_socket
from hf_flash.serving.transformers_serving import Generations, OneModel, names_gguf_file
from hf_flash.store.checkpoint import resolve_folder

_GENERATION: Final = re.compile(r"{%-?\s*(end)?generation\s*-?%}")  # transformers' own tag
_PAGE_TOKENS: Final = 256  # of the KV cache in continuous batching; transformers' default
_BATCH_TOKENS: Final = 512  # through the model at once, prompts in parts of it
_BODY_BYTES: Final = 1 << 20  # every body may have so many,
_BYTES_A_TOKEN: Final = 64  # or so many for each position of the model


class Server:
    """Loads a model and listens; [`run`] answers.

    Args:
        model: folder or Hub repository, repacked or plain; `name@revision` for another revision.
        host, port: where to listen; port 0 takes a free one, which `url` says.
        dtype: of compute; `"auto"` is the checkpoint's.
        attn_implementation: as in `from_pretrained`.
        chat_template: a file with a Jinja template, for models that come without one, or instead of theirs.
        kv_cache_bytes: decode requests together, by continuous batching, with a KV cache of this size. All then share the
            sampling arguments of the first. `None`: one request after the other.
        enable_cors: let web pages from anywhere call it.
        log_level: of the server's own lines.

    Raises:
        ConfigError: the model or the template cannot be loaded, or the address cannot be had.
        HfFlashError: as `from_pretrained` of a flash model.
    """

    def __init__(
        self,
        model: str,
        *,
        host: str = "localhost",
        port: int = 8000,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        chat_template: Path | None = None,
        kv_cache_bytes: int | None = None,
        enable_cors: bool = False,
        log_level: str = "info",
    ) -> None:
        template = None if chat_template is None else _read_template(chat_template)
        _check_model(model)
        self._socket = open_socket(host, port)
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._socket.getsockname()[1]}/v1"
        try:
            self._models = _load(model, template, dtype, attn_implementation, kv_cache_bytes is not None)
            batching = None if kv_cache_bytes is None else _plan_kv_cache(kv_cache_bytes, self.stats())
        except BaseException:
            self._socket.close()
            raise
        self._generations = Generations(batching)
        self._models.drain = self._generations.drain
        self._admission = Admission(self._models)
        self._http = HttpServer(self._guard(host, enable_cors), self._generations.stop, self._generations.shutdown, log_level)
        self._socket.listen()  # clients that come before `run` wait

    def stats(self) -> FlashStats:
        """Return what the model did and holds.

        Raises:
            UsageError: it is not loaded: a client sent `/reset`, and no request came since.
        """
        if (loaded := self._models.loaded()) is None:
            raise UsageError("the model is not loaded at the moment", hint="the next request loads it")
        return stats(loaded[0])

    def describe(self) -> Table:
        """Describe what is served where, to be printed by rich."""
        found, chat = self.stats(), "/chat/completions, /completions, /responses"
        if self._models.chat_template() is None:
            chat = "/completions; the model has no chat template: --chat-template FILE for /chat/completions"
        dram, budget, dense = map(format_bytes, (found.dram_bytes, found.budget_bytes, found.dense_bytes))
        return facts([
            ("model", self._models.name),
            ("base URL", self.url),
            ("answers", chat),
            ("counters", "/flash/stats (JSON), /metrics (Prometheus), beside the base URL's /v1"),
            ("weights in DRAM", f"{dram} of a budget of {budget}; the dense model: {dense}"),
            ("on flash", f"{found.what_fits}; reader {found.reader}"),
        ])  # fmt: skip

    def run(self) -> None:
        """Serve until Ctrl-C or SIGTERM. Answers under way end with the token they are at."""
        try:
            self._http.run(sockets=[self._socket])
        except KeyboardInterrupt:
            pass  # all is shut down by now: uvicorn raises the signal again for its caller
        finally:
            self._generations.shutdown()
            self._admission.close()
            self._socket.close()

    def stop(self) -> None:
        """Let [`run`] return, as Ctrl-C does; from any thread."""
        self._generations.stop.set()
        self._http.should_exit = True

    def _guard(self, host: str, enable_cors: bool) -> Guard:
        return Guard(
            make_application(self._models, self._generations, self.stats, enable_cors=enable_cors),
            self._admission.admit,
            routes=tuple(fields.ROUTES),
            reset="/reset",
            host=host,
            local=is_local(self._socket.getsockname()[0]),
            most_bytes=max(_BODY_BYTES, _BYTES_A_TOKEN * context_length(self._models.load()[0])),
            open_to_pages=enable_cors,
        )


def _read_template(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION.sub("", text))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("cannot read the chat template", where=path, got=error) from error
    except TemplateSyntaxError as error:
        raise ConfigError(
            "the chat template is no Jinja template", where=f"{path}, line {error.lineno}", got=error.message
        ) from error
    return text


def _check_model(model: str) -> None:
    """Refuse names that transformers' server would take for something else."""
    if names_gguf_file(model):
        raise ConfigError("GGUF weights cannot be served", where="MODEL", got=model, hint="name a plain or repacked model")
    if "@" in model and Path(model).exists():
        raise ConfigError("what follows @ is a revision", where="MODEL", got=model, hint="rename the folder, or link to it")
    name, _, revision = model.partition("@")
    resolve_folder(name, revision=revision or None, config_only=True)  # at once: loading asks the Hub for every file, and again


def _load(model: str, *settings: Any) -> OneModel:
    try:
        return OneModel(model, *settings)
    except HfFlashError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError("the model cannot be loaded", where=model, got=error) from error


def _plan_kv_cache(kv_cache_bytes: int, found: FlashStats) -> ContinuousBatchingConfig:
    """Plan a KV cache of that size; transformers itself would take most of the machine's memory for it.

    Raises:
        ConfigError: it holds less than one page.
    """
    page_bytes = found.kv_cache_bytes_per_token * _PAGE_TOKENS
    if kv_cache_bytes < page_bytes:
        raise ConfigError(
            "too small for a KV cache",
            where="--kv-cache",
            expected=f"at least {format_bytes(page_bytes)}: one page of {_PAGE_TOKENS} tokens",
            got=format_bytes(kv_cache_bytes),
        )
    return ContinuousBatchingConfig(
        page_size=_PAGE_TOKENS, num_blocks=kv_cache_bytes // page_bytes, max_batch_tokens=_BATCH_TOKENS
    )
