"""The parts of transformers that are no public interface and that hf_flash stands on, each tested by its name; two of the Hub.

A release of transformers that changes one of them fails here first, and the name of the test says which one it is.
"""

from __future__ import annotations

import ast
import asyncio
import copy
import gc
import inspect
import json
import re
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from fastapi import FastAPI
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import httpx
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    ContinuousBatchingConfig,
    GenerationConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    pipeline,
)
from transformers.cli.serving import chat_completion, completion, model_manager, response, server, systemone, utils
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.quantizers import HfQuantizer
from transformers.utils import chat_template_utils

import hf_flash
from hf_flash import FlashOffloadConfig, UnsupportedModelError, loading
from hf_flash.families.decoder import decoder_layers, decoder_of
from hf_flash.families.opt import OPT
from hf_flash.families.quantized import dequantizer, has_numbers, is_dequantizing, name_of_scales
from hf_flash.hub import saving
from hf_flash.quantizer import FlashHfQuantizer
from hf_flash.runtime.attention import _UNKNOWN
from hf_flash.runtime.devices import METHODS
from hf_flash.runtime.model_class import add_methods, stock_class, stock_methods
from hf_flash.runtime.transformers_model import (
    first_layer_call,
    has_adapter,
    hidden_of,
    ignore_on_load,
    loaded_dtypes,
    plain_state,
    run_layer,
    sequence_length,
    tied_names,
)
from hf_flash.serving import fields, transformers_serving
from hf_flash.serving.transformers_serving import Generations, OneModel
from tests.conftest import ROOT, TINY_OPT
from tests.quantized import from_fp8, to_fp8

PACKAGE = Path(hf_flash.__file__).parent

# --- serving: hf_flash/serving/transformers_serving.py -------------------------------------------------------------------

IMPORTED = {
    "build_server", "ChatCompletionHandler", "CompletionHandler", "ResponseHandler", "SystemOneHandler", "ModelManager",
    "GenerationState", "GenerateManager", "_GenerationCancelled", "split_model_id",
}  # fmt: skip
USED = {
    "transcription_handler", "get_quantization_config", "load_model_and_processor", "list_models", "get_gen_models", "shutdown",
    "force_model", "process_model_name", "loaded_models", "_model_locks", "get_manager", "_generate_managers", "submit",
    "generate_streaming", "generate_non_streaming", "_cb.cancel_request", "streamer", "TEMPLATE_NAMES",
}  # fmt: skip
"""Methods, attributes and arguments. Each is in the list of the module, and in a test below."""

Manager, Sequential, Batched = model_manager.ModelManager, utils.GenerateManager, utils.CBGenerateManager
Bounded = transformers_serving._BoundedManager
HANDLERS = {
    "/v1/chat/completions": chat_completion.ChatCompletionHandler,
    "/v1/completions": completion.CompletionHandler,
    "/v1/responses": response.ResponseHandler,
}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "stream": False},
    "/v1/completions": {"prompt": "x", "stream": False},
    "/v1/responses": {"input": "x", "stream": False},
}


def imported_from_the_private_server(path: Path) -> set[str]:
    return {
        alias.name
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers.cli")
        for alias in node.names
    }


def test_one_module_alone_imports_the_private_server() -> None:
    found = {path.relative_to(PACKAGE).as_posix(): imported_from_the_private_server(path) for path in PACKAGE.rglob("*.py")}
    assert {path: names for path, names in found.items() if names} == {"serving/transformers_serving.py": IMPORTED}


def test_the_module_lists_all_that_it_uses_of_the_private_server() -> None:
    text = transformers_serving.__doc__ or ""
    assert [name for name in IMPORTED | USED if name not in text] == []


# names and arguments


def takes(function: Callable[..., Any], args: list[str], kwargs: list[str]) -> bool:
    try:
        inspect.signature(function).bind(*args, **dict.fromkeys(kwargs))
    except TypeError:
        return False
    return True


GENERATE = (["self", "model", "processor", "inputs", "gen_config"], ["request_id"])
CALLS: dict[str, tuple[Callable[..., Any], list[str], list[str]]] = {
    "build_server": (server.build_server, ["models", "chat"], [
        "completion_handler", "response_handler", "transcription_handler", "systemone_handler", "generation_state",
        "enable_cors",
    ]),
    "ChatCompletionHandler": (chat_completion.ChatCompletionHandler, ["models", "state"], []),
    "CompletionHandler": (completion.CompletionHandler, ["models", "state"], []),
    "ResponseHandler": (response.ResponseHandler, ["models", "state"], []),
    "SystemOneHandler": (systemone.SystemOneHandler, [], ["model_manager", "generation_state"]),
    "ModelManager": (Manager, [], ["device", "dtype", "attn_implementation", "continuous_batching", "force_model"]),
    "ModelManager.load_model_and_processor": (Manager.load_model_and_processor, ["self", "key"], []),
    "ModelManager.process_model_name": (Manager.process_model_name, ["name"], []),
    "ModelManager.shutdown": (Manager.shutdown, ["self"], []),
    "GenerationState": (utils.GenerationState, [], ["continuous_batching", "cb_config"]),
    "GenerationState.get_manager": (utils.GenerationState.get_manager, ["self", "key"], ["use_cb"]),
    "GenerationState.shutdown": (utils.GenerationState.shutdown, ["self"], []),
    "GenerateManager.generate_streaming": (Sequential.generate_streaming, *GENERATE),
    "GenerateManager.generate_non_streaming": (Sequential.generate_non_streaming, *GENERATE),
    "GenerateManager.submit": (Sequential.submit, ["self", "function"], []),
    "CBGenerateManager.generate_streaming": (Batched.generate_streaming, *GENERATE),
    "CBGenerateManager.generate_non_streaming": (Batched.generate_non_streaming, *GENERATE),
    "ContinuousBatchingManager.cancel_request": (ContinuousBatchingManager.cancel_request, ["self", "request_id"], []),
    "ContinuousBatchingConfig": (ContinuousBatchingConfig, [], ["page_size", "num_blocks", "max_batch_tokens"]),
    "split_model_id": (utils.split_model_id, ["name"], []),
}  # fmt: skip
"""What we call, with what we give by position and by name."""


@pytest.mark.parametrize("name", CALLS)
def test_it_takes_the_arguments_that_we_give(name: str) -> None:
    assert takes(*CALLS[name])


OVERRIDES: dict[str, tuple[Callable[..., Any], Callable[..., Any], int]] = {
    "ModelManager.get_quantization_config": (OneModel.get_quantization_config, Manager.get_quantization_config, 1),
    "ModelManager.load_model_and_processor": (OneModel.load_model_and_processor, Manager.load_model_and_processor, 2),
    "ModelManager.shutdown": (OneModel.shutdown, Manager.shutdown, 1),
    "GenerationState.get_manager": (Generations.get_manager, utils.GenerationState.get_manager, 2),
    "GenerateManager.generate_streaming": (Bounded.generate_streaming, Sequential.generate_streaming, 5),
    "GenerateManager.generate_non_streaming": (Bounded.generate_non_streaming, Sequential.generate_non_streaming, 5),
    "CBGenerateManager.generate_streaming": (Bounded.generate_streaming, Batched.generate_streaming, 5),
    "CBGenerateManager.generate_non_streaming": (Bounded.generate_non_streaming, Batched.generate_non_streaming, 5),
}
"""Ours, theirs, and how many arguments transformers gives by position; it gives the others by name."""


@pytest.mark.parametrize("name", OVERRIDES)
def test_ours_takes_every_argument_of_what_it_stands_for(name: str) -> None:
    ours, theirs, count = OVERRIDES[name]
    parameters = list(inspect.signature(theirs).parameters)
    assert takes(ours, parameters[:count], parameters[count:])


def test_list_models_or_get_gen_models_is_there_to_be_replaced() -> None:
    (name,) = {"list_models", "get_gen_models"} & set(dir(Manager))
    theirs = inspect.signature(getattr(Manager, name)).parameters
    assert takes(getattr(OneModel, name), ["self"], [parameter for parameter in theirs if parameter != "self"])


@pytest.mark.parametrize(("name", "is_gguf"), [
    ("org/model", False), ("org/model@dev", False), ("folder/model:7b", False), ("org/model:weights.gguf", True),
    ("org/model@dev:weights.gguf", True),
])  # fmt: skip
def test_split_model_id_finds_a_gguf_file(name: str, is_gguf: bool) -> None:
    assert (utils.split_model_id(name)[1] is not None) == is_gguf


def test_a_page_of_the_kv_cache_is_as_long_as_ours() -> None:
    assert ContinuousBatchingConfig().page_size == 256


# build_server


class Recorder:
    """Stands for a handler, the models or the state: records what is called."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    async def handle_request(self, *args: Any) -> dict[str, Any]:
        self.calls.append(args)
        return {"answered": True}

    def shutdown(self) -> None:
        self.calls.append(("shutdown",))

    def list_models(self) -> list[dict[str, Any]]:
        return [{"id": "the model"}]

    get_gen_models = list_models

    def is_cb_alive(self) -> bool:
        return "dead" not in str(self.calls)


ROLES = ["models", "chat", "completion", "response", "transcription", "systemone", "state"]


@pytest.fixture
def built() -> tuple[FastAPI, dict[str, Recorder]]:
    made = {role: Recorder() for role in ROLES}
    return server.build_server(*made.values()), made


async def call(app: FastAPI, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    """The status and the JSON of an answer."""
    sent: list[Any] = []
    parts: list[dict[str, Any]] = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> dict[str, Any]:
        return parts.pop() if parts else await asyncio.Future()

    async def send(message: Any) -> None:
        sent.append(message)

    rows = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    await app(
        {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http", "path": path,
            "raw_path": path.encode(), "root_path": "", "query_string": b"", "server": ("here", 80), "client": ("there", 1),
            "headers": [(b"content-type", b"application/json"), *rows],
        },
        receive,
        send,
    )  # fmt: skip
    return sent[0]["status"], json.loads(b"".join(message.get("body", b"") for message in sent[1:]))


def test_build_server_has_no_route_with_a_body_that_our_gate_does_not_check(built: tuple[FastAPI, Any]) -> None:
    posted = {route.path for route in built[0].routes if "POST" in (getattr(route, "methods", None) or ())}
    assert posted == {*fields.ROUTES, "/reset", "/v1/audio/transcriptions"}


@pytest.mark.parametrize(("path", "role"), [
    ("/v1/chat/completions", "chat"), ("/v1/completions", "completion"), ("/v1/responses", "response"),
    ("/v1/systemone", "systemone"),
])  # fmt: skip
def test_build_server_gives_a_handler_the_body_and_the_clients_name_of_the_request(
    built: tuple[FastAPI, dict[str, Recorder]], path: str, role: str
) -> None:
    assert asyncio.run(call(built[0], "POST", path, {"some": "field"}, x_request_id="mine")) == (200, {"answered": True})
    assert built[1][role].calls == [({"some": "field"}, "mine")]


def test_build_server_gives_transcription_handler_the_request(built: tuple[FastAPI, dict[str, Recorder]]) -> None:
    asyncio.run(call(built[0], "POST", "/v1/audio/transcriptions"))
    ((request,),) = built[1]["transcription"].calls
    assert request.url.path == "/v1/audio/transcriptions"


def test_build_server_unloads_by_shutdown_on_reset_and_at_the_end(built: tuple[FastAPI, dict[str, Recorder]]) -> None:
    app, made = built

    async def live() -> None:
        async with app.router.lifespan_context(app):
            assert made["models"].calls == []

    assert asyncio.run(call(app, "POST", "/reset"))[0] == 200
    assert made["models"].calls == [("shutdown",)]
    made["models"].calls.clear()
    asyncio.run(live())
    assert made["models"].calls == [("shutdown",)]


def test_build_server_lists_models_by_list_models_or_get_gen_models(built: tuple[FastAPI, dict[str, Recorder]]) -> None:
    assert asyncio.run(call(built[0], "GET", "/v1/models"))[1]["data"] == [{"id": "the model"}]


def test_build_server_asks_the_state_for_its_health(built: tuple[FastAPI, dict[str, Recorder]]) -> None:
    assert asyncio.run(call(built[0], "GET", "/health"))[0] == 200
    built[1]["state"].calls.append(("dead",))
    assert asyncio.run(call(built[0], "GET", "/health"))[0] == 503


# ModelManager


class Recording(Manager):
    """Overrides what `OneModel` does, and records."""

    def __init__(self) -> None:
        self.seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        super().__init__(device="cpu", dtype="float32", force_model=str(TINY_OPT))

    def get_quantization_config(self) -> FlashOffloadConfig:
        return FlashOffloadConfig(window=3)

    def load_model_and_processor(self, *args: Any, **kwargs: Any) -> Any:
        self.seen.append((args, kwargs))
        return super().load_model_and_processor(*args, **kwargs)


@pytest.fixture
def manager() -> Iterator[Recording]:
    found = Recording()
    yield found
    found.shutdown()


def test_model_manager_loads_force_model_at_once_by_load_model_and_processor(manager: Recording) -> None:
    assert manager.force_model == str(TINY_OPT)
    assert manager.seen == [((manager.process_model_name(str(TINY_OPT)),), {"gguf_file": None})]


def test_model_manager_gives_get_quantization_config_to_the_model(manager: Recording) -> None:
    assert hf_flash.stats(manager.load_model_and_processor(manager.process_model_name(str(TINY_OPT)))[0]).window == 3


def test_loaded_models_has_model_and_processor_under_process_model_name_until_shutdown(manager: Recording) -> None:
    ((key, entry),) = manager.loaded_models.items()
    assert key == manager.process_model_name(str(TINY_OPT))
    assert (entry.model, entry.processor) == manager.load_model_and_processor(key)
    assert entry.timeout_seconds == -1  # it is never unloaded for being idle
    manager.shutdown()
    assert manager.loaded_models == {}


def test_model_locks_has_the_lock_of_the_model_that_loading_waits_for(manager: Recording) -> None:
    key = manager.process_model_name(str(TINY_OPT))
    thread = threading.Thread(target=manager.load_model_and_processor, args=(key,))
    with manager._model_locks[key]:
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
    thread.join(60)
    assert not thread.is_alive()


def test_names_that_we_add_are_not_those_of_transformers(manager: Recording) -> None:
    overrides = {"get_quantization_config", "load_model_and_processor", "list_models", "get_gen_models", "shutdown"}
    added = {name for name in vars(OneModel) if not name.startswith("__")} | {"_chat_template", "drain"}
    assert (added - overrides) & set(dir(manager)) == set()
    assert {"stop", "drain"} & set(dir(utils.GenerationState())) == set()


# GenerationState


def test_get_manager_keeps_one_in_generate_managers_for_each_model() -> None:
    state = utils.GenerationState()
    found = state.get_manager("m@main", use_cb=False)
    assert type(found) is Sequential
    assert state._generate_managers == {"m@main": found}
    assert state.get_manager("m@main") is found


def test_get_manager_gives_another_for_batching_after_shutdown() -> None:
    state = utils.GenerationState(continuous_batching=True, cb_config=ContinuousBatchingConfig())
    found = state.get_manager("m@main", use_cb=True)
    assert type(found) is Batched
    assert not isinstance(found, Sequential)
    assert found._cb is None  # until the first request
    state.shutdown()
    assert state.get_manager("m@main", use_cb=True) is not found
    assert state._generate_managers == {}


# handlers


class Model:
    """Records what it is asked to generate, and generates what it is told to."""

    config = SimpleNamespace(model_type="opt")
    generation_config = GenerationConfig()
    device = "cpu"

    def __init__(self, work: Callable[[dict[str, Any]], Any] = lambda asked: torch.cat([asked["input_ids"]] * 2, 1)) -> None:
        self.asked: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._work = work

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        self.asked.append((args, kwargs))
        return self._work(kwargs)


@pytest.fixture(scope="module")
def chatting() -> Any:
    """A tokenizer with a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_OPT)
    tokenizer.chat_template = (ROOT / "examples" / "chat_template.jinja").read_text()
    return tokenizer


def handle(path: str, model: Any, tokenizer: Any, state: Any, **settings: Any) -> Any:
    """The answer of a handler, or all text of a stream."""
    models = SimpleNamespace(
        force_model="m",
        process_model_name=Manager.process_model_name,
        load_model_and_processor=lambda key, gguf_file=None: (model, tokenizer),
        get_model_modality=lambda model, processor=None: utils.Modality.LLM,
    )

    async def run() -> Any:
        found = await HANDLERS[path](models, state).handle_request(BODIES[path] | settings, "mine")
        if not hasattr(found, "body_iterator"):
            return json.loads(found.body)
        return "".join([part async for part in found.body_iterator])

    return asyncio.run(run())


class RecordingState(utils.GenerationState):
    """Gives managers that record the arguments that they get."""

    def __init__(self, batched: bool) -> None:
        super().__init__(continuous_batching=batched)
        self.batched, self.seen = batched, list[tuple[tuple[Any, ...], dict[str, Any]]]()

    def use_continuous_batching(self, model: Any, modality: Any) -> bool:
        return self.batched

    def get_manager(self, *args: Any, **kwargs: Any) -> Any:
        assert (args, kwargs) == (("m@main",), {"use_cb": self.batched})
        return SimpleNamespace(generate_non_streaming=self.generate_non_streaming, init_cb=lambda model, gen_config: None)

    async def generate_non_streaming(self, *args: Any, **kwargs: Any) -> tuple[str, int, list[int]]:
        self.seen.append((args, kwargs))
        return "said", 1, [7]


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("path", HANDLERS)
def test_a_handler_asks_for_an_answer_as_our_manager_expects_it(path: str, batched: bool, chatting: Any) -> None:
    state, model = RecordingState(batched), Model()
    assert "said" in str(handle(path, model, chatting, state))
    (((given, processor, inputs, config), named),) = state.seen
    assert (given, processor, named) == (model, chatting, {"request_id": named["request_id"]})
    assert isinstance(inputs["input_ids"], list if batched else torch.Tensor)
    assert isinstance(inputs["input_ids"][0], int) if batched else inputs["input_ids"].ndim == 2
    inputs["stopping_criteria"] = []
    assert isinstance(config, GenerationConfig)
    assert config.max_new_tokens


@pytest.mark.parametrize(("path", "refused"), [
    ("/v1/chat/completions", {"best_of"}), ("/v1/completions", set()), ("/v1/responses", {"chat_template_kwargs"}),
])  # fmt: skip
def test_a_handler_accepts_the_fields_that_we_let_through(path: str, refused: set[str]) -> None:
    """Those in `refused` it refuses by name, whatever they hold."""
    needed, also = fields.ROUTES[path]
    assert {*needed, *also} - HANDLERS[path]._valid_params_class.__mutable_keys__ == refused


@pytest.mark.parametrize("path", HANDLERS)
def test_a_handler_reads_no_field_that_we_do_not_check(path: str) -> None:
    text = inspect.getsource(inspect.getmodule(HANDLERS[path])) + inspect.getsource(utils.BaseHandler)  # type: ignore[arg-type]
    read = set(re.findall(r"""\bbody(?:\.get\(|\.pop\(|\[)['"](\w+)['"]""", text))
    assert len(read) > 5
    needed, also = fields.ROUTES[path]
    assert read - {*needed, *also} == set()


def test_from_model_config_and_the_other_fields_of_a_generation_config_are_what_the_chat_client_sends() -> None:
    """`_from_model_config` is private and is sent all the same, as it is a part of the JSON that `transformers chat` sends."""
    sent = GenerationConfig().to_dict()
    assert "_from_model_config" in sent
    assert set(fields.GENERATION) - sent.keys() == set()


def test_system_one_takes_the_fields_that_we_check() -> None:
    needed, also = fields.ROUTES["/v1/systemone"]
    assert {*needed, *also} == set(systemone.SystemOneRequest.model_fields)


@pytest.mark.parametrize(("path", "as_it_is"), [
    ("/v1/chat/completions", True), ("/v1/completions", True), ("/v1/responses", False),
])  # fmt: skip
def test_the_text_of_an_error_in_a_stream_is_not_escaped(path: str, as_it_is: bool, chatting: Any) -> None:
    """If this fails for the first two, `_WatchedModel` must not escape it any more."""

    def fail(asked: Any) -> Any:
        raise RuntimeError('a "reason"')

    text = handle(path, Model(fail), chatting, utils.GenerationState(), stream=True)
    assert ('{"error": "a "reason""}' in text) == as_it_is
    assert as_it_is or r"a \"reason\"" in text


# TEMPLATE_NAMES


def names_given(function: str, module: Any) -> set[str]:
    """The keywords of all calls of a function or method in a module."""
    return {
        keyword.arg
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == function
        for keyword in node.keywords
        if keyword.arg
    }


def test_template_names_are_all_that_transformers_gives_to_a_chat_template() -> None:
    given = {name for module in (chat_completion, response) for name in names_given("apply_chat_template", module)}
    given |= names_given("render", chat_template_utils)
    assert {"messages", "tools"} <= given
    for kind in (PreTrainedTokenizerBase, ProcessorMixin):
        assert given - {*inspect.signature(kind.apply_chat_template).parameters, *transformers_serving.TEMPLATE_NAMES} == set()


# generation managers


def ask(work: Callable[..., Any], model: Model, tokenizer: Any, **inputs: Any) -> Any:
    ids = torch.tensor([[3, 4]])
    return work(model, tokenizer, {"input_ids": ids, **inputs}, GenerationConfig(), request_id="mine")


def test_generate_non_streaming_gives_all_inputs_to_generate_by_name(chatting: Any) -> None:
    model = Model()

    async def run() -> Any:
        return await ask(Sequential().generate_non_streaming, model, chatting, stopping_criteria=["ours"])

    text, length, ids = asyncio.run(run())
    assert (length, ids.tolist(), text) == (2, [3, 4], chatting.decode([3, 4], skip_special_tokens=True))
    ((args, kwargs),) = model.asked
    assert args == ()
    assert kwargs["stopping_criteria"] == ["ours"]
    assert "streamer" not in kwargs


def test_generate_streaming_gives_all_inputs_and_a_streamer_to_generate_by_name(chatting: Any) -> None:
    model = Model(lambda asked: asked["streamer"].end())

    async def run() -> Any:
        queue, streamer = ask(Sequential().generate_streaming, model, chatting, stopping_criteria=["ours"])
        assert await asyncio.wait_for(queue.get(), 30) is None
        return streamer

    streamer = asyncio.run(run())
    ((args, kwargs),) = model.asked
    assert args == ()
    assert (kwargs["stopping_criteria"], kwargs["streamer"]) == (["ours"], streamer)


def test_generation_cancelled_ends_a_stream_without_an_error(chatting: Any) -> None:
    raised: list[BaseException] = []

    def work(asked: dict[str, Any]) -> None:
        begun.set()
        try:
            while True:
                asked["streamer"].put(torch.tensor([3]))
        except Exception as error:
            raised.append(error)
            raise

    async def run() -> list[Any]:
        queue, streamer = ask(Sequential().generate_streaming, Model(work), chatting)
        await asyncio.to_thread(begun.wait, 30)
        streamer.cancel()
        items = [await asyncio.wait_for(queue.get(), 30)]
        while items[-1] is not None:
            items.append(await asyncio.wait_for(queue.get(), 30))
        return items

    begun = threading.Event()
    assert all(isinstance(item, str) for item in asyncio.run(run())[:-1])
    assert [type(error) for error in raised] == [utils._GenerationCancelled]
    assert issubclass(utils._GenerationCancelled, Exception)


def test_submit_runs_after_what_waits(chatting: Any) -> None:
    going, done = threading.Event(), list[int]()
    manager = Sequential()
    first = manager.submit(lambda: going.wait(30) and done.append(1))
    last = manager.submit(lambda: list(done))
    assert not last.done()
    going.set()
    assert last.result(30) == [1]
    assert first.done()


class Batches:
    """Stands for transformers' continuous batching."""

    def __init__(self) -> None:
        self.background_thread_status = SimpleNamespace(fatal_error=None)
        self.calls: list[tuple[Any, ...]] = []
        self.handlers: dict[str, Callable[[Any], None]] = {}

    def start(self) -> None:
        self.calls.append(("start",))

    def register_result_handler(self, request_id: str, handler: Callable[[Any], None]) -> None:
        self.handlers[request_id] = handler

    def add_request(self, input_ids: list[int], request_id: str, **kwargs: Any) -> str:
        self.calls.append((input_ids, request_id, kwargs["max_new_tokens"]))
        self.handlers[request_id](SimpleNamespace(error=None, generated_tokens=[5, 6]))
        return request_id


def test_batched_answers_are_kept_by_the_id_of_the_request_in_cb(chatting: Any) -> None:
    batches, manager = Batches(), Batched(ContinuousBatchingConfig())
    model = SimpleNamespace(init_continuous_batching=lambda generation_config, continuous_batching_config: batches)
    config = GenerationConfig(max_new_tokens=9)
    manager.init_cb(model, config)
    assert manager._cb is batches
    given = manager.generate_non_streaming(model, chatting, {"input_ids": [3, 4]}, config, request_id="mine")
    assert asyncio.run(asyncio.wait_for(given, 30))[1:] == (2, [5, 6])
    assert batches.calls == [("start",), ([3, 4], "mine", 9)]
    assert list(batches.handlers) == ["mine"]


# --- a model: hf_flash/runtime/transformers_model.py ----------------------------------------------------------------------


def test_all_tied_weights_keys_are_the_second_names_of_parameters(opt: Callable[..., Path]) -> None:
    tied = AutoModelForCausalLM.from_pretrained(opt())
    assert tied.all_tied_weights_keys == {"lm_head.weight": "model.decoder.embed_tokens.weight"}
    assert tied_names(tied) == {"lm_head.weight"}
    assert tied.lm_head.weight is tied.model.decoder.embed_tokens.weight
    alone = AutoModelForCausalLM.from_pretrained(opt(tie_word_embeddings=False))
    assert alone.all_tied_weights_keys == {}
    assert tied_names(alone) == set()


def test_hf_peft_config_loaded_says_whether_there_is_an_adapter(opt: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(opt())
    assert model._hf_peft_config_loaded is False
    assert not has_adapter(model)
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="ours")
    assert model._hf_peft_config_loaded is True
    assert has_adapter(model)
    model.delete_adapter("ours")
    assert not has_adapter(model)


def test_load_adapter_reports_unexpected_keys(opt: Callable[..., Path], tmp_path: Path) -> None:
    """runtime/devices.py refuses an adapter by them."""
    model = AutoModelForCausalLM.from_pretrained(opt())
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    save_file(load_file(weights) | {"base_model.model.model.decoder.stray.lora_A.weight": torch.zeros(2, 2)}, weights)
    info = AutoModelForCausalLM.from_pretrained(opt()).load_adapter(str(tmp_path))
    (name,) = info.unexpected_keys
    assert name.startswith("model.decoder.stray.")


def test_keys_to_ignore_on_load_unexpected_are_patterns_of_one_model_that_the_loader_asks_after_the_quantizer(
    opt: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(opt(), tmp_path / "more"))
    more = {f"model.decoder.surprise.{n}": torch.zeros(2) for n in range(2)}
    save_file(load_file(folder / "model.safetensors") | more, folder / "model.safetensors", metadata={"format": "pt"})
    assert OPTForCausalLM._keys_to_ignore_on_load_unexpected is None
    assert unexpected_keys(folder) == set(more)
    before = loading.prepare

    def prepare(model: Any, *args: Any, **kwargs: Any) -> Any:
        ignore_on_load(model, [r"\.surprise\.1$"])
        return before(model, *args, **kwargs)

    monkeypatch.setattr(loading, "prepare", prepare)
    assert unexpected_keys(folder, quantization_config=FlashOffloadConfig()) == {"model.decoder.surprise.0"}
    assert OPTForCausalLM._keys_to_ignore_on_load_unexpected is None


def unexpected_keys(folder: Path, **arguments: Any) -> set[str]:
    """The tensors of a checkpoint that the loader says it has no place for."""
    found: set[str] = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **arguments)[1]["unexpected_keys"]
    return found


@pytest.fixture(scope="module", params=["pre_ln", "post_ln"])
def stock(request: pytest.FixtureRequest, opt: Callable[..., Path]) -> Any:
    """Stock transformers' model, to be left as it is."""
    return AutoModelForCausalLM.from_pretrained(opt(request.param)).eval()


WINDOWS = torch.tensor([[2, 11, 7, 30, 45, 7], [2, 9, 9, 80, 4, 3]])


def layer_calls(model: Any) -> list[tuple[tuple[Any, ...], dict[str, Any], Any]]:
    """How one forward calls each decoder layer, and what the layer returns."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []
    handles = [
        layer.register_forward_hook(lambda layer, args, kwargs, out: calls.append((args, kwargs, out)), with_kwargs=True)
        for layer in decoder_layers(model, OPT)
    ]
    with torch.no_grad():
        model(WINDOWS, use_cache=False)
    for handle in handles:
        handle.remove()
    return calls


def test_get_decoder_has_all_decoder_layers_in_layers(stock: Any) -> None:
    assert isinstance(decoder_layers(stock, OPT), torch.nn.ModuleList)
    assert len(decoder_layers(stock, OPT)) == stock.config.num_hidden_layers == len(layer_calls(stock))


@pytest.mark.parametrize("given", ["input_ids", "inputs_embeds"])
def test_a_decoder_is_told_the_tokens_or_their_embeddings(stock: Any, given: str) -> None:
    seen: list[int] = []

    def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(sequence_length(args, kwargs))

    handle = decoder_of(stock).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with torch.no_grad():
            stock(**{given: WINDOWS if given == "input_ids" else stock.get_input_embeddings()(WINDOWS)})
            stock.generate(WINDOWS, attention_mask=torch.ones_like(WINDOWS), max_new_tokens=2, min_new_tokens=2)
            decoder_of(stock)(WINDOWS)
    finally:
        handle.remove()
    length = WINDOWS.shape[1]
    assert seen == [length, length, 1, length]


def test_a_decoder_layer_is_given_hidden_states_and_all_else_by_name(stock: Any) -> None:
    for args, kwargs, _ in layer_calls(stock):
        assert len(args) + ("hidden_states" in kwargs) == 1
        assert hidden_of(args, kwargs).shape == (2, 6, stock.config.hidden_size)


def test_every_decoder_layer_is_given_what_the_first_is(stock: Any) -> None:
    first, *others = (
        {name: value for name, value in kwargs.items() if name != "hidden_states"} for _, kwargs, _ in layer_calls(stock)
    )
    for other in others:
        assert other.keys() == first.keys()
        assert all(
            torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value is other[name]
            for name, value in first.items()
        )


def test_a_decoder_layer_returns_hidden_states_alone_or_first_in_a_tuple(stock: Any) -> None:
    for *_, out in layer_calls(stock):
        assert (out[0] if isinstance(out, tuple) else out).shape == (2, 6, stock.config.hidden_size)


def test_running_the_decoder_layers_one_by_one_is_running_the_model(stock: Any) -> None:
    *_, (*_, out) = layer_calls(stock)
    with torch.no_grad():
        hidden, arguments = first_layer_call(stock, decoder_layers(stock, OPT)[0], WINDOWS)
        for layer in decoder_layers(stock, OPT):
            hidden = run_layer(layer, hidden, arguments)
    assert torch.equal(hidden, out[0] if isinstance(out, tuple) else out)


def test_the_forward_ends_at_the_door_of_the_first_decoder_layer(stock: Any) -> None:
    ran: list[Any] = []
    handles = [
        module.register_forward_hook(lambda module, *_: ran.append(module))
        for layer in decoder_layers(stock, OPT)
        for module in layer.modules()
    ]
    first_layer_call(stock, decoder_layers(stock, OPT)[0], WINDOWS)
    for handle in handles:
        handle.remove()
    assert ran == []
    assert not decoder_layers(stock, OPT)[0]._forward_pre_hooks


def test_another_way_of_calling_decoder_layers_is_refused() -> None:
    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.Identity()])

        def forward(self, ids: torch.Tensor, use_cache: bool) -> Any:
            return self.layers[0](ids, ids)

    model = Decoder()
    with pytest.raises(UnsupportedModelError, match="decoder layers are called in a way") as caught:
        first_layer_call(model, model.layers[0], WINDOWS)
    assert "2 positional arguments" in str(caught.value)


# --- loading: hf_flash/quantizer.py ---------------------------------------------------------------------------------------

HOOKS = {  # how transformers calls each: by position, by name
    "_process_model_before_weight_loading": (1, {"dtype", "device_map", "checkpoint_files", "use_kernels"}),
    "_process_model_after_weight_loading": (1, set[str]()),
    "_dequantize": (1, {"dtype"}),
    "validate_environment": (0, {"device_map"}),
    "update_device_map": (1, set[str]()),
    "is_serializable": (0, set[str]()),
}


@pytest.mark.parametrize("name", HOOKS)
def test_the_quantizer_has_the_methods_that_ours_override(name: str) -> None:
    count, named = HOOKS[name]
    for kind in (HfQuantizer, FlashHfQuantizer):
        arguments = ["self", *("argument" for _ in range(count))]
        assert takes(getattr(kind, name), arguments, sorted(named) if kind is FlashHfQuantizer else [])
    assert {"is_trainable", "is_compileable"} <= set(vars(HfQuantizer))


def test_process_model_before_weight_loading_gets_a_model_on_meta_and_checkpoint_files_and_after_gets_it_loaded(
    opt: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    before, after = loading.prepare, loading.finish

    def prepare(model: Any, config: Any, files: Any, **kwargs: Any) -> Any:
        seen["before"] = {p.device.type for p in model.parameters()}, [Path(file).name for file in files], kwargs
        return before(model, config, files, **kwargs)

    def finish(model: Any, *args: Any) -> None:
        seen["after"] = {p.device.type for p in model.parameters()}
        after(model, *args)

    monkeypatch.setattr(loading, "prepare", prepare)
    monkeypatch.setattr(loading, "finish", finish)
    AutoModelForCausalLM.from_pretrained(opt(), quantization_config=FlashOffloadConfig())
    assert seen == {"before": ({"meta"}, ["model.safetensors"], {"repacked": False, "device": None}), "after": {"cpu"}}


def test_hf_device_map_keeps_a_pipeline_from_moving_a_model(opt: Callable[..., Path]) -> None:
    """runtime/devices.py sets it where there is an accelerator. `device="cpu"` is refused then, as it says."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(opt()), AutoTokenizer.from_pretrained(TINY_OPT)
    pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    model.hf_device_map = {"": "cpu"}
    assert pipeline("text-generation", model=model, tokenizer=tokenizer).device.type == "cpu"
    with pytest.raises(ValueError, match="accelerate"):
        pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")


# --- the Hub's client: hf_flash/packing/readme.py, hf_flash/commands/main.py ------------------------------------------------


def test_regex_yaml_block_finds_the_front_matter_of_a_card() -> None:
    match = REGEX_YAML_BLOCK.search("---\ntags:\n- one\n---\n# A title\n---\n")
    assert match is not None
    assert match[0] == "---\ntags:\n- one\n---\n"
    assert REGEX_YAML_BLOCK.search("# A title\n\ntext\n") is None


def test_utils_has_the_httpx_whose_errors_the_client_raises() -> None:
    assert issubclass(httpx.ConnectError, httpx.HTTPError)
    assert issubclass(HfHubHTTPError, httpx.HTTPError)


# --- one model's class: hf_flash/runtime/model_class.py ----------------------------------------------------------------------

REPLACED = {**METHODS, "save_pretrained": saving.save_pretrained, "push_to_hub": saving.push_to_hub}


def test_a_model_with_methods_of_its_own_is_still_of_the_stock_class(opt: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(opt())
    kind = type(model)
    add_methods(model, {"half": lambda model: "ours"})
    assert isinstance(model, kind)
    assert stock_class(model) is kind
    assert (type(model).__name__, type(model).__module__, type(model).__doc__) == (kind.__name__, kind.__module__, kind.__doc__)
    assert model.half() == "ours"
    assert stock_methods(model).half.__func__ is kind.half
    assert type(AutoModelForCausalLM.from_pretrained(opt())) is kind  # others are as they were


def test_a_model_with_methods_of_its_own_is_freed_at_once(opt: Callable[..., Path]) -> None:
    def freed_at_once(change: Callable[[Any], None]) -> bool:
        model = AutoModelForCausalLM.from_pretrained(opt())
        change(model)
        weight = weakref.ref(model.get_input_embeddings().weight)
        gc.collect()
        gc.disable()
        try:
            del model
            return weight() is None
        finally:
            gc.enable()

    assert freed_at_once(lambda model: None)  # or there is nothing to be compared with
    assert freed_at_once(lambda model: add_methods(model, REPLACED))


@pytest.mark.parametrize("name", [name for name in REPLACED if not name.startswith("__")])
def test_a_method_of_ours_takes_every_named_argument_of_the_one_it_replaces(name: str) -> None:
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    theirs = inspect.signature(getattr(PreTrainedModel, name)).parameters.values()
    arguments = [parameter.name for parameter in theirs if parameter.kind in named]
    assert takes(REPLACED[name], arguments[:1], arguments[1:])
    ours = inspect.signature(REPLACED[name]).parameters
    if name in ("save_pretrained", "push_to_hub"):  # what they do not name goes on to `push`
        saving._check_known(name, {argument: None for argument in arguments[1:] if argument not in ours})


def test_the_stock_class_makes_a_model_from_a_config_alone(opt: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(opt())
    add_methods(model, {})
    with torch.device("meta"):
        made = stock_class(model)(copy.deepcopy(model.config))
    assert made.state_dict().keys() == model.state_dict().keys()


# --- mixtures of experts: families/experts.py, compute/expert_gate.py, runtime/experts.py


@pytest.fixture(scope="module")
def mixture(coverage: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The folder of a small mixture, and the stock model."""
    folder = tmp_path_factory.mktemp("seam") / "mixtral"
    return folder, coverage.stock_model("mixtral", folder)[0]


def test_modules_of_experts_have_apply_gate_and_say_their_layout(mixture: tuple[Path, Any]) -> None:
    """`use_experts_implementation`: families/experts.py finds them by `is_concatenated`."""
    experts = mixture[1].get_submodule("model.layers.0.mlp.experts")
    assert (experts.has_gate, experts.has_bias, experts.is_transposed, experts.is_concatenated) == (True, False, False, True)
    assert experts.has_post_expert_norm is False
    products = torch.randn(3, 2 * experts.down_proj.shape[2])
    gate, up = products.chunk(2, dim=-1)
    torch.testing.assert_close(experts._apply_gate(products), torch.nn.functional.silu(gate) * up)


def test_rename_source_key_and_the_converters_say_what_becomes_of_a_tensor(mixture: tuple[Path, Any]) -> None:
    _, stock = mixture
    mapping = get_model_conversion_mapping(stock)
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    name, pattern = rename_source_key(
        "model.layers.0.block_sparse_moe.experts.3.w1.weight",
        renamings,
        converters,
        stock.base_model_prefix,
        stock.state_dict(),
    )
    assert name == "model.layers.0.mlp.experts.gate_up_proj"
    (converter,) = [entry for entry in converters if pattern in entry.source_patterns]
    assert [type(operation).__name__ for operation in converter.operations] == ["MergeModulelist", "Concatenate"]
    assert sorted(["a.10", "a.9"], key=dot_natural_key) == ["a.9", "a.10"]


def test_is_hf_initialized_keeps_the_loader_from_giving_a_module_random_numbers(mixture: tuple[Path, Any]) -> None:
    stock = copy.deepcopy(mixture[1])
    experts = stock.get_submodule("model.layers.0.mlp.experts")
    for module in stock.modules():
        module._is_hf_initialized = module is experts
    before = experts.down_proj.clone()
    del experts.gate_up_proj  # which `_init_weights` would ask for
    stock.initialize_weights()
    assert torch.equal(experts.down_proj, before)


@pytest.mark.parametrize(("method", "operation", "param"), [
    ("mxfp4", "Mxfp4Dequantize", "gate_up_proj"), ("fp8", "Fp8Dequantize", "weight"),
])  # fmt: skip
def test_quantizers_of_transformers_make_plain_numbers_where_they_are_told_to(method: str, operation: str, param: str) -> None:
    """families/quantized.py: `dequantize`, `hf_quantizer` of an operation, and the names that belong together."""
    found = dequantizer({"quant_method": method})
    assert isinstance(found, HfQuantizer)
    assert found.quantization_config.dequantize
    conversions = [item for item in found.get_weight_conversions() if item._original_target_patterns == [param]]
    assert [type(item).__name__ for item in conversions[0].operations] == [operation]
    assert is_dequantizing(conversions[0].operations[0])
    sources = conversions[0]._original_source_patterns
    assert {name_of_scales(name) for name in sources if has_numbers(name)} <= set(sources)


def test_some_parameters_are_loaded_in_32_bits_whatever_the_others_are(coverage: ModuleType, tmp_path: Path) -> None:
    """runtime/transformers_model.py: `_get_dtype_plan`, `build_glob_alternation`."""
    coverage.stock_model("beam", tmp_path)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        assert loaded_dtypes(stock, dtype) == {name: value.dtype for name, value in stock.named_parameters()}
        assert (set(loaded_dtypes(stock, dtype).values()) == {dtype}) == (dtype == torch.float32)


def test_blocks_that_are_not_whole_are_made_plain() -> None:
    """families/quantized.py: `_dequantize_one`; stock takes blocks of 128 for blocks of 65, or refuses them."""
    numbers, scales = to_fp8(torch.randn(130, 131), (128, 128), torch.float32)
    found = dequantizer({"quant_method": "fp8", "weight_block_size": [128, 128]})
    (conversion,) = found.get_weight_conversions()
    plain = conversion.operations[0].convert({"weight": [numbers], "weight_scale_inv": [scales]})["weight"]
    assert torch.equal(plain, from_fp8(numbers, scales, (128, 128)))
    with pytest.raises(ValueError, match="not divisible"):
        Fp8Dequantize(None).convert({"weight": [numbers], "weight_scale_inv": [scales]})


@pytest.mark.parametrize("kind", [WeightConverter, WeightRenaming])
def test_of_a_conversion_everything_but_dequantizing_is_reverted(kind: Any) -> None:
    """runtime/transformers_model.py: `_original_source_patterns` and the like, `copy`, `_weight_conversions`."""
    stock = WeightConverter(["a.weight", "b.weight"], "c", operations=[Concatenate(dim=0)])
    both = stock.copy(["a.weight", "a.weight_scale_inv", "b.weight", "b.weight_scale_inv"], ["c"],
                      operations=[Fp8Dequantize(None), *stock.operations])  # fmt: skip
    alone = WeightConverter(["weight", "weight_scale_inv"], "weight", operations=[Fp8Dequantize(None)])
    model: Any = torch.nn.Linear(1, 1)
    model.config = None
    model._weight_conversions = [both, alone] if kind is WeightConverter else [WeightRenaming("a", "c")]
    used = list(model._weight_conversions)
    found = plain_state(model, {"c" if kind is WeightConverter else "c.weight": torch.arange(4.0).view(4, 1)})
    assert model._weight_conversions == used
    if kind is WeightRenaming:
        assert [*found] == ["a.weight"]
    else:
        assert {name: value.flatten().tolist() for name, value in found.items()} == {"a.weight": [0, 1], "b.weight": [2, 3]}


def test_revert_weight_conversion_gives_the_names_of_the_checkpoint(mixture: tuple[Path, Any]) -> None:
    folder, stock = mixture
    assert revert_weight_conversion(stock, dict(stock.state_dict())).keys() == load_file(folder / "model.safetensors").keys()


def test_sdpa_attention_forward_takes_nothing_that_is_not_known() -> None:
    """`runtime/attention.py` answers in its place: what it does not know of must not change the result."""
    known = {"module", "query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal"}
    assert set(inspect.signature(sdpa_attention_forward).parameters) <= known | {"kwargs", *_UNKNOWN}
    asked = re.findall(r'kwargs\.get\("(\w+)"', inspect.getsource(sdpa_attention_forward))
    assert set(asked) <= {*_UNKNOWN, "output_attentions"}
    assert AttentionInterface()["sdpa"] is not None
