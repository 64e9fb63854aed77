"""Prompts are computed whole, whatever the predictor says; all other tokens as it says (contracts C3 and C4)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_flash
from hf_flash import FlashOffloadConfig
from hf_flash.predictors.base import Predictor
from hf_flash.runtime.model import find_runtime
from hf_flash.runtime.prompts import MOST_PREDICTED, Sequences
from hf_flash.runtime.window import ResidentWindow

LONG = MOST_PREDICTED + 1


class Nothing(Predictor):
    """Selects no neuron, and notes how many tokens it was asked about."""

    nbytes = 0

    def __init__(self) -> None:
        self.asked: list[int] = []

    def select(self, x: torch.Tensor, allowed: torch.Tensor | None = None) -> torch.Tensor:
        self.asked.append(len(x))
        return torch.zeros(len(x), self.d_ff, dtype=torch.bool)

    d_ff = 0


def load(folder: Path, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    quantization = FlashOffloadConfig(memory_budget="1GiB", **config)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=quantization).eval()


def with_nothing(model: Any) -> list[Nothing]:
    """Give every layer a predictor that selects nothing."""
    found = []
    for ffn in find_runtime(model).ffns:
        ffn.predictor = Nothing()
        ffn.predictor.d_ff = ffn.d_ff
        found.append(ffn.predictor)
    return found


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(10, 400, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor, **more: Any) -> torch.Tensor:
    found: torch.Tensor = model(ids, **more).logits
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_prompt_has_the_bits_of_a_model_without_a_predictor(tiny_opt: Path, dtype: torch.dtype) -> None:
    exact, model = load(tiny_opt, dtype, predictor="none"), load(tiny_opt, dtype)
    predictors = with_nothing(model)
    for rows, length in ((1, LONG), (3, LONG), (2, 90)):
        assert torch.equal(logits(model, tokens(rows, length)), logits(exact, tokens(rows, length)))
    assert not any(predictor.asked for predictor in predictors)


def test_a_prompt_says_what_the_stock_model_says(tiny_opt: Path) -> None:
    stock, model = AutoModelForCausalLM.from_pretrained(tiny_opt, dtype=torch.float32).eval(), load(tiny_opt)
    for small in (False, True):
        if small:
            model = load(tiny_opt, predictor="quantized")
        torch.testing.assert_close(logits(model, tokens(2, 60)), logits(stock, tokens(2, 60)), rtol=1e-4, atol=1e-4)


def test_how_long_a_sequence_is_decides_and_not_how_many_tokens_a_call_has(tiny_opt: Path) -> None:
    model = load(tiny_opt)
    predictor = with_nothing(model)[0]
    for rows, length, predicted in ((1, MOST_PREDICTED, True), (9, 4, True), (40, 1, True), (1, LONG, False), (9, LONG, False)):
        predictor.asked.clear()
        logits(model, tokens(rows, length))
        assert predictor.asked == ([rows * length] if predicted else [])


def test_words_and_embeddings_and_keywords_are_the_same(tiny_opt: Path) -> None:
    model, ids = load(tiny_opt), tokens(1, LONG)
    predictor, embed = with_nothing(model)[0], model.get_input_embeddings()
    model(input_ids=ids)
    model(inputs_embeds=embed(ids).detach())
    model.get_decoder()(ids)
    assert predictor.asked == []
    model(inputs_embeds=embed(ids[:, :3]).detach())
    model.get_decoder()(ids[:, :3])
    assert predictor.asked == [3, 3]


def test_a_block_that_is_called_by_itself_counts_what_it_gets(tiny_opt: Path) -> None:
    model = load(tiny_opt)
    predictor, ffn = with_nothing(model)[0], find_runtime(model).ffns[0]
    with torch.no_grad():
        for shape in ((1, 5, 256), (5, 256), (256,), (40, 4, 256)):
            ffn(torch.zeros(shape))
        assert predictor.asked == [5, 5, 1, 160]
        for shape in ((LONG, 256), (2, LONG, 256)):
            ffn(torch.zeros(shape))
    assert predictor.asked == [5, 5, 1, 160]


def test_a_prompt_that_failed_leaves_nothing_behind(tiny_opt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(tiny_opt)
    predictor, ffn = with_nothing(model)[0], find_runtime(model).ffns[0]
    with pytest.raises(IndexError):
        model(torch.full((1, LONG), 10**6))
    with torch.no_grad():
        ffn(torch.zeros(3, 256))
    assert predictor.asked == [3]


def test_threads_do_not_hear_of_each_others_prompts(tiny_opt: Path) -> None:
    model = load(tiny_opt)
    wanted = {length: logits(model, tokens(1, length)) for length in (4, 40)}
    with ThreadPoolExecutor(4) as pool:
        lengths = [4, 40] * 10
        for length, found in zip(lengths, pool.map(lambda length: logits(model, tokens(1, length)), lengths), strict=True):
            assert torch.equal(found, wanted[length])


def test_prompts_are_predicted_where_that_is_to_be_measured(tiny_opt: Path) -> None:
    model = load(tiny_opt)
    predictor = with_nothing(model)[0]
    find_runtime(model).engine.sequences.predict_always = True
    logits(model, tokens(2, 50))
    assert predictor.asked == [100]
    assert not Sequences().is_prompt(torch.zeros(MOST_PREDICTED, 8))
    assert Sequences().is_prompt(torch.zeros(LONG, 8))


@pytest.mark.parametrize("share", [0.2, 0.6, 1.0])
def test_after_a_prompt_the_window_holds_what_its_last_tokens_used(tiny_opt: Path, share: float) -> None:
    """All of it, where there is room; and what is in it are the bytes of the store: the next tokens say so."""
    dense = load(tiny_opt, predictor="none")
    budget = int(hf_flash.stats(dense).resident_bytes + 3_700_000 + share * 6_300_000)
    model = AutoModelForCausalLM.from_pretrained(
        tiny_opt, dtype=torch.float32, quantization_config=FlashOffloadConfig(memory_budget=budget)
    ).eval()
    used = {ffn.index: np.zeros(ffn.d_ff, dtype=np.bool_) for ffn in find_runtime(dense).ffns}
    for ffn in find_runtime(dense).ffns:

        def observe(x: torch.Tensor, ids: Any, found: Any, at: int = ffn.index) -> None:
            used[at][ids] = (found.before[-5:] > 0).any(0).numpy()

        ffn.observer = observe
    ids = tokens(1, 80, seed=3)
    assert torch.equal(logits(model, ids), logits(dense, ids))
    for ffn in find_runtime(model).ffns:
        there = ffn.window.slot_of >= 0
        assert there.sum() == ffn.window.capacity
        assert (there & used[ffn.index]).sum() == min(used[ffn.index].sum(), ffn.window.capacity)
    follow, plain = load(tiny_opt), tokens(1, 3, seed=4)
    assert torch.equal(logits(model, plain), logits(follow, plain))


def counted(mask: Any) -> tuple[Any, Any]:
    """As `Arithmetic.count_uses`."""
    numbers = np.arange(1, len(mask) + 1)[:, None]
    return mask.sum(0), (mask * numbers).max(0)


def test_what_is_active_counts_as_used() -> None:
    """`advance` and `note_active` note what `note_use` does of tokens that are all known before."""
    random = np.random.default_rng(0)
    one, other = (ResidentWindow(50, torch.empty(20, 2), 5) for _ in range(2))
    for length in (1, 3, 17, 64):
        mask = random.random((length, 50)) < 0.1
        one.note_use(mask, length, np.flatnonzero(mask.any(0)))
        other.advance(length)
        for ids in (np.arange(20), np.arange(20, 50)):
            other.note_active(*counted(mask[:, ids]), len(mask), ids)
        assert np.allclose(one.score, other.score)
        assert (one.last_used == other.last_used).all()
        assert one.clock == other.clock
