"""The first block of the next layer is read while attention runs, and whatever comes in between changes no bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hf_flash
from hf_flash import FlashOffloadConfig
from hf_flash.runtime import stream
from hf_flash.runtime.model import find_runtime

IDS = torch.randint(4, 100, (1, 40), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("gated")
    config = LlamaConfig(
        hidden_size=64, intermediate_size=700, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, max_position_embeddings=64, pad_token_id=1, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(place / "plain")
    return hf_flash.repack(place / "plain", place / "packed")


def load(folder: Path, *, spare: int = 150_000, reader: str = "direct") -> Any:
    """A model whose layers do not fit, with room for a few neurons of each; or (`spare` 0) for none."""

    def loaded(budget: int | str) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=FlashOffloadConfig(memory_budget=budget, reader=reader)
        )

    return loaded(hf_flash.stats(loaded("1GB")).minimum_bytes + spare)


def logits(model: Any, tokens: int = 1) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS[:, :tokens]).logits
    return found


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of every call that is streamed, whether one of its blocks had been started early."""
    found: list[bool] = []
    take = stream._take_early

    def watch(engine: Any, blocks: list[Any], free: list[Any]) -> None:
        take(engine, blocks, free)
        found.append(any(block.is_early for block in blocks))

    monkeypatch.setattr(stream, "_take_early", watch)
    return found


@pytest.mark.parametrize("reader", ["direct", "mmap"])
@pytest.mark.parametrize("spare", [0, 150_000])
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_the_next_layer_takes_it_and_nothing_is_read_twice(
    folder: Path, reader: str, spare: int, tokens: int, taken: list[bool]
) -> None:
    model = load(folder, spare=spare, reader=reader)
    wanted = logits(load(folder, spare=10_000_000, reader=reader), tokens)
    for _ in range(2):
        assert torch.equal(logits(model, tokens), wanted)
    taken.clear()
    hf_flash.stats(model, reset=True)
    assert torch.equal(logits(model, tokens), wanted)
    assert taken == [False, True, True, True]
    runtime = find_runtime(model)
    bundle = runtime.store.layers[0].bundle_bytes
    capacity = [ffn.window.capacity for ffn in runtime.ffns]
    missing = sum(700 - room for room in capacity) * bundle
    assert missing <= hf_flash.stats(model).counters.read_bytes <= missing + 20 * 4096 * len(capacity)


@pytest.mark.parametrize("then", [1, 40])
def test_a_call_that_ends_between_two_layers_leaves_nothing_wrong(folder: Path, then: int, taken: list[bool]) -> None:
    model = load(folder)
    wanted = [logits(model), logits(model, 40)]

    def stop(*_: Any) -> None:
        raise KeyError("somebody's hook")

    handle = model.model.layers[2].register_forward_pre_hook(stop)
    with pytest.raises(KeyError, match="somebody's hook"):
        logits(model)
    handle.remove()
    assert find_runtime(model).engine.early is not None
    assert torch.equal(logits(model, then), wanted[then > 1])
    assert torch.equal(logits(model), wanted[0])


def test_reads_that_were_forgotten_are_read_again(folder: Path) -> None:
    model = load(folder)
    wanted, engine = logits(model), find_runtime(model).engine
    handle = model.model.layers[2].register_forward_pre_hook(lambda *_: engine.reader.forget())
    assert torch.equal(logits(model), wanted)
    handle.remove()
    assert torch.equal(logits(model), wanted)


def test_the_window_may_change_in_between(folder: Path) -> None:
    """What was started lacks the neurons that the window lacked then."""
    model = load(folder)
    wanted, ffn = logits(model), find_runtime(model).ffns[2]

    def change(*_: Any) -> None:
        ffn.window.evict(ffn.window.resident[:3])

    handle = model.model.layers[2].register_forward_pre_hook(change)
    assert torch.equal(logits(model), wanted)
    handle.remove()
    assert torch.equal(logits(model), wanted)


def test_another_call_in_between_is_right_too(folder: Path) -> None:
    """A thread, or a hook, runs the model while another forward is between two layers."""
    model = load(folder)
    wanted = [logits(model), logits(model, 40)]
    inside: list[torch.Tensor] = []

    def run(*_: Any) -> None:
        if not inside:
            inside.append(torch.empty(0))
            inside[0] = logits(model, 40)

    handle = model.model.layers[2].register_forward_pre_hook(run)
    assert torch.equal(logits(model), wanted[0])
    handle.remove()
    assert torch.equal(inside[0], wanted[1])
