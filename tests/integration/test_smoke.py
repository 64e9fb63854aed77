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
