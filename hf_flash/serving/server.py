"""`hf-flash serve`: transformers' own OpenAI-compatible server around one flash model. Needs the `serve` extra.

Routes, requests and answers are those of `transformers serve`. What is added:

    the model           is loaded with its FFN on flash, plain or repacked, and stays loaded
    /v1/models          lists that model, under the name it was started with, which requests may leave out
    /flash/stats        what `hf_flash.stats` says, as JSON
    /metrics            the same for Prometheus
    the context         a request gets no more tokens than the model has positions left; without any it is refused
    who may ask         this machine's programs, and web pages only with `enable_cors` (serving/guard.py)
    bounds              on bodies and on every field that is used (serving/guard.py, serving/fields.py); the answer says which
    clients that leave  end their answer
    errors              come with their reason, where OpenAI's clients show it; what a request got wrong is no 500
"""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import socket
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any, Final

import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from jinja2 import TemplateError
from starlette.exceptions import HTTPException as AnyHTTPException
from transformers import ContinuousBatchingConfig, GenerationConfig, StoppingCriteriaList
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.systemone import SystemOneHandler
from transformers.cli.serving.utils import GenerateManager, GenerationState, _GenerationCancelled, split_model_id

from hf_flash.base.sizes import format_bytes
from hf_flash.config import FlashOffloadConfig
from hf_flash.errors import ConfigError, HfFlashError, UsageError
from hf_flash.runtime.counters import FlashStats
from hf_flash.runtime.model import stats
from hf_flash.serving import fields
from hf_flash.serving.guard import Guard, failure, gone, is_local, texts

logger = logging.getLogger("hf_flash")

_PAGE_TOKENS: Final = 256  # of the KV cache in continuous batching; transformers' default
_BATCH_TOKENS: Final = 512  # through the model at once, prompts in parts of it
_GRACE_S: Final = 10  # after Ctrl-C, for the token that answers under way are at
_DRAIN_S: Final = 60  # for the token that an answer is at when the model is unloaded
_BODY_BYTES: Final = 1 << 20  # every body may have so many,
_BYTES_A_TOKEN: Final = 64  # or so many for each position of the model
_SHORT: Final = 16 << 10  # characters that any tokenizer takes in no time
_TEMPLATE_NAMES: Final = ("messages", "load_audio_from_video")  # that transformers itself gives to a chat template


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
        template = None if chat_template is None else _read(chat_template)
        if split_model_id(model)[1] is not None:
            raise ConfigError("GGUF weights cannot be served", where="MODEL", got=model, hint="name a plain or repacked model")
        if "@" in model and Path(model).exists():
            raise ConfigError("what follows @ is a revision", where="MODEL", got=model, hint="rename the folder, or link to it")
        self._socket = _bound(host, port)
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._socket.getsockname()[1]}/v1"
        try:
            self._models = _loaded(model, template, dtype, attn_implementation, kv_cache_bytes is not None)
            cache = None if kv_cache_bytes is None else _paged(kv_cache_bytes, self.stats())
        except BaseException:
            self._socket.close()
            raise
        self._state = _State(cache)
        self._models.drain = self._state.drain
        self._admission = ThreadPoolExecutor(1, "hf-flash-admission")  # long prompts wait for each other, and nobody for them
        guard = Guard(
            self._app(enable_cors),
            self._admitted,
            routes=tuple(fields.ROUTES),
            reset="/reset",
            host=host,
            local=is_local(self._socket.getsockname()[0]),
            most_bytes=max(_BODY_BYTES, _BYTES_A_TOKEN * _context(self._models.load()[0])),
            open_to_pages=enable_cors,
        )
        config = uvicorn.Config(guard, log_level=log_level, timeout_graceful_shutdown=_GRACE_S)
        self._server = _Uvicorn(config, self._state.stop)
        self._socket.listen()  # clients that come before `run` wait

    def stats(self) -> FlashStats:
        """What the model did and holds.

        Raises:
            UsageError: it is not loaded: a client sent `/reset`, and none a request since.
        """
        for loaded in list(self._models.loaded_models.values()):
            if (model := loaded.model) is not None:
                return stats(model)
        raise UsageError("the model is not loaded at the moment", hint="the next request loads it")

    def describe(self) -> str:
        """What is served where, for a terminal."""
        found, chat = self.stats(), "/chat/completions, /completions, /responses"
        if self._models.template() is None:
            chat = "/completions; the model has no chat template: --chat-template FILE for /chat/completions"
        dram, budget, dense = map(format_bytes, (found.dram_bytes, found.budget_bytes, found.dense_bytes))
        rows = [
            ("model", self._models.force_model),
            ("base URL", self.url),
            ("answers", chat),
            ("counters", "/flash/stats (JSON), /metrics (Prometheus), beside the base URL's /v1"),
            ("weights in DRAM", f"{dram} of a budget of {budget}; the dense model: {dense}"),
            ("predictor, reader", f"{found.predictor}, {found.reader}"),
        ]
        return "\n".join(f"{name:<20}{value}" for name, value in rows)

    def run(self) -> None:
        """Serve until Ctrl-C or SIGTERM. Answers under way end with the token they are at."""
        try:
            self._server.run(sockets=[self._socket])
        except KeyboardInterrupt:
            pass  # everything is shut down by then: uvicorn raises the signal again for those who called it
        finally:
            self._state.shutdown()
            self._admission.shutdown(wait=False, cancel_futures=True)
            self._socket.close()

    def stop(self) -> None:
        """Let [`run`] return, as Ctrl-C does; from any thread."""
        self._state.stop.set()
        self._server.should_exit = True

    def _app(self, enable_cors: bool) -> FastAPI:
        models, state = self._models, self._state
        app: FastAPI = build_server(
            models,
            ChatCompletionHandler(models, state),
            completion_handler=CompletionHandler(models, state),
            response_handler=ResponseHandler(models, state),
            transcription_handler=_NoAudio(),
            systemone_handler=SystemOneHandler(model_manager=models, generation_state=state),
            generation_state=state,
            enable_cors=enable_cors,
        )

        @app.get("/flash/stats")
        def flash_stats() -> JSONResponse:
            return JSONResponse(self.stats().to_dict())

        @app.get("/metrics")
        def metrics() -> PlainTextResponse:
            return PlainTextResponse(prometheus(self.stats()), media_type="text/plain; version=0.0.4")

        @app.exception_handler(AnyHTTPException)
        async def refused(_: Request, error: AnyHTTPException) -> JSONResponse:
            return _failure(error.status_code, error.detail)

        @app.exception_handler(RequestValidationError)
        @app.exception_handler(TemplateError)
        @app.exception_handler(ValueError)
        async def wrong_request(_: Request, error: Exception) -> JSONResponse:
            return _failure(400, error)

        @app.exception_handler(HfFlashError)
        async def failed(_: Request, error: HfFlashError) -> JSONResponse:
            if isinstance(error, ConfigError):
                return _failure(400, error)
            logger.error("hf_flash: %s", error)
            return _failure(503, error)

        @app.exception_handler(Exception)
        async def broken(_: Request, error: Exception) -> JSONResponse:
            return _failure(500, f"{type(error).__name__}: {error}")

        return app

    async def _admitted(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """A request whose fields are valid, for a model that is loaded, with a prompt that may fit.

        What takes long is done outside of the event loop, in which transformers' handlers run.

        Raises:
            ConfigError: the request is refused.
            HfFlashError: the model cannot be loaded again.
        """
        body = fields.check(path, body)
        if path == "/load_model":
            self._models.check_name(self._models.process_model_name(body["model"]))
            return body

        def apart(work: Any, *args: Any) -> asyncio.Future[Any]:
            return asyncio.get_running_loop().run_in_executor(self._admission, work, *args)

        model, processor = self._models.loaded() or await apart(self._models.load)
        _check_settings(fields.used(path, body), model, processor)
        words = texts(body)
        if sum(map(len, words)) > _SHORT:
            length = await apart(_tokens, processor, words)
            _check_length(length - len(words), _context(model))
        return body


class _Uvicorn(uvicorn.Server):
    """Says when it is told to stop."""

    def __init__(self, config: uvicorn.Config, stop: threading.Event) -> None:
        super().__init__(config)
        self._stop = stop

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._stop.set()
        super().handle_exit(sig, frame)


class _FlashModels(ModelManager):
    """Loads the model on flash, and knows no other."""

    def __init__(
        self, model: str, template: str | None, dtype: str, attn_implementation: str | None, continuous_batching: bool
    ) -> None:
        self._template = template
        self.drain: Callable[[], None] | None = None  # waits for answers under way
        super().__init__(
            device="cpu",
            dtype=dtype,
            attn_implementation=attn_implementation,
            continuous_batching=continuous_batching,
            force_model=model,
        )

    def get_quantization_config(self) -> FlashOffloadConfig:
        """Names nothing: arguments come from `hf_flash.configure` and from the model."""
        return FlashOffloadConfig()

    def check_name(self, model_id_and_revision: str) -> None:
        """Refuse every model but the one for which the memory is."""
        if model_id_and_revision != self.process_model_name(self.force_model):
            name = model_id_and_revision.removesuffix("@main")
            raise ConfigError("this server has another model", expected=self.force_model, got=name)

    def load_model_and_processor(
        self, model_id_and_revision: str, *args: Any, gguf_file: str | None = None, **kwargs: Any
    ) -> Any:
        """Only the one model, and with the chat template."""
        self.check_name(model_id_and_revision if gguf_file is None else f"{model_id_and_revision}:{gguf_file}")
        model, processor = super().load_model_and_processor(model_id_and_revision, *args, **kwargs)
        if self._template is not None:
            processor.chat_template = self._template
        return model, processor

    def load(self) -> tuple[Any, Any]:
        """The model and its processor, loaded if they are not."""
        model, processor = self.load_model_and_processor(self.process_model_name(self.force_model))
        return model, processor

    def loaded(self) -> tuple[Any, Any] | None:
        """The same, if they are there."""
        found = self.loaded_models.get(self.process_model_name(self.force_model))
        return None if found is None or found.model is None else (found.model, found.processor)

    def shutdown(self) -> None:
        """Unload the model once no answer uses it: two do not fit into the memory of one."""
        if self.drain is not None:
            self.drain()
        with self._model_locks[self.process_model_name(self.force_model)]:  # nobody gets half of it
            super().shutdown()

    def template(self) -> str | None:
        """The chat template in use."""
        found: str | None = self.load()[1].chat_template
        return found

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        """The one model there is; the stock server lists the Hub cache, which this one would not load from."""
        return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": "hf_flash"}]


def _loaded(model: str, *settings: Any) -> _FlashModels:
    try:
        return _FlashModels(model, *settings)
    except HfFlashError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError("the model cannot be loaded", where=model, got=error) from error


class _State(GenerationState):
    """Hands out generators that respect the model's context, and end when the server is told to stop."""

    def __init__(self, cache: ContinuousBatchingConfig | None) -> None:
        super().__init__(continuous_batching=cache is not None, cb_config=cache)
        self.stop = threading.Event()

    def get_manager(self, model_id: str, use_cb: bool = False) -> Any:
        return _Fitting(super().get_manager(model_id, use_cb=use_cb), self.stop)

    def drain(self) -> None:
        """Return when no answer is under way; those that wait have left."""
        self.shutdown()  # of continuous batching, which holds a model
        for manager in list(self._generate_managers.values()):
            manager.submit(int).result(_DRAIN_S)


class _NoAudio:
    """In place of transcriptions, which no model has that runs on flash."""

    async def handle_request(self, _: Request) -> JSONResponse:
        raise HTTPException(400, "this server's model reads text and transcribes no audio")


class _Left(Exception):
    """The client of a request is gone."""


class _Fitting:
    """A generation manager of transformers that never asks for positions the model does not have: OPT's are learnt.

    Answers end when the server is told to stop, and when their client leaves.
    """

    def __init__(self, manager: Any, stop: threading.Event) -> None:
        self._manager = manager
        self._ends = [event for event in (stop, gone.get()) if event is not None]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *args: Any, request_id: str, **kwargs: Any
    ) -> tuple[Any, Any]:
        self._fit(model, inputs, gen_config)
        queue, streamer = self._manager.generate_streaming(
            self._watched(model), processor, inputs, gen_config, *args, request_id=_unique(request_id), **kwargs
        )
        return queue, streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *args: Any, request_id: str, **kwargs: Any
    ) -> Any:
        self._fit(model, inputs, gen_config)
        name = _unique(request_id)
        answer = asyncio.ensure_future(self._manager.generate_non_streaming(
            self._watched(model), processor, inputs, gen_config, *args, request_id=name, **kwargs
        ))  # fmt: skip
        try:
            if not isinstance(self._manager, GenerateManager):
                await self._or_left(answer, name)
            return await answer
        except _Left as error:
            raise HTTPException(499, "the client left") from error

    async def _or_left(self, answer: asyncio.Future[Any], request_id: str) -> None:
        """Wait for an answer of continuous batching; it is given up when the client leaves."""
        if (left := gone.get()) is None:
            return
        leaving = asyncio.ensure_future(left.wait())
        await asyncio.wait([answer, leaving], return_when=asyncio.FIRST_COMPLETED)
        leaving.cancel()
        if not answer.done():
            answer.cancel()
            self._manager._cb.cancel_request(request_id)
            raise _Left

    def _watched(self, model: Any) -> Any:
        return model if not isinstance(self._manager, GenerateManager) else _Watched(model, self._ended)

    def _ended(self) -> bool:
        return any(event.is_set() for event in self._ends)

    def _fit(self, model: Any, inputs: Any, gen_config: Any) -> None:
        ids, context = inputs["input_ids"], _context(model)
        one_by_one = not isinstance(ids, list)  # else continuous batching, which takes token ids and nothing else
        length = ids.shape[-1] if one_by_one else len(ids)
        if length == 0:
            raise ConfigError("the prompt is empty", expected="at least one token")
        _check_length(length, context)
        gen_config.max_new_tokens = min(gen_config.max_new_tokens or context, context - length)
        if one_by_one:
            inputs["stopping_criteria"] = StoppingCriteriaList([self._stopped])

    def _stopped(self, ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(ids),), self._ended(), dtype=torch.bool, device="cpu")


class _Watched:
    """A model that begins no answer for a client that is gone. Its errors can be put between the quotes of JSON on one line,
    which is what transformers does in a stream."""

    def __init__(self, model: Any, ended: Callable[[], bool]) -> None:
        self._model, self._ended = model, ended

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, **kwargs: Any) -> Any:
        if self._ended():
            raise _Left
        try:
            return self._model.generate(**kwargs)
        except _GenerationCancelled:
            raise
        except Exception as error:
            if "streamer" not in kwargs:
                raise
            logger.error("hf_flash: %s", error)
            raise RuntimeError(json.dumps(str(error))[1:-1]) from error


def _unique(request_id: str) -> str:
    """A name that no other request has: clients choose theirs, and continuous batching keeps answers by them."""
    return f"{request_id}-{uuid.uuid4().hex[:12]}"


def _context(model: Any) -> int:
    return int(model.config.max_position_embeddings)


def _tokens(processor: Any, words: list[str]) -> int:
    return len(getattr(processor, "tokenizer", processor)("\n".join(words)).input_ids)


def _check_length(length: int, context: int) -> None:
    if length >= context:
        raise ConfigError("the prompt is too long for the model", expected=f"fewer than {context} tokens", got=length)


def _check_settings(body: dict[str, Any], model: Any, processor: Any) -> None:
    """What depends on the model.

    Raises:
        ConfigError: a field asks for what it does not have, or for what is transformers' own to say.
    """
    if config := body.get("generation_config"):
        usual = GenerationConfig().to_dict() | model.generation_config.to_dict()
        fields.check_generation(config, usual, model.config.vocab_size)
    fields.check_tokens([int(token) for token in body.get("logit_bias", {})], model.config.vocab_size, "logit_bias")
    reserved = {*inspect.signature(processor.apply_chat_template).parameters, *_TEMPLATE_NAMES}
    if taken := sorted(reserved & body.get("chat_template_kwargs", {}).keys()):
        raise ConfigError("chat_template_kwargs: not yours to set", expected="variables of the chat template", got=taken)


def prometheus(found: FlashStats) -> str:
    """The numbers in `found` as Prometheus wants them: what only grows is a counter, the rest a gauge."""
    plain = found.to_dict()
    counters: dict[str, float] = plain.pop("counters")
    rows = [(f"hf_flash_{name}_total", "counter", value) for name, value in counters.items()]
    rows += [(f"hf_flash_{name}", "gauge", value) for name, value in plain.items() if isinstance(value, int | float)]
    return "".join(f"# TYPE {name} {kind}\n{name} {value}\n" for name, kind, value in rows)


def _paged(kv_cache_bytes: int, found: FlashStats) -> ContinuousBatchingConfig:
    """A KV cache of that size; left alone, transformers takes most of the machine's memory for it."""
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


def _bound(host: str, port: int) -> socket.socket:
    """A socket with the address, taken before the model is loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    taken = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # named, or asyncio leaves Nagle on: 40 ms an answer
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((host, port))
    except (OSError, OverflowError) as error:
        taken.close()
        raise ConfigError("cannot listen there", where=f"{host}:{port}", got=error, hint="another --port") from error
    return taken


def _read(template: Path) -> str:
    try:
        return template.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("cannot read the chat template", where=template, got=error) from error


def _failure(status: int, what: object) -> JSONResponse:
    return JSONResponse(failure(status, what), status_code=status)
