#!/usr/bin/env python3
"""What thresholds on the gate would cost a SiLU or GELU model, and what they would save: perplexity against sparsity.

    scripts/threshold_curve.py MODEL --calibrate FILE --text FILE

As in CATS (arXiv 2404.08763): of each layer those neurons count for a token whose activation(gate) is larger than a threshold,
a quantile of what the calibration text gives. All others are zero. The model is the stock one, in memory; hf_flash computes
such models exactly, and this says what it would be worth not to. Prints, for each sparsity aimed at:

    active      share of the neurons that are left, on the text
    perplexity  and how many times the dense one it is
    new         of a token's neurons, the share that none of the five tokens before it used: a window would have to read these
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_flash.families import family_of
from hf_flash.families.arithmetic_check import arithmetic_of
from hf_flash.families.decoder import decoder_layers

CONTEXT = 512
SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
KEPT = 37  # every so manieth activation is kept for the quantiles
WINDOW = 5


class Threshold(nn.Module):
    """An activation that records what it gives (`level` is None), or leaves what is larger than a level."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function, self.level = function, None
        self.recorded: list[torch.Tensor] = []
        self.active, self.new = list[float](), list[float]()

    def forward(self, gate: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.function(gate)
        if self.level is None:
            self.recorded.append(hidden.abs().flatten()[::KEPT].clone())
            return hidden
        left = hidden.abs() > self.level
        used, before = left[0], torch.zeros_like(left[0])
        for distance in range(1, WINDOW + 1):
            before[distance:] |= used[:-distance]
        self.active.append(float(used.float().mean()))
        self.new.append(float((used & ~before)[WINDOW:].sum() / used[WINDOW:].sum().clamp_min(1)))
        return hidden * left


def windows(tokenizer: Any, path: Path, count: int) -> torch.Tensor:
    """int64 [windows, CONTEXT] from the beginning of a text."""
    ids = tokenizer(path.read_text(encoding="utf-8")[: 8 * count * CONTEXT], return_tensors="pt").input_ids[0]
    return ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)[:count]


def install(model: Any) -> list[Threshold]:
    """Put a threshold in place of every layer's activation."""
    family, found = family_of(model.config, model), []
    for layer in decoder_layers(model, family):
        block = layer.get_submodule(family.block)
        name = arithmetic_of(block, family.matrices, family.block).attribute
        found.append(Threshold(getattr(block, name)))
        setattr(block, name, found[-1])
    return found


@torch.no_grad()
def perplexity(model: Any, rows: torch.Tensor) -> float:
    """Of the model on windows of text."""
    return math.exp(sum(float(model(row[None], labels=row[None]).loss) for row in rows) / len(rows))


@torch.no_grad()
def main() -> None:
    """Calibrate, and print a line for each sparsity."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a plain checkpoint with a gated feed-forward block")
    parser.add_argument("--calibrate", type=Path, required=True, metavar="FILE", help="text for the thresholds")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="other text, for perplexity")
    parser.add_argument("--windows", type=int, default=12, help=f"of {CONTEXT} tokens; a third as many to calibrate on")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    layers, rows = install(model), windows(tokenizer, args.text, args.windows)
    for row in windows(tokenizer, args.calibrate, max(1, args.windows // 3)):
        model(row[None])
    quantiles = [torch.cat(layer.recorded).sort().values for layer in layers]
    dense = perplexity(model, rows)
    print(f"dense: perplexity {dense:.2f}")
    for sparsity in SPARSITIES:
        for layer, values in zip(layers, quantiles, strict=True):
            layer.level, layer.active, layer.new = values[int(sparsity * (len(values) - 1))], [], []
        found = perplexity(model, rows)
        active, new = (sum(sum(getattr(layer, key)) for layer in layers) / len(layers) / len(rows) for key in ("active", "new"))
        print(
            f"sparsity {sparsity:.0%}: active {active:.1%}, perplexity {found:.2f} ({found / dense:.3f}), new {new:.1%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
