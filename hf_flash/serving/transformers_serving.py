"""Everything that `hf-flash serve` uses of transformers' own server. No other module of ours may import `transformers.cli`.

`transformers.cli.serving` is private: a release may change any of it. tests/contract/test_transformers_seam.py tests every line
of this list by its name, so that a release that breaks one fails there first.

    build_server                  the FastAPI application with the routes of `transformers serve`
    ChatCompletionHandler, CompletionHandler, ResponseHandler, SystemOneHandler
                                  each answers one route: it reads the fields and asks a generation manager for text
    transcription_handler         the argument of `build_server` that gets what no text model can answer
    split_model_id                tells whether the name of a model has a GGUF file in it

    ModelManager                  loads the model and keeps it; `OneModel` overrides
        get_quantization_config       to give our config to `from_pretrained`
        load_model_and_processor      to load no other model, and to set the chat template
        list_models, get_gen_models   to list the one model in `/v1/models`; the second is the name in 5.23
        shutdown                      to unload the model only when no answer uses it
                                  and uses
        force_model, process_model_name   the name of the one model, and the key that stands for it
        loaded_models                 its `.model` and `.processor`, under that key, as long as they are loaded
        _model_locks                  under that key, the lock that is held while the model is loaded

    GenerationState               gives a generation manager to every request; `Generations` overrides
        get_manager                   to put a `_BoundedManager` around it
                                  and uses
        shutdown                      to end continuous batching, which holds a model
        _generate_managers            the managers without batching, whose threads may have answers under way

    GenerateManager               generates one answer after the other, on a thread of its own; `_BoundedManager` wraps
        generate_streaming, generate_non_streaming   to bound and to end answers. `inputs` go to `model.generate` as keywords,
                                      and so `stopping_criteria` can be put into them
        submit                        runs a function on that thread, after the answers that wait there
    CBGenerateManager             generates answers together, by continuous batching. The same two methods, and
        _cb.stop                      ends all of them
        _cb.cancel_request            ends the answer of a client that left. Answers are kept by the request's id there

    streamer                      the keyword of `model.generate` that marks a streamed answer. The text of its error is put
                                  between quotes of JSON as it is, so `_WatchedModel` escapes it
    _GenerationCancelled          ends a streamed answer whose client left. It is no error
    TEMPLATE_NAMES                the variables that transformers itself gives to a chat template
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import uuid
from collections.abc import Callable
from typing import Any, Final

import torch
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from transformers import ContinuousBatchingConfig, StoppingCriteriaList
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.systemone import SystemOneHandler
from transformers.cli.serving.utils import GenerateManager, GenerationState, _GenerationCancelled, split_model_id

from hf_flash.config import FlashOffloadConfig
from hf_flash.errors import ConfigError, UsageError
from hf_flash.serving.context import check_length, context_length
from hf_flash.serving.guard import gone

logger = logging.getLogger("hf_flash")

TEMPLATE_NAMES: Final = ("messages", "load_audio_from_video")
_LOOK_S: Final = 0.1  # between looks at whether a request of continuous batching must end
_STOP_S: Final = 1  # for the step that continuous batching is at when the server stops
_DRAIN_S: Final = 60  # for the token that an answer is at when the model is unloaded


def build_application(models: OneModel, generations: Generations, *, enable_cors: bool) -> FastAPI:
    """Build the application that `transformers serve` runs, around our model and our generations."""
    app: FastAPI = build_server(
        models,
        ChatCompletionHandler(models, generations),
        completion_handler=CompletionHandler(models, generations),
        response_handler=ResponseHandler(models, generations),
        transcription_handler=_NoTranscription(),
        systemone_handler=SystemOneHandler(model_manager=models, generation_state=generations),
        generation_state=generations,
        enable_cors=enable_cors,
    )
    return app


def names_gguf_file(model: str) -> bool:
    """Tell whether the name of a model has a GGUF file in it: `repository:file.gguf`."""
    return split_model_id(model)[1] is not None


class _NoTranscription:
    """In place of transcriptions: no model that runs on flash can hear."""

    async def handle_request(self, _: Request) -> JSONResponse:
        raise HTTPException(400, "this server's model reads text and transcribes no audio")


# --- the model -----------------------------------------------------------------------------------------------------------


class OneModel(ModelManager):
    """Loads one model with its FFN on flash, and no other.

    Args:
        model: folder or Hub repository, perhaps with `@revision`.
        chat_template: text of a Jinja template that replaces the model's own, or `None`.
        dtype, attn_implementation: as in `from_pretrained`.
        continuous_batching: whether answers are generated together.
    """

    def __init__(
        self, model: str, chat_template: str | None, dtype: str, attn_implementation: str | None, continuous_batching: bool
    ) -> None:
        self._chat_template = chat_template
        self.drain: Callable[[], None] | None = None  # waits for answers under way
        super().__init__(
            device="cpu",
            dtype=dtype,
            attn_implementation=attn_implementation,
            continuous_batching=continuous_batching,
            force_model=model,
        )

    @property
    def name(self) -> str:
        """The name that the server was started with."""
        name: str = self.force_model
        return name

    def check_name(self, name: str) -> None:
        """Refuse the name of every model but the one that the memory is planned for.

        Raises:
            ConfigError: it is another one.
        """
        self._check_key(self.process_model_name(name))

    def _check_key(self, key: str) -> None:
        ours = self._key()
        if key != ours:
            got = key.removesuffix("@main") if ours.endswith("@main") else key  # since 5.24 a folder has no revision
            raise ConfigError("this server has another model", expected=self.name, got=got)

    def _key(self) -> str:
        return str(self.process_model_name(self.name))

    def load(self) -> tuple[Any, Any]:
        """Return the model and its processor; load them if they are not loaded."""
        model, processor = self.load_model_and_processor(self._key())
        return model, processor

    def loaded(self) -> tuple[Any, Any] | None:
        """Return the model and its processor if they are loaded."""
        entry = self.loaded_models.get(self._key())
        model, processor = getattr(entry, "model", None), getattr(entry, "processor", None)  # unloading deletes them first
        return None if model is None or processor is None else (model, processor)

    def chat_template(self) -> str | None:
        """Return the chat template in use."""
        found: str | None = self.load()[1].chat_template
        return found

    def get_quantization_config(self) -> FlashOffloadConfig:
        """Return a config that names nothing: arguments come from `hf_flash.configure` and from the model."""
        return FlashOffloadConfig()

    def load_model_and_processor(
        self, model_id_and_revision: str, *args: Any, gguf_file: str | None = None, **kwargs: Any
    ) -> Any:
        """Refuse other models; set the chat template."""
        self._check_key(model_id_and_revision if gguf_file is None else f"{model_id_and_revision}:{gguf_file}")
        model, processor = super().load_model_and_processor(model_id_and_revision, *args, **kwargs)
        if self._chat_template is not None:
            processor.chat_template = self._chat_template
        return model, processor

    def list_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        """List the one model. transformers 5.23 lists the Hub cache, from which this server would load nothing."""
        return [{"id": self.name, "object": "model", "created": 0, "owned_by": "hf_flash"}]

    get_gen_models = list_models

    def shutdown(self) -> None:
        """Unload the model once no answer uses it: two do not fit into the memory of one."""
        if self.drain is not None:
            self.drain()
        with self._model_locks[self._key()]:  # nobody gets a model without a processor
            super().shutdown()


# --- answers -------------------------------------------------------------------------------------------------------------


class Generations(GenerationState):
    """Gives every request a generation manager that respects the model's context and ends when `stop` is set.

    Args:
        batching: generate answers together with this KV cache; `None`: one after the other.
    """

    def __init__(self, batching: ContinuousBatchingConfig | None) -> None:
        super().__init__(continuous_batching=batching is not None, cb_config=batching)
        self.stop = threading.Event()

    def get_manager(self, model_id: str, use_cb: bool = False) -> Any:
        """Wrap the manager for the request under way."""
        return _BoundedManager(super().get_manager(model_id, use_cb=use_cb), self.stop)

    def shutdown(self) -> None:
        """Stop continuous batching. Once `stop` is set its answers fail, instead of being finished first."""
        manager: Any = self._cb_manager  # type: ignore[has-type]
        if manager is None or manager._cb is None or not self.stop.is_set():
            super().shutdown()
            return
        self._cb_manager = None
        manager._cb.stop(block=True, timeout=_STOP_S, hard_stop=True)

    def drain(self) -> None:
        """Return when no answer is under way. The clients of those that wait have left."""
        self.shutdown()  # of continuous batching, which holds a model
        for manager in list(self._generate_managers.values()):
            manager.submit(int).result(_DRAIN_S)


class _ClientLeft(Exception):
    """The client of a request is gone."""


class _BoundedManager:
    """A generation manager of transformers for one request, which is never asked for positions that the model does not have.

    Its answer ends when the client leaves. When the server is told to stop, the request fails, so that no client takes what was
    generated so far for the whole answer.
    """

    def __init__(self, manager: Any, stop: threading.Event) -> None:
        self._manager = manager
        self._batched = not isinstance(manager, GenerateManager)
        self._stop, self._gone = stop, gone.get()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *args: Any, request_id: str, **kwargs: Any
    ) -> tuple[Any, Any]:
        self._bound(model, inputs, gen_config)
        queue, streamer = self._manager.generate_streaming(
            self._watched(model), processor, inputs, gen_config, *args, request_id=_unique(request_id), **kwargs
        )
        return queue, streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *args: Any, request_id: str, **kwargs: Any
    ) -> Any:
        self._bound(model, inputs, gen_config)
        name = _unique(request_id)
        answer = asyncio.ensure_future(self._manager.generate_non_streaming(
            self._watched(model), processor, inputs, gen_config, *args, request_id=name, **kwargs
        ))  # fmt: skip
        try:
            if self._batched:
                await self._wait_or_cancel(answer, name)
            return await answer
        except _ClientLeft as error:
            raise HTTPException(499, "the client left") from error

    def _bound(self, model: Any, inputs: Any, gen_config: Any) -> None:
        """Refuse a prompt that does not fit; cut the answer to what the context leaves, and let it end early."""
        ids, context = inputs["input_ids"], context_length(model)
        one_by_one = not isinstance(ids, list)  # else continuous batching, which takes token ids and nothing else
        length = ids.shape[-1] if one_by_one else len(ids)
        if length == 0:
            raise ConfigError("the prompt is empty", expected="at least one token")
        check_length(length, context)
        gen_config.max_new_tokens = min(gen_config.max_new_tokens or context, context - length)
        if one_by_one:
            inputs["stopping_criteria"] = StoppingCriteriaList([self._stop_tokens])

    def _stop_tokens(self, ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(ids),), self._must_end(), dtype=torch.bool, device="cpu")

    def _must_end(self) -> bool:
        """Whether the client is gone. Raises `UsageError`: the server stops."""
        if self._stop.is_set():
            raise UsageError("the server is stopping, and this answer is not whole", hint="ask again when it is back")
        return self._gone is not None and self._gone.is_set()

    def _watched(self, model: Any) -> Any:
        return model if self._batched else _WatchedModel(model, self._must_end)

    async def _wait_or_cancel(self, answer: asyncio.Future[Any], request_id: str) -> None:
        """Wait for an answer of continuous batching, and cancel it when the client leaves or the server stops."""
        try:
            while not answer.done():
                await asyncio.wait([answer], timeout=_LOOK_S)
                if self._must_end() and not answer.done():
                    raise _ClientLeft
        except (UsageError, _ClientLeft):
            answer.cancel()
            self._manager._cb.cancel_request(request_id)
            raise


class _WatchedModel:
    """A model that begins no answer for a client that is gone.

    The text of an error in a stream is escaped: transformers puts it between quotes of JSON as it is.
    """

    def __init__(self, model: Any, must_end: Callable[[], bool]) -> None:
        self._model, self._must_end = model, must_end

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, **kwargs: Any) -> Any:
        try:
            if self._must_end():
                raise _ClientLeft
            return self._model.generate(**kwargs)
        except (_GenerationCancelled, _ClientLeft):
            raise
        except Exception as error:
            if "streamer" not in kwargs:
                raise
            logger.error("hf_flash: %s", error)
            raise RuntimeError(json.dumps(str(error))[1:-1]) from error


def _unique(request_id: str) -> str:
    """Make a name that no other request has: clients choose theirs, and continuous batching keeps answers by them."""
    return f"{request_id}-{uuid.uuid4().hex[:12]}"
