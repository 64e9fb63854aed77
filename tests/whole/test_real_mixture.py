"""The shipped mixture of experts, a real one: stock's tokens, and hits as its text has them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_flash
from hf_flash import FlashOffloadConfig
from hf_flash.runtime.model import runtime_of
from tests.conftest import ROOT, torch_threads

TINY_MOE = ROOT / "examples" / "tiny-moe"
TEXT = "And God said unto Moses, Go in unto Pharaoh, and tell him, Thus saith the LORD God of the Hebrews, Let my people go"


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    found: torch.Tensor = AutoTokenizer.from_pretrained(TINY_MOE)(TEXT, return_tensors="pt").input_ids
    return found


def load(budget: int | str, **arguments: Any) -> Any:
    config = FlashOffloadConfig(memory_budget=budget, reader="direct", **arguments)
    return AutoModelForCausalLM.from_pretrained(TINY_MOE, quantization_config=config, dtype=torch.float32)


def test_its_tokens_are_those_of_stock_in_any_budget(ids: torch.Tensor) -> None:
    with torch_threads(1):
        stock = AutoModelForCausalLM.from_pretrained(TINY_MOE, dtype=torch.float32)
        wanted = stock.generate(ids, max_new_tokens=24, do_sample=False)
        plan = runtime_of(load("1GB")).plan
        for slots in (0, 2, 5, 16):
            model = load(plan.minimum_bytes + slots * sum(plan.slot_bytes))
            assert torch.equal(model.generate(ids, max_new_tokens=24, do_sample=False), wanted)
            assert hf_flash.stats(model).capacity == slots


def test_more_slots_hit_more_often_and_better_than_chance(ids: torch.Tensor) -> None:
    """Text has locality: the hit rate of so many slots is above the share of the experts that they hold."""
    plan, rates = runtime_of(load("1GB")).plan, []
    with torch_threads(1), torch.no_grad():
        for slots in (5, 8, 12):
            model = load(plan.minimum_bytes + slots * sum(plan.slot_bytes))
            cache = model(ids[:, :8], use_cache=True).past_key_values
            hf_flash.stats(model, reset=True)
            for at in range(8, ids.shape[1]):
                model(ids[:, at : at + 1], past_key_values=cache, use_cache=True)
            rates.append(hf_flash.stats(model).hit_rate)
            assert rates[-1] > slots / 16
    assert rates == sorted(rates)
