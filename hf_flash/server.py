"""`hf-flash serve`: transformers' own OpenAI-compatible server around one flash model. Needs the `serve` extra.

Routes, requests and answers are those of `transformers serve`. What is added:

    the model           is loaded with its FFN on flash, plain or repacked, and stays loaded
    /v1/models          lists that model, under the name it was started with, which requests may leave out
    /flash/stats        what `hf_flash.stats` says, as JSON
    /metrics            the same for Prometheus
    the context         a request gets no more tokens than the model has positions left; without any it is refused
    errors              come with their reason, where OpenAI's clients show it; what a request got wrong is no 500
"""

from __future__ import annotations

import json
import logging
import socket
import threading
from pathlib import Path
from types import FrameType
from typing import Any, Final

import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from transformers import ContinuousBatchingConfig, StoppingCriteriaList
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.systemone import SystemOneHandler
from transformers.cli.serving.transcription import TranscriptionHandler
from transformers.cli.serving.utils import GenerationState

from .budget import format_bytes
from .config import FlashOffloadConfig
from .errors import ConfigError, HfFlashError, UsageError
from .runtime import stats
from .stats import FlashStats

logger = logging.getLogger("hf_flash")

_PAGE_TOKENS: Final = 256  # of the KV cache in continuous batching; transformers' default
_BATCH_TOKENS: Final = 512  # through the model at once, prompts in parts of it
_GRACE_S: Final = 10  # after Ctrl-C, for the token that answers under way are at


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
        config = uvicorn.Config(self._app(enable_cors), log_level=log_level, timeout_graceful_shutdown=_GRACE_S)
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
            transcription_handler=TranscriptionHandler(models, state),
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

        @app.exception_handler(HTTPException)
        async def refused(_: Request, error: HTTPException) -> JSONResponse:
            return _failure(error.status_code, error.detail)

        @app.exception_handler(ValueError)
        async def wrong_request(_: Request, error: ValueError) -> JSONResponse:
            return _failure(400, error)

        @app.exception_handler(HfFlashError)
        async def failed(_: Request, error: HfFlashError) -> JSONResponse:
            if isinstance(error, ConfigError):
                return _failure(400, error)
            logger.error("hf_flash: %s", error)
            return _failure(503, error)

        return app


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

    def load_model_and_processor(self, model_id_and_revision: str, *args: Any, **kwargs: Any) -> Any:
        """Only the one model, for which the memory is, and with the chat template."""
        if model_id_and_revision != self.process_model_name(self.force_model):
            name = model_id_and_revision.removesuffix("@main")
            raise ConfigError("this server has another model", expected=self.force_model, got=name)
        model, processor = super().load_model_and_processor(model_id_and_revision, *args, **kwargs)
        if self._template is not None:
            processor.chat_template = self._template
        return model, processor

    def template(self) -> str | None:
        """The chat template in use."""
        _, processor = self.load_model_and_processor(self.process_model_name(self.force_model))
        found: str | None = processor.chat_template
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


class _Fitting:
    """A generation manager of transformers that never asks for positions the model does not have: OPT's are learnt."""

    def __init__(self, manager: Any, stop: threading.Event) -> None:
        self._manager, self._stop = manager, stop

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        self._fit(model, inputs, gen_config)
        model = _Escaping(model)
        queue, streamer = self._manager.generate_streaming(model, processor, inputs, gen_config, *args, **kwargs)
        return queue, streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        self._fit(model, inputs, gen_config)
        return await self._manager.generate_non_streaming(model, processor, inputs, gen_config, *args, **kwargs)

    def _fit(self, model: Any, inputs: Any, gen_config: Any) -> None:
        ids, context = inputs["input_ids"], model.config.max_position_embeddings
        one_by_one = not isinstance(ids, list)  # else continuous batching, which takes token ids and nothing else
        length = ids.shape[-1] if one_by_one else len(ids)
        if length >= context:
            raise ConfigError("the prompt is too long for the model", expected=f"fewer than {context} tokens", got=length)
        gen_config.max_new_tokens = min(gen_config.max_new_tokens or context, context - length)
        if one_by_one:
            inputs["stopping_criteria"] = StoppingCriteriaList([self._stopped])

    def _stopped(self, ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(ids),), self._stop.is_set())


class _Escaping:
    """A model whose errors can be put between the quotes of JSON on one line, which is what transformers does in a stream."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, **kwargs: Any) -> Any:
        try:
            return self._model.generate(**kwargs)
        except HfFlashError as error:
            logger.error("hf_flash: %s", error)
            raise RuntimeError(json.dumps(str(error))[1:-1]) from error


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
    taken = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
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
    """In the form that OpenAI's clients show."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": str(what), "type": kind}}, status_code=status)
