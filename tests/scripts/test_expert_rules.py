"""`scripts/expert_rules.py`: the rules do what they say, and no rule has more hits than the optimum."""

from __future__ import annotations

import subprocess
import sys
from itertools import combinations, product
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from hf_flash.runtime.expert_slots import ExpertSlots
from tests.conftest import ROOT, load_script

SCRIPT = ROOT / "scripts" / "expert_rules.py"
TEXTS = ROOT / "examples" / "text"
K = 2


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("expert_rules")


def routing(script: ModuleType, tokens: int, experts: int, seed: int = 0) -> Any:
    """Tokens that use K experts each, some experts more often than others."""
    rng = np.random.default_rng(seed)
    odds = np.arange(1, experts + 1) / np.arange(1, experts + 1).sum()
    used, weights = np.zeros((tokens, experts), dtype=bool), np.zeros((tokens, experts))
    for token in range(tokens):
        chosen = rng.choice(experts, K, replace=False, p=odds)
        used[token, chosen] = True
        weights[token, chosen] = rng.dirichlet(np.ones(K))
    return script.Routing(used, weights)


def test_no_rule_is_above_the_optimum_and_with_all_slots_only_first_uses_miss(script: ModuleType) -> None:
    layer = routing(script, 300, 8)
    curves = {rule: script.hit_rates(layer.used, worth) for rule, worth in script.worths(layer, layer.used).items()}
    assert len(curves) == 13
    for curve in curves.values():
        assert np.all(curve <= curves["optimum"])
        assert np.all(np.diff(curve) >= 0)
        assert curve[0] == 0
        assert curve[8] == pytest.approx(1 - 8 / layer.used.sum())


def test_the_optimum_is_the_best_of_all_choices(script: ModuleType) -> None:
    used = routing(script, 40, 5, seed=1).used
    curve = script.hit_rates(used, script.next_use(used))
    for slots in range(6):
        best = {frozenset[int](): 0}  # most hits so far, by what is in the slots
        for token in used:
            use, after = frozenset(np.flatnonzero(token).tolist()), dict[frozenset[int], int]()
            for resident, hits in best.items():
                hits += len(use & resident)
                for kept in combinations(sorted(use | resident), min(slots, len(use | resident))):
                    after[frozenset(kept)] = max(after.get(frozenset(kept), 0), hits)
            best = after
        assert curve[slots] == pytest.approx(max(best.values()) / used.sum())


@pytest.mark.parametrize("slots", [1, K, 3, 5, 8])
def test_recent_is_what_the_slots_of_a_layer_do(script: ModuleType, slots: int) -> None:
    used = routing(script, 200, 8, seed=2).used
    layer, hits = ExpertSlots(8, np.zeros((slots, 16), np.uint8)), 0
    for token in used:
        ids = np.flatnonzero(token)
        room = layer.make_room(ids, np.zeros(len(ids), np.int64), 1)
        hits += len(room.hits)
        for expert in room.leaving:
            layer.drop(expert)
        for expert in room.kept:
            layer.put(expert, layer.take())
    assert script.hit_rates(used, script.last_use(used))[slots] == pytest.approx(hits / used.sum())


def test_shares_worths_and_ages_by_hand(script: ModuleType) -> None:
    used = np.array([[1, 1, 0], [0, 1, 1], [1, 0, 1]], dtype=bool)
    assert script.shared(used, 1) == 0.5
    assert script.shared(used, 2) == 0.75
    assert script.last_use(used).tolist() == [[1, 1, 0], [1, 2, 2], [3, 2, 3]]
    assert script.next_use(used).tolist() == [[1, 2, 2], [1, 0, 1], [0, 0, 0]]
    assert script.aged(used, 1).tolist() == [[1, 1, 0], [0.5, 1.5, 1], [1.25, 0.75, 1.5]]


def test_divisions_are_the_best_or_follow_the_next_gain(script: ModuleType) -> None:
    rng = np.random.default_rng(3)
    curves = [np.sort(rng.random(6)) for _ in range(3)]
    best = script.best_divisions(curves, 1)
    assert sorted(best) == list(range(3, 16))
    for total, slots in best.items():
        ways = [way for way in product(range(1, 6), repeat=3) if sum(way) == total]
        most = max(sum(curve[have] for curve, have in zip(curves, way, strict=True)) for way in ways)
        assert sum(slots) == total
        assert sum(curve[have] for curve, have in zip(curves, slots, strict=True)) == pytest.approx(most)
    assert script.greedy_division([np.array([0, 0.5, 0.6]), np.array([0, 0.3, 0.5])], 0, 3) == [1, 2]


def test_it_measures_the_shipped_mixture() -> None:
    texts = [str(TEXTS / "bible.valid.txt"), str(TEXTS / "sotu.valid.txt")]
    done = subprocess.run([sys.executable, str(SCRIPT), *texts, "--tokens", "300"], capture_output=True, text=True, check=True)
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [row[0] for row in rows if row and row[0].isdigit()] == [str(slots) for slots in range(4, 17)] * 2
