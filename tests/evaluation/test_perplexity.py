"""Perplexity is that of the model's own logits."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from hf_flash import FlashOffloadConfig
from hf_flash.evaluation.measuring import perplexity


@pytest.mark.parametrize("model_type", ["granite", "gemma2", "cohere", "llama"])
def test_logits_that_a_model_scales_or_caps_are_so_here(model_type: str, coverage: ModuleType, tmp_path: Path) -> None:
    stock, _ = coverage.stock_model(model_type, tmp_path)
    windows = torch.randint(4, 100, (3, 20))
    flash = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=FlashOffloadConfig(predictor="none"))
    with torch.no_grad():
        logits = stock(windows).logits
    wanted = math.exp(F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), windows[:, 1:].reshape(-1)).item())
    assert perplexity(flash, windows) == pytest.approx(wanted, rel=1e-4)
