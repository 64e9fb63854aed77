"""What the quantized predictor costs the shipped real model, on text it was not trained on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from hf_flash import FlashOffloadConfig
from tests.conftest import ROOT, slow_but

CONTEXT, TOKENS = 256, 16 * 256


@dataclass
class Selection:
    """Neurons over all layers and tokens."""

    active: int = 0
    selected: int = 0
    missed: int = 0


@pytest.fixture(scope="module", params=slow_but({"bible"}, ["bible", "sotu"]))
def tokens(request: pytest.FixtureRequest, tokenizer: Any) -> torch.Tensor:
    """[windows, CONTEXT] held-out token ids."""
    text = (ROOT / "examples" / "text" / f"{request.param}.valid.txt").read_text(encoding="utf-8")
    ids = [i for encoding in tokenizer.backend_tokenizer.encode_batch(text.split("\f")) for i in encoding.ids]
    return torch.tensor(ids[:TOKENS]).view(-1, CONTEXT)


@torch.no_grad()
def perplexity(model: Any, tokens: torch.Tensor) -> float:
    loss = sum(F.cross_entropy(model(ids[None]).logits[0, :-1].float(), ids[1:]).item() for ids in tokens)
    return math.exp(loss / len(tokens))


def watch(flash: Any, stock: Any) -> Selection:
    """Compare, at every call, what a layer's predictor selects with what the stock layer would activate on that input."""
    total = Selection()

    def compare(reference: Any) -> Callable[..., None]:
        def hook(module: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
            active = F.linear(inputs[0], reference.weight, reference.bias) > 0
            selected = module.predictor.select(inputs[0])
            total.active += int(active.sum())
            total.selected += int(selected.sum())
            total.missed += int((active & ~selected).sum())

        return hook

    for ours, theirs in zip(flash.model.decoder.layers, stock.model.decoder.layers, strict=True):
        ours.fc1.register_forward_hook(compare(theirs.fc1))
    return total


@pytest.mark.parametrize(("bits", "most_selected"), [(4, 1.7), (8, 1.1)])
def test_quantized_predictor_is_as_good_as_dense(tiny_opt: Path, tokens: torch.Tensor, bits: int, most_selected: float) -> None:
    config = FlashOffloadConfig(predictor="quantized", predictor_bits=bits)
    stock = AutoModelForCausalLM.from_pretrained(tiny_opt, dtype=torch.float32)
    flash = AutoModelForCausalLM.from_pretrained(tiny_opt, dtype=torch.float32, quantization_config=config)
    found = watch(flash, stock)
    dense, sparse = perplexity(stock, tokens), perplexity(flash, tokens)
    print(f"int{bits}: perplexity {dense:.3f} -> {sparse:.3f}, selected {found.selected / found.active:.3f} x, "
          f"missed {found.missed / found.active:.3%}")  # fmt: skip
    assert abs(sparse / dense - 1) < 1e-3
    assert found.missed / found.active < 0.01
    assert found.selected / found.active < most_selected
