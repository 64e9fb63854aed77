"""`hf-flash serve`: transformers' own OpenAI-compatible server around one flash model. Needs the `serve` extra.

Routes, requests and answers are those of `transformers serve`. What is added:

    the model           is loaded with its FFN on flash, plain or repacked, and stays loaded
    /v1/models          lists that model, under the name it was started with, which requests may leave out
    /flash/stats        what `hf_flash.stats` says, as JSON
    /metrics            the same for Prometheus
    the context         a request gets no more tokens than the model has positions left; without any it is refused
    errors              what a request got wrong is answered with 400 and the reason, not with 500
"""

from __future__ import annotations

import logging
import socket
from pathlib import Path
from typing import Any, Final

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from transformers import ContinuousBatchingConfig
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
_GRACE_S: Final = 3  # after Ctrl-C, for answers under way


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
        self.url = f"http://{host}:{self._socket.getsockname()[1]}/v1"
        batching = kv_cache_bytes is not None
        try:
            self._models = _FlashModels(model, template, dtype, attn_implementation, batching)
        except HfFlashError:
            raise
        except (OSError, ValueError) as error:
            raise ConfigError("the model cannot be loaded", where=model, got=error) from error
        state = _State(batching, None if kv_cache_bytes is None else _paged(kv_cache_bytes, self.stats()))
        app = build_server(
            self._models,
            ChatCompletionHandler(self._models, state),
            completion_handler=CompletionHandler(self._models, state),
            response_handler=ResponseHandler(self._models, state),
            transcription_handler=TranscriptionHandler(self._models, state),
            systemone_handler=SystemOneHandler(model_manager=self._models, generation_state=state),
            generation_state=state,
            enable_cors=enable_cors,
        )
        self._add_routes(app)
        self._state = state
        self._server = uvicorn.Server(uvicorn.Config(app, log_level=log_level, timeout_graceful_shutdown=_GRACE_S))
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
        """Serve until Ctrl-C or SIGTERM. Answers under way get a few seconds to finish."""
        try:
            self._server.run(sockets=[self._socket])
        except KeyboardInterrupt:
            pass  # everything is shut down by then: uvicorn raises the signal again for those who called it
        finally:
            self._state.shutdown()
            self._socket.close()

    def _add_routes(self, app: FastAPI) -> None:
        @app.get("/flash/stats")
        def flash_stats() -> JSONResponse:
            return JSONResponse(self.stats().to_dict())

        @app.get("/metrics")
        def metrics() -> PlainTextResponse:
            return PlainTextResponse(prometheus(self.stats()), media_type="text/plain; version=0.0.4")

        @app.exception_handler(ValueError)
        async def wrong_request(_: Request, error: ValueError) -> JSONResponse:
            return _refused(400, "invalid_request_error", error)

        @app.exception_handler(HfFlashError)
        async def failed(_: Request, error: HfFlashError) -> JSONResponse:
            logger.error("hf_flash: %s", error)
            return _refused(503, "server_error", error)


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


class _State(GenerationState):
    """Hands out generators that respect the model's context."""

    def __init__(self, continuous_batching: bool, cache: ContinuousBatchingConfig | None) -> None:
        super().__init__(continuous_batching=continuous_batching, cb_config=cache)

    def get_manager(self, model_id: str, use_cb: bool = False) -> Any:
        return _Fitting(super().get_manager(model_id, use_cb=use_cb))


class _Fitting:
    """A generation manager of transformers that never asks for positions the model does not have: OPT's are learnt."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        _fit(model, inputs, gen_config)
        queue, streamer = self._manager.generate_streaming(model, processor, inputs, gen_config, *args, **kwargs)
        return queue, streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        _fit(model, inputs, gen_config)
        return await self._manager.generate_non_streaming(model, processor, inputs, gen_config, *args, **kwargs)


def _fit(model: Any, inputs: Any, gen_config: Any) -> None:
    ids, context = inputs["input_ids"], model.config.max_position_embeddings
    length = len(ids) if isinstance(ids, list) else ids.shape[-1]
    if length >= context:
        raise ConfigError("the prompt is too long for the model", expected=f"fewer than {context} tokens", got=length)
    gen_config.max_new_tokens = min(gen_config.max_new_tokens or context, context - length)


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


def _refused(status: int, kind: str, error: Exception) -> JSONResponse:
    return JSONResponse({"error": {"message": str(error), "type": kind}}, status_code=status)
