"""Fixtures: the shipped real model, small random OPTs of every shape the family has, and a flash cache per test run."""

from __future__ import annotations

import gc
import importlib.util
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers.utils.hub
from huggingface_hub import constants
from hypothesis import settings
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM
from transformers.utils import logging as transformers_logging

import hf_flash
from tests.hub_server import TOKEN, Hub, serve

ROOT = Path(__file__).parent.parent
TINY_OPT = ROOT / "examples" / "tiny-opt"

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a job in the background; what tests start would ignore it, too
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.pop("COLUMNS", None)  # of xdist's own terminal: what tests read is not wrapped

SHAPES: dict[str, dict[str, Any]] = {
    "pre_ln": {},
    "post_ln": {"do_layer_norm_before": False, "word_embed_proj_dim": 24},  # as opt-350m
    "no_bias": {"enable_bias": False},
    "odd": {"hidden_size": 36, "word_embed_proj_dim": 36, "ffn_dim": 100, "num_attention_heads": 3},
}


settings.register_profile("tests", deadline=None)  # a busy machine takes its time: no test may depend on it
settings.load_profile("tests")


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No progress bars; the flash cache in a temporary folder that the whole run shares."""
    transformers_logging.disable_progress_bar()
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setenv("HF_FLASH_CACHE", str(tmp_path_factory.getbasetemp() / "flash-cache"))


@pytest.fixture(scope="session")
def tiny_opt() -> Path:
    """The real trained OPT that the repository ships (float16)."""
    return TINY_OPT


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY_OPT)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Compute with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def in_a_fork(check: Callable[[], bool]) -> bool:
    """Whether `check` holds in a forked process; what it raises is printed."""
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(120)
            os._exit(0 if check() else 1)
        finally:
            os.write(2, traceback.format_exc().encode())
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@contextmanager
def interrupting(after_s: float) -> Iterator[None]:
    """A real signal `after_s` seconds from now, whose handler raises `KeyboardInterrupt` wherever the block is by then."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before, callbacks = signal.signal(signal.SIGALRM, interrupt), gc.callbacks[:]
    gc.callbacks.clear()  # of hypothesis: one that is interrupted is a warning, and that a failure
    try:
        signal.setitimer(signal.ITIMER_REAL, after_s)
        yield
    finally:
        signal.signal(signal.SIGALRM, lambda *_: None)  # one that is on its way already, too
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        gc.callbacks[:] = callbacks


def load_script(name: str) -> ModuleType:
    """A program of `scripts/` as a module, which stays in `sys.modules`: dataclasses look it up there."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def slow_but(quick: Iterable[Any], all_of_them: Iterable[Any]) -> list[Any]:
    """Values of a parameter, of which only some are tried in every run; the others are slow tests."""
    kept = set(quick)
    return [value if value in kept else pytest.param(value, marks=pytest.mark.slow) for value in all_of_them]


def make_opt(folder: Path, *, dtype: torch.dtype = torch.float32, shards: str = "1GB", seed: int = 0, **config: Any) -> Path:
    """Save a small OPT with random weights, sparse enough to matter: `fc1.bias` is negative."""
    settings: dict[str, Any] = {
        "vocab_size": 96, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 128, "num_hidden_layers": 3,
        "num_attention_heads": 4, "max_position_embeddings": 64, "dropout": 0.0, "pad_token_id": 1, "bos_token_id": 2,
        "eos_token_id": 2, "init_std": 0.2,
    }  # fmt: skip
    torch.manual_seed(seed)
    model = OPTForCausalLM(OPTConfig(**settings | config))
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            if layer.fc1.bias is not None:
                layer.fc1.bias.normal_(-1.0, 0.5)
                layer.fc2.bias.normal_(0.0, 0.1)
    model.to(dtype).save_pretrained(folder, max_shard_size=shards)
    return folder


@pytest.fixture(scope="session")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`opt("post_ln", dtype=..., shards=...)`: the folder of a small random OPT, made once per run."""
    made: dict[str, Path] = {}

    def get(shape: str = "pre_ln", **kwargs: Any) -> Path:
        key = f"{shape}-{sorted(kwargs.items())!s}"
        if key not in made:
            made[key] = make_opt(tmp_path_factory.mktemp(shape) / "model", **SHAPES[shape], **kwargs)
        return made[key]

    return get


@pytest.fixture(scope="module")
def plain(opt: Callable[..., Path]) -> Path:
    """A small random OPT. Do not write to it."""
    return opt()


@pytest.fixture(scope="module")
def packed(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, repacked, never calibrated. Do not write to it."""
    return hf_flash.repack(plain, tmp_path_factory.mktemp("packed") / "opt-flash")


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve() as hub:
        yield hub
        assert hub.unknown == []


@pytest.fixture
def here(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The Hub, with the client of this process pointed at it."""
    huggingface_hub.close_session()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)  # one for the process: of whichever Hub was asked first
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path.with_name(f"{tmp_path.name}-hub")))
    monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(tmp_path.with_name(f"{tmp_path.name}-harnesses")), raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield hub
    huggingface_hub.close_session()


@pytest.fixture(scope="session")
def coverage() -> Iterator[ModuleType]:
    """`scripts/coverage_of_families.py`, which tries all models of transformers."""
    module = load_script("coverage_of_families")
    yield module
    del sys.modules[module.__name__]
