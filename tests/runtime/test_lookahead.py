"""Reading ahead of attention: it changes when bytes come, never an answer, and gives way to every trouble."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_flash
from hf_flash import FlashOffloadConfig, StoreReadError
from hf_flash.reading.compiled_queue import CompiledQueue
from hf_flash.reading.reader import BundleReader
from hf_flash.runtime.model import find_runtime
from hf_flash.store.layout import FlashStore
from tests.conftest import TINY_OPT, in_a_fork, slow_but

MIB = 1 << 20
Load = Callable[..., Any]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def get(folder: Path = TINY_OPT, **arguments: Any) -> Any:
        dtype = arguments.pop("dtype", torch.float16)
        config = FlashOffloadConfig(cache_dir=tmp_path, **{"reader": "direct", "memory_budget": 10 * MIB} | arguments)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config)

    return get


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """[1, 96, vocabulary], of a prompt whose tokens use most of a layer together."""
    found: torch.Tensor = model(torch.arange(5, 101)[None]).logits
    return found


def story(model: Any, tokens: int = 24) -> list[int]:
    prompt = AutoTokenizer.from_pretrained(TINY_OPT)("And the king said unto them,", return_tensors="pt")
    hf_flash.stats(model, reset=True)
    return model.generate(**prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)[0].tolist()


def test_the_tokens_are_the_same_and_guesses_are_far_better_than_chance(load: Load) -> None:
    plain, guessing = load(lookahead=0), load(lookahead=1)
    assert story(plain) == story(guessing)
    without, found = hf_flash.stats(plain), hf_flash.stats(guessing)
    assert found.dram_bytes <= found.budget_bytes
    assert without.counters.ahead == 0 < 100 < found.counters.ahead
    assert found.counters.ahead_used > 0.2 * found.counters.ahead  # 3 % of the neurons are active
    assert found.hit_rate > without.hit_rate
    assert found.counters.selected == without.counters.selected


def test_without_room_nothing_is_guessed(load: Load) -> None:
    least = hf_flash.stats(load()).minimum_bytes
    model = load(lookahead=1, memory_budget=least)
    assert story(model) == story(load(lookahead=0))
    assert hf_flash.stats(model).counters.ahead == 0


def test_a_norm_after_the_ffn_gives_no_guess(load: Load, opt: Load) -> None:
    model = load(opt("post_ln"), dtype=torch.float32, lookahead=1, memory_budget=None)
    model(torch.tensor([[5]]))
    assert hf_flash.stats(model).counters.ahead == 0


def test_a_store_that_is_converted_is_not_read_ahead(load: Load) -> None:
    model = load(lookahead=1, dtype=torch.float32, memory_budget=None)
    model(torch.tensor([[5]]))
    assert hf_flash.stats(model).counters.ahead == 0


@pytest.mark.parametrize("predictor", ["quantized", "none"])
def test_a_prompt_begins_with_the_next_layer_before_its_attention(load: Load, predictor: str) -> None:
    plain, model = load(lookahead=0, predictor=predictor), load(predictor=predictor)
    ffns, under_way = find_runtime(model).ffns, []
    for layer, ffn in zip(model.model.decoder.layers, ffns, strict=True):
        layer.self_attn.register_forward_pre_hook(lambda *_, ffn=ffn: under_way.append(ffn.reads.under_way))
    assert torch.equal(logits(model), logits(plain))
    assert not under_way[0]  # nothing comes before it
    assert sum(under_way) >= 3  # a layer that uses half of its neurons starts nothing
    found, without = (hf_flash.stats(one) for one in (model, plain))
    count, bundle = found.counters, find_runtime(model).store.layers[0].bundle_bytes
    assert 0 < count.ahead_used <= count.ahead <= sum(under_way) * found.capacity
    assert count.missing_bytes + bundle * count.ahead_used == without.counters.missing_bytes
    assert without.counters.ahead == 0
    assert found.dram_bytes <= found.budget_bytes

    hf_flash.stats(model, reset=True)
    assert torch.equal(logits(model), logits(plain))
    assert hf_flash.stats(model).counters.ahead == 0  # windows are full


def test_tokens_that_use_half_of_a_layer_read_nothing_ahead(load: Load) -> None:
    model = load()
    for ffn in find_runtime(model).ffns:
        half = torch.arange(ffn.d_ff) % 2 == 0
        ffn.predictor = Mock(select=lambda x, half=half: half.repeat(len(x), 1), nbytes=0)
    find_runtime(model).engine.sequences.predict_always = True
    logits(model)
    assert hf_flash.stats(model).counters.ahead == 0


@pytest.mark.parametrize("reader", ["direct", "mmap"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_prompt_that_ends_in_attention_leaves_reads_that_harm_nobody(load: Load, reader: str) -> None:
    torch.set_num_threads(1)
    model = load(reader=reader, predictor="none")
    wanted, ffns = logits(model), find_runtime(model).ffns

    def fail(*_: Any) -> None:
        raise RuntimeError("attention")

    def left_behind() -> Any:
        for ffn in ffns:
            ffn.window.forget()
        hook = model.model.decoder.layers[2].self_attn.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="attention"):
            logits(model)
        hook.remove()
        assert ffns[2].reads.under_way

    left_behind()
    model(torch.tensor([[5]]))  # another call takes them in
    assert torch.equal(logits(model), wanted)
    left_behind()
    if hasattr(os, "fork"):
        assert in_a_fork(lambda: torch.equal(logits(model), wanted))
    assert torch.equal(logits(model), wanted)
    left_behind()
    hf_flash.close(model)


def test_without_io_uring_threads_read_the_same(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    with_ring = load(lookahead=1, io_threads=3)
    monkeypatch.setattr("hf_flash.reading.layer_files.CompiledQueue", partial(CompiledQueue, ring=False))
    model = load(lookahead=1, io_threads=3)
    assert hf_flash.stats(model).reads_with == "3 threads"
    for one in (model, with_ring):
        find_runtime(one).engine.reader.gap = 0  # else as measured, which is never twice the same
    assert story(model) == story(with_ring)
    ours, theirs = (hf_flash.stats(one).counters for one in (model, with_ring))
    assert (ours.reads, ours.read_bytes, ours.ahead) == (theirs.reads, theirs.read_bytes, theirs.ahead)


@pytest.mark.parametrize("reader", ["direct", "mmap"])
def test_a_disk_that_fails_is_an_error_of_the_forward(load: Load, tmp_path: Path, reader: str) -> None:
    folder = hf_flash.repack(TINY_OPT, tmp_path / "packed")
    model = load(folder, lookahead=1, reader=reader)
    wanted = story(model)
    path = FlashStore.open_folder(folder).layers[3].path
    whole = path.read_bytes()
    with open(path, "r+b") as file:
        file.truncate(8192)
    with pytest.raises(StoreReadError, match="layer 3"):
        story(model, 200)
    with open(path, "r+b") as file:
        file.write(whole)
    assert story(model) == wanted


def test_an_interrupted_guess_leaves_no_wrong_rows(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, model = story(load(lookahead=0)), load(lookahead=1)
    real, calls = BundleReader.start, 0

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        reading = real(*args, **kwargs)
        calls += 1
        if calls % 7 == 0:
            raise KeyboardInterrupt  # after the reads were started
        return reading

    monkeypatch.setattr(BundleReader, "start", interrupted)
    for _ in range(10):
        with pytest.raises(KeyboardInterrupt):
            story(model)
    monkeypatch.undo()
    assert story(model) == wanted


def test_a_prompt_interrupted_at_any_read_leaves_no_wrong_rows(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load()
    wanted, ffns, real = logits(model), find_runtime(model).ffns, BundleReader.start
    for number in itertools.count(1):
        calls = 0

        def interrupted(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            reading = real(*args, **kwargs)
            if calls == number:  # noqa: B023
                raise KeyboardInterrupt
            return reading

        for ffn in ffns:
            ffn.window.forget()
        with monkeypatch.context() as patch:
            patch.setattr(BundleReader, "start", interrupted)
            if finished(lambda: logits(model)):
                break
        assert torch.equal(logits(model), wanted), number
        assert all(ffn.window.free + len(ffn.window.resident) == ffn.window.capacity for ffn in ffns), number
    assert number > 20


def finished(action: Callable[[], object]) -> bool:
    try:
        action()
    except KeyboardInterrupt:
        return False
    return True


@pytest.mark.parametrize("reader", ["direct", "mmap"])
def test_a_prompt_on_a_disk_that_fails_is_an_error_of_its_layer(load: Load, tmp_path: Path, reader: str) -> None:
    folder = hf_flash.repack(TINY_OPT, tmp_path / "packed")
    model = load(folder, reader=reader)
    wanted, path = logits(model), FlashStore.open_folder(folder).layers[3].path
    whole = path.read_bytes()
    for ffn in find_runtime(model).ffns:
        ffn.window.forget()
    with open(path, "r+b") as file:
        file.truncate(8192)
    for _ in range(2):
        with pytest.raises(StoreReadError, match="layer 3"):
            logits(model)
    with open(path, "r+b") as file:
        file.write(whole)
    assert torch.equal(logits(model), wanted)


@pytest.mark.parametrize("reader", slow_but({"direct"}, ["direct", "mmap"]))
def test_a_compiled_model_says_the_same(load: Load, reader: str) -> None:
    model = load(lookahead=1, reader=reader)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        for token in range(5, 9):
            ids = torch.tensor([[token]])
            found, wanted = compiled(ids).logits, model(ids).logits
            torch.testing.assert_close(found, wanted, rtol=0, atol=0.02)  # the head's product is torch's own there
    assert hf_flash.stats(model).counters.ahead > 0
