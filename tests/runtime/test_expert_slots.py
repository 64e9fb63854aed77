"""Which experts stay: the most recently used, token by token; nothing that a call uses goes before it is computed."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_flash.runtime.expert_slots import ExpertSlots, PassingSlots

EXPERTS = 9


def slots_of(capacity: int) -> ExpertSlots:
    return ExpertSlots(EXPERTS, np.zeros((capacity, 4), np.uint8))


calls = st.lists(st.lists(st.sets(st.integers(0, EXPERTS - 1), min_size=1, max_size=4), min_size=1, max_size=5), max_size=12)


def last_uses(call: list[set[int]]) -> tuple[np.ndarray, np.ndarray]:
    last = {expert: number for number, token in enumerate(call) for expert in sorted(token)}
    used = sorted(last)
    return np.array(used), np.array([last[expert] for expert in used])


@settings(max_examples=200, deadline=None)
@given(capacity=st.integers(0, EXPERTS), sequence=calls)
def test_after_a_call_the_most_recently_used_are_there(capacity: int, sequence: list[list[set[int]]]) -> None:
    slots, order = slots_of(capacity), list[int]()  # least recently used first
    for call in sequence:
        before = {expert for expert in range(EXPERTS) if slots.slot_of[expert] >= 0}
        used, last = last_uses(call)
        room = slots.make_room(used, last, len(call))
        assert set(room.hits) == before & set(used.tolist())
        assert {*room.hits, *room.kept, *room.passing} == set(used.tolist())
        assert set(room.leaving) <= set(room.hits)
        assert all(slots.slot_of[expert] >= 0 for expert in room.hits), "a hit went before it was computed"
        for expert in room.leaving:
            slots.drop(expert)
        assert slots.free >= len(room.kept)
        for expert in room.kept:
            slots.put(expert, slots.take())
        for number in range(len(call)):  # of a token, those with lower ids count as used later
            for expert in sorted((e for e, at in zip(used.tolist(), last.tolist(), strict=True) if at == number), reverse=True):
                order = [*(other for other in order if other != expert), expert]
        there = {expert for expert in range(EXPERTS) if slots.slot_of[expert] >= 0}
        assert there == set(order[max(0, len(order) - capacity) :])
        where = [int(slot) for slot in slots.slot_of if slot >= 0]
        assert sorted([*where, *slots._free[: slots.free].tolist()]) == list(range(capacity)), "slots were lost"


def test_what_the_last_tokens_used_survives_a_prompt() -> None:
    slots = slots_of(2)
    used, last = last_uses([{0, 1}, {2, 3}, {4, 5}, {6, 7}])
    room = slots.make_room(used, last, 4)
    assert (room.kept, sorted(room.passing)) == ([6, 7], [0, 1, 2, 3, 4, 5])


def test_after_an_interruption_all_slots_are_free() -> None:
    slots = [slots_of(2), slots_of(3)]
    passing = PassingSlots(np.zeros((2, 4), np.uint8), slots)
    slots[0].make_room(np.array([1]), np.array([0]), 1)
    slots[0].put(1, slots[0].take())
    passing.take()
    passing.interrupted = True
    passing.forget()
    assert [one.free for one in slots] == [2, 3]
    assert (slots[0].resident, passing.free, passing.interrupted) == (0, 2, False)
