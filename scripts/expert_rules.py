#!/usr/bin/env python3
"""Which experts of a mixture should stay in the slots of a layer: rules compared on a small model and real text.

    scripts/expert_rules.py TRAIN HELD_OUT [--model examples/tiny-moe] [--tokens 8192]

The stock model says which experts each token uses. The rules run on the end of HELD_OUT, token by token, from empty slots.
What may be known before comes from the beginning of TRAIN, so both may be the same file. After each token a rule gives every
expert a worth: of those in the slots and those that the token used, the ones worth most stay. A hit is a use of an expert
that is in a slot before its token comes.

    recent     the last use: what `ExpertSlots` does
    used       the number of uses so far, then the last use
    aged H     the number of uses, a use H tokens ago counting half
    both H     what the last token used stays, and of the rest `aged H` decides
    tie        the last use, of one token's experts the one with the higher weight of the router
    weighted H the sum of the router's weights, a weight H tokens ago counting half
    counted    the number of uses in TRAIN
    optimum    the next use, which no rule can know: nothing has more hits

The second table divides a number of slots among the layers, for the rule `recent`: equally; each further slot to where it adds
most hits in TRAIN; with the most hits in TRAIN; and with the most hits in HELD_OUT, which is the bound.
"""

from __future__ import annotations

import argparse
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_flash.families.experts import expert_modules, sizes_of

Mask = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

HALF_LIVES = (4, 16, 64, 256)
CONTEXT = 256
TINY_MOE = Path(__file__).parents[1] / "examples" / "tiny-moe"


class Routing(NamedTuple):
    """What the router of one layer chose.

    Attributes:
        used: bool [tokens, experts].
        weights: float64 [tokens, experts], zero where an expert is not used.
    """

    used: Mask
    weights: Floats


def record(folder: Path, text: Path, tokens: int, *, last: bool = False) -> list[Routing]:
    """The routing of every layer on the first tokens of a text, or the last. A form feed in a text begins a document."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    modules = list(expert_modules(model).values())
    if not modules:
        raise SystemExit(f"{folder} is not a mixture of experts")
    found: list[list[Routing]] = [[] for _ in modules]
    for module, into in zip(modules, found, strict=True):
        module.register_forward_pre_hook(partial(_note, into), with_kwargs=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, model_max_length=int(1e9))
    documents = tokenizer(text.read_text(encoding="utf-8").split("\f"))["input_ids"]
    ids = [token for document in documents for token in document]
    if len(ids) < tokens:
        raise SystemExit(f"{text} has {len(ids)} tokens: lower --tokens")
    ids = ids[-tokens:] if last else ids[:tokens]
    with torch.no_grad():
        for at in range(0, tokens, CONTEXT):
            model(torch.tensor(ids[at : at + CONTEXT])[None])
    return [Routing(*(np.concatenate(parts) for parts in zip(*layer, strict=True))) for layer in found]


def _note(into: list[Routing], module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    index, weights = [*args, *kwargs.values()][1:3]  # after hidden_states: top_k_index, top_k_weights
    whole = torch.zeros(len(index), sizes_of(module)[0], dtype=torch.float64)
    used = whole.bool().scatter(1, index, True)
    into.append(Routing(used.numpy(), whole.scatter(1, index, weights.double()).numpy()))


# --- what a rule thinks of an expert: float64 [tokens, experts], after each token


def last_use(used: Mask) -> Floats:
    """The token that used an expert last, from 1 on; 0 before its first use."""
    clock = np.arange(1, len(used) + 1)[:, None]
    return np.maximum.accumulate(np.where(used, clock, 0), axis=0).astype(np.float64)


def next_use(used: Mask) -> Floats:
    """How many tokens of the text are left when an expert is used next; 0 if it is not."""
    turned = last_use(used[::-1])[::-1]
    return np.concatenate([turned[1:], np.zeros_like(turned[:1])])


def aged(values: npt.NDArray[Any], half_life: float) -> Floats:
    """Sums in which a value counts half after so many tokens."""
    sums, decay = values.astype(np.float64), 0.5 ** (1 / half_life)
    for before, now in pairwise(sums):
        now += decay * before
    return sums


def worths(layer: Routing, trained: Mask) -> dict[str, Floats]:
    """What each rule thinks of the experts of a layer, given their uses in another text."""
    used, weights = layer
    last = last_use(used)
    at_last_use = np.take_along_axis(np.vstack([np.zeros_like(weights[:1]), weights]), last.astype(np.int64), axis=0)
    rules = {"recent": last, "used": used.cumsum(axis=0) + last / (10 * len(used))}
    rules |= {f"aged {half}": aged(used, half) for half in HALF_LIVES}
    rules |= {f"both {half}": aged(used, half) + used * len(used) for half in HALF_LIVES[:3]}
    rules |= {"tie": last + at_last_use / (1 + weights.max()), "weighted 64": aged(weights, 64)}
    counts = trained.sum(axis=0, dtype=np.float64)
    return rules | {"counted": np.broadcast_to(counts, used.shape), "optimum": next_use(used)}


def hit_rates(used: Mask, worth: Floats) -> Floats:
    """The share of all uses that are hits, for 0 slots up to as many as there are experts: float64 [experts + 1]."""
    experts = used.shape[1]
    slots = np.arange(experts + 1)[:, None]
    resident, hits = np.zeros((experts + 1, experts), dtype=bool), np.zeros(experts + 1)
    for use, order in zip(used, np.argsort(-worth, axis=1, kind="stable"), strict=True):
        hits += (resident & use).sum(axis=1)
        ranked = (resident | use)[:, order]
        resident[:, order] = ranked & (ranked.cumsum(axis=1) <= slots)
    return np.asarray(hits / used.sum(), dtype=np.float64)


def greedy_division(curves: list[Floats], least: int, total: int) -> list[int]:
    """Slots for each layer, of a total: each layer gets the least, and every further one goes where it adds most hits."""
    gains, slots = [np.append(np.diff(curve), -1.0) for curve in curves], [least] * len(curves)
    while sum(slots) < total:
        slots[int(np.argmax([gain[have] for gain, have in zip(gains, slots, strict=True)]))] += 1
    return slots


def best_divisions(curves: list[Floats], least: int) -> dict[int, list[int]]:
    """Slots for each layer, by their total, with the most hits that any division of that total has."""
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for curve in curves:
        before, best = best, {}
        for (total, (hits, slots)), have in product(before.items(), range(least, len(curve))):
            best[total + have] = max(best.get(total + have, (-1.0, [])), (hits + float(curve[have]), [*slots, have]))
    return {total: slots for total, (_, slots) in best.items()}


def shared(used: Mask, before: int) -> float:
    """The share of a token's experts that one of so many tokens before it used."""
    last = last_use(used)[:-1]
    clock = np.arange(2, len(used) + 1)[:, None]
    return float(((last > 0) & (clock - last <= before))[used[1:]].mean())


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("--model", type=Path, default=TINY_MOE)
    parser.add_argument("--tokens", type=int, default=8192, help="of each text")
    args = parser.parse_args()
    torch.set_num_threads(1)
    trained = [layer.used for layer in record(args.model, args.train, args.tokens)]
    layers = record(args.model, args.held_out, args.tokens, last=True)
    experts, least = layers[0].used.shape[1], int(layers[0].used.sum(axis=1).max())
    for before in (1, 4):
        shares = [shared(layer.used, before) for layer in layers]
        chance = 1 - (1 - least / experts) ** before
        each = ", ".join(f"{share:.1%}" for share in shares)
        print(f"used by one of the {before} tokens before: {np.mean(shares):.1%} (layers {each}; chance {chance:.1%})")

    by_layer = [worths(*both) for both in zip(layers, trained, strict=True)]
    curves = {
        rule: [hit_rates(layer.used, rules[rule]) for layer, rules in zip(layers, by_layer, strict=True)]
        for rule in by_layer[0]
    }
    print("\nhits, %, by rule\nslots" + "".join(f"{rule:>13}" for rule in curves))
    for slots in range(least, experts + 1):
        print(f"{slots:5}" + "".join(f"{100 * np.mean([layer[slots] for layer in found]):13.1f}" for found in curves.values()))

    held_out, in_train = curves["recent"], [hit_rates(used, last_use(used)) for used in trained]
    from_train, bound = best_divisions(in_train, least), best_divisions(held_out, least)
    print("\nhits, %, by division\nslots   equal  greedy   TRAIN  HELD_OUT   slots of each layer, by TRAIN and HELD_OUT")
    for slots in range(least, experts + 1):
        total = slots * len(layers)
        ways = [[slots] * len(layers), greedy_division(in_train, least, total), from_train[total], bound[total]]
        row = [100 * np.mean([curve[have] for curve, have in zip(held_out, way, strict=True)]) for way in ways]
        print(f"{slots:5}" + "".join(f"{hits:8.1f}" for hits in row) + f"    {ways[2]} {ways[3]}")


if __name__ == "__main__":
    main()
