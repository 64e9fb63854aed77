"""The shortest way from a plain checkpoint to text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import hf_flash
from hf_flash import FlashOffloadConfig


def test_plain_checkpoint_generates_the_stock_tokens(tiny_opt: Path, tokenizer: Any) -> None:
    inputs = tokenizer("In the beginning", return_tensors="pt")
    stock = AutoModelForCausalLM.from_pretrained(tiny_opt, dtype=torch.float32)
    flash = AutoModelForCausalLM.from_pretrained(
        tiny_opt, dtype=torch.float32, quantization_config=FlashOffloadConfig(predictor="none")
    )
    wanted = stock.generate(**inputs, max_new_tokens=20, do_sample=False)
    assert torch.equal(flash.generate(**inputs, max_new_tokens=20, do_sample=False), wanted)
    assert hf_flash.stats(flash).tokens == inputs.input_ids.shape[1] + 19


def test_stats_say_what_comes_on_top_of_the_budget(tiny_opt: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_opt, dtype=torch.float32, quantization_config=FlashOffloadConfig())
    found = hf_flash.stats(model)
    cache = model(torch.arange(5, 12)[None], use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert found.kv_cache_bytes_per_token * 7 == held
    assert found.process_bytes > found.dram_bytes
