#!/usr/bin/env python3
"""Which neurons to keep when there is more room than the window needs: rules compared on a small model and real text.

    scripts/window_rules.py MODEL TEXT [--tokens 2048]

Prints, for every layer and some capacities, the share of a token's active neurons that has to be read.

    strict   what left the window goes at once (paper: section 3.3)
    recent   the least recently used goes, when room is needed
    used     the least used goes, older uses counting less
    both     what the last `window` tokens used stays; of the rest the least used goes: what `ResidentWindow` does
"""

from __future__ import annotations

import argparse
from functools import partial

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

CAPACITIES = (0.1, 0.2, 0.3, 0.5)
RULES = ("strict", "recent", "used", "both")


def active_neurons(folder: str, text: str, tokens: int, context: int = 256, *, last: bool = False) -> list[np.ndarray]:
    """bool [tokens, d_ff] of every layer, on the first tokens of a text, or the last."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    layers = model.get_decoder().layers
    found: list[list[np.ndarray]] = [[] for _ in layers]
    for layer, into in zip(layers, found, strict=True):
        layer.fc1.register_forward_hook(partial(lambda into, m, i, out: into.append((out > 0).flatten(0, -2).numpy()), into))
    with open(text, encoding="utf-8") as file:
        content = file.read()
        part = content[-12 * tokens :] if last else content[: 12 * tokens]
    ids = AutoTokenizer.from_pretrained(folder)(part)["input_ids"]
    ids = ids[-tokens:] if last else ids[:tokens]
    with torch.no_grad():
        for at in range(0, len(ids), context):
            model(torch.tensor(ids[at : at + context])[None])
    return [np.concatenate(parts) for parts in found]


def read_again(active: np.ndarray, capacity: int, rule: str, window: int = 5, decay: float = 0.99) -> float:
    """The share of all uses that find their neuron not in memory."""
    count = active.shape[1]
    last, worth, resident = np.full(count, -np.inf), np.zeros(count), np.zeros(count, dtype=bool)
    missing = 0
    for clock, use in enumerate(active):
        last[use] = clock
        worth = worth * decay + use
        missing += int((use & ~resident).sum())
        if rule == "strict":
            resident &= last > clock - window
        resident |= use
        idle = np.flatnonzero(resident & ~use)
        excess = int(resident.sum()) - capacity
        if excess > 0:
            rank = worth[idle] if rule == "used" else last[idle]
            if rule == "both":
                rank = np.where(last[idle] > clock - window, 1e9 + last[idle], worth[idle])
            resident[idle[np.argsort(rank, kind="stable")[:excess]]] = False
    return missing / max(1, int(active.sum()))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--tokens", type=int, default=2048)
    args = parser.parse_args()
    print("layer  active  capacity  " + "".join(f"{rule:>8}" for rule in RULES))
    for layer, active in enumerate(active_neurons(args.model, args.text, args.tokens)):
        for share in CAPACITIES:
            capacity = int(share * active.shape[1])
            if capacity >= active.sum(1).max():
                row = "".join(f"{read_again(active, capacity, rule):8.1%}" for rule in RULES)
                print(f"{layer:5}  {active.sum(1).mean():6.1f}  {share:8.0%}  {row}")


if __name__ == "__main__":
    main()
