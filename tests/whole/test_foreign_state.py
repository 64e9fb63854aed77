"""Signals, forks, forbidden system calls, files that others write to: no answer changes, nothing hangs, no process dies."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hf_flash
from hf_flash import FlashOffloadConfig, StoreReadError, UnsupportedModelError
from hf_flash.compute import library as native
from hf_flash.reading.compiled_queue import CompiledQueue
from hf_flash.store.layout import FlashStore
from tests.conftest import ROOT, TINY_OPT, in_a_fork, interrupting, slow_but, torch_threads
from tests.seccomp import forbid_ring

MIB = 1 << 20
META = ("meta", "device context")
PROMPT = torch.arange(5, 53)[None]
Load = Callable[..., Any]

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


@pytest.fixture(scope="module")
def repacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model, repacked. Do not write to it."""
    return hf_flash.repack(TINY_OPT, tmp_path_factory.mktemp("repacked") / "tiny")


@pytest.fixture
def load(repacked: Path) -> Load:
    def get(folder: Path | None = None, **arguments: Any) -> Any:
        config = FlashOffloadConfig(**{"memory_budget": 9 * MIB} | arguments)
        return AutoModelForCausalLM.from_pretrained(folder or repacked, dtype=torch.float16, quantization_config=config)

    return get


@contextmanager
def defaults(state: str) -> Iterator[None]:
    """Torch's default dtype or device as somebody else has set it."""
    if state == "device context":
        with torch.device("meta"):
            yield
        return
    before = torch.get_default_dtype()
    try:
        if state == "meta":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(getattr(torch, state))
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)


def story(model: Any, prompt: torch.Tensor = PROMPT, tokens: int = 6) -> list[int]:
    found: list[int] = model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)[0].tolist()
    return found


@pytest.fixture(params=["io_uring", "threads", "python"])
def reads_with(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What reads: all that a machine may have."""
    if request.param == "threads":
        monkeypatch.setattr("hf_flash.reading.layer_files.CompiledQueue", partial(CompiledQueue, ring=False))
    if request.param == "python":
        monkeypatch.setattr("hf_flash.compute.library._times_off", 1)
    found: str = request.param
    return found


@pytest.mark.parametrize("reader", slow_but({"direct"}, ["direct", "mmap"]))
def test_prompts_that_are_interrupted_anywhere_leave_a_model_as_good_as_new(load: Load, reads_with: str, reader: str) -> None:
    """Real signals at random moments, several in a row without a whole call between them."""
    model, generator, interrupted = load(reader=reader, lookahead=1), random.Random(7), 0
    wanted, one = story(model), torch.tensor([[5]])
    decoded = story(model, one)
    for turn in range(24):
        try:
            with interrupting(generator.uniform(1e-4, 0.06)):
                story(model, PROMPT if generator.random() < 0.7 else one)
        except KeyboardInterrupt:
            interrupted += 1
        if turn % 8 == 7:
            assert story(model) == wanted
            assert story(model, one) == decoded
    assert interrupted > 5
    for ffn in (layer.fc1 for layer in model.model.decoder.layers):
        assert len(ffn.window.resident) + ffn.window.free == ffn.window.capacity


@pytest.mark.parametrize("used", [pytest.param(False, marks=pytest.mark.slow), True], ids=["loaded", "used"])
@pytest.mark.parametrize("reader", ["direct", pytest.param("mmap", marks=pytest.mark.slow)])
def test_a_worker_of_a_process_with_threads_answers(load: Load, reads_with: str, reader: str, used: bool) -> None:
    with torch_threads(2):
        model, before = load(reader=reader), load(reader=reader)
        wanted = story(before)
        if used:
            assert story(model) == wanted

        def answers() -> bool:
            torch.randn(1000, 1000) @ torch.randn(1000, 1000)
            return story(model) == wanted and native.threads() == 2

        assert in_a_fork(answers)
        assert in_a_fork(lambda: answers() and in_a_fork(answers))
        assert answers()


def _answer(_: int) -> list[int]:
    return story(_shared)


_shared: Any = None


def test_a_pool_of_forked_workers_answers(load: Load) -> None:
    global _shared
    with torch_threads(2):
        _shared = load()
        wanted = story(_shared)
        with multiprocessing.get_context("fork").Pool(2) as pool:
            assert pool.map_async(_answer, range(4)).get(120) == [wanted] * 4
    _shared = None


@pytest.mark.parametrize("reader", ["direct", "mmap"])
@pytest.mark.parametrize("when", ["before loading", "after loading", "in a worker"])
def test_a_process_that_may_not_use_io_uring_answers(load: Load, reader: str, when: str) -> None:
    wanted, model = story(load(reader=reader)), load(reader=reader)
    if not in_a_fork(lambda: forbid_ring(errno.EPERM) is None):
        pytest.skip("no seccomp filters here")

    def answers() -> bool:
        forbid_ring(errno.EPERM)
        return story(load(reader=reader) if when == "before loading" else model) == wanted

    if when == "in a worker":
        assert in_a_fork(lambda: story(model) == wanted and in_a_fork(answers) and story(model) == wanted)
    else:
        assert in_a_fork(answers)
    assert story(model) == wanted


def _vandal(path: Path, whole: bytes, stop: Path) -> int:
    """A process that truncates and overwrites a file until `stop` is there, and then puts it back; its number."""
    child = os.fork()
    if child:
        return child
    try:
        turn = 0
        while not stop.exists():
            turn += 1
            with open(path, "r+b") as file:
                if turn % 2:
                    file.truncate(4096 * (turn % 7))
                file.write(bytes(len(whole)) if turn % 3 else whole)
        path.write_bytes(whole)
    finally:
        os._exit(0)


@pytest.mark.parametrize("reader", ["direct", "mmap"])
def test_files_that_others_write_to_are_errors_until_they_are_what_they_were(
    load: Load, tmp_path: Path, reads_with: str, reader: str
) -> None:
    """Truncated, overwritten and put back by another process while this one answers: never a signal, never another answer."""
    folder = hf_flash.repack(TINY_OPT, tmp_path / "mine")
    model, path = load(folder, reader=reader), FlashStore.open_folder(folder).layers[2].path
    wanted, whole, failed, stories = story(model), path.read_bytes(), 0, 0
    vandal = _vandal(path, whole, tmp_path / "stop")
    while failed < 4 and stories < 200:
        stories += 1
        try:
            assert story(model) == wanted
        except StoreReadError:
            failed += 1
    (tmp_path / "stop").touch()
    os.waitpid(vandal, 0)
    assert failed == 4
    assert story(model) == wanted
    os.utime(path, ns=(0, 0))  # the same bytes at another time
    os.chmod(path, 0o600)
    assert story(model) == wanted
    path.unlink()  # it lives on while it is open
    assert story(model) == wanted


def test_a_file_that_refuses_direct_reads_is_read_through_the_page_cache_alone(
    load: Load, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wanted, real = story(load(reader="direct")), os.open

    def refusing(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if "layer-00003" in str(path) and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refusing)
    model = load(reader="direct")
    assert "flash-layer-00003.safetensors is read through the page cache" in caplog.text
    assert [file.align > 0 for file in model.flash_runtime.engine.reader.source.files] == [True] * 3 + [False] + [True] * 2
    assert story(model) == wanted


@pytest.mark.parametrize("state", ["float64", "bfloat16", "float16", *META])
@pytest.mark.parametrize(("predictor", "dtype"), [
    ("quantized", torch.float32), ("lowrank", torch.float16),
    *(pytest.param(*both, marks=pytest.mark.slow) for both in (
        ("none", torch.float32), ("lowrank", torch.float32), ("quantized", torch.float16), ("none", torch.float16),
    )),
])  # fmt: skip
def test_defaults_of_torch_change_no_answer(calibrated: Path, state: str, predictor: str, dtype: torch.dtype) -> None:
    def load() -> Any:
        config = FlashOffloadConfig(memory_budget=18 * MIB, predictor=predictor)
        return AutoModelForCausalLM.from_pretrained(calibrated, dtype=dtype, quantization_config=config)

    model, one = load(), torch.tensor([[5]])
    wanted = story(model), story(model, one), logits(model)
    with defaults(state):
        again = model if state in META else load()  # transformers loads nothing onto the meta device
        for each in (model, again):
            assert (story(each), story(each, one)) == wanted[:2]
            assert torch.equal(logits(each), wanted[2])
    assert story(again) == wanted[0]


@pytest.mark.parametrize("state", [pytest.param("float64", marks=pytest.mark.slow), "bfloat16", "meta"])
def test_defaults_of_torch_change_no_file(calibrated: Path, tmp_path: Path, state: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(calibrated)
    with defaults(state):
        found = hf_flash.repack(TINY_OPT, tmp_path / "tiny")
        if state not in META:
            _calibrate(found)
        hf_flash.restore(found, tmp_path / "restored")
        model.save_pretrained(tmp_path / "saved")
    if state in META:
        _calibrate(found)
    for path in sorted(calibrated.glob("flash-*.safetensors")):
        assert (found / path.name).read_bytes() == path.read_bytes(), path.name
        assert (tmp_path / "saved" / path.name).read_bytes() == path.read_bytes(), path.name
    plain, restored = (load_file(folder / "model.safetensors") for folder in (TINY_OPT, tmp_path / "restored"))
    assert all(torch.equal(plain[name], value) for name, value in restored.items())


def _calibrate(found: Path) -> Path:
    hf_flash.calibrate(found, ROOT / "examples" / "text" / "bible.valid.txt", samples=16, context=64, rank=8, epochs=1)
    return found


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model with a low-rank predictor, hastily trained. Do not write to it."""
    return _calibrate(hf_flash.repack(TINY_OPT, tmp_path_factory.mktemp("calibrated") / "tiny"))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(PROMPT).logits
    return found


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
@pytest.mark.parametrize(
    ("name", "value"), [("ffn_dim", 0), ("ffn_dim", 512), ("num_hidden_layers", 0), ("num_hidden_layers", 3)]
)
def test_a_config_of_another_shape_is_an_error_of_ours(calibrated: Path, tmp_path: Path, name: str, value: int) -> None:
    folder = Path(shutil.copytree(calibrated, tmp_path / "folder"))
    config = json.loads((folder / "config.json").read_text()) | {name: value}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError):
        AutoModelForCausalLM.from_pretrained(folder)
