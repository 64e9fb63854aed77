"""`ExpertSlots`: which experts of a layer are in memory, and who goes when room is needed.

What was used by the most recent tokens stays: the rule is least recently used, token by token, also inside of a prompt. So
after a prompt the slots hold what its last tokens used. Of a call that uses more experts than there are slots for, some are not
kept: they go through slots that all layers share. compute/experts.c has the same rules and works on the same arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from hf_flash.base.arrays import Bytes, Ids
from hf_flash.compute.library import ExpertWindow


class Room(NamedTuple):
    """What a call's experts mean for the slots.

    Attributes:
        hits: experts that are in memory, ascending.
        kept: missing experts that get a slot, the most recently used first. passing: missing ones that do not.
        leaving: hits whose slots are free when they were computed.
    """

    hits: list[int]
    kept: list[int]
    passing: list[int]
    leaving: list[int]


class _Slots:
    """Slots in memory, and which of them are free.

    Args:
        memory: uint8 [slots, bytes], contiguous.
        experts: that may be in them.
    """

    def __init__(self, memory: Bytes, experts: int) -> None:
        self.memory = memory
        self.slot_of: Ids = np.full(experts, -1, np.int64)
        self.last_used: Ids = np.zeros(experts, np.int64)  # the token, from 1 on
        self._free: Ids = np.arange(len(memory))
        self.state = ExpertWindow(  # what the compiled part sees of it
            memory.ctypes.data, *(part.ctypes.data for part in (self.slot_of, self.last_used, self._free)),
            experts, len(memory), memory.shape[1], len(memory), 0,
        )  # fmt: skip

    @property
    def capacity(self) -> int:
        return len(self.memory)

    @property
    def free(self) -> int:
        """How many slots are free."""
        return int(self.state.free)

    def take(self) -> int:
        """A free slot, which is not free any more."""
        self.state.free -= 1
        return int(self._free[self.state.free])

    def give(self, slot: int) -> None:
        """A slot is free."""
        self._free[self.state.free] = slot
        self.state.free += 1

    def forget(self) -> None:
        """Nothing is in memory any more."""
        self.slot_of[:] = -1
        self._free[:] = np.arange(self.capacity)
        self.state.free, self.state.ahead = self.capacity, 0

    def release(self) -> None:
        """Give the memory back. Nothing can be computed afterwards."""
        self.memory = np.empty((0, self.memory.shape[1]), np.uint8)
        self.state.slots, self.state.capacity = self.memory.ctypes.data, 0
        self.slot_of[:] = -1
        self.state.free = self.state.ahead = 0


class ExpertSlots(_Slots):
    """The slots of one layer.

    Args:
        experts: of the layer.
        memory: uint8 [slots, bytes], contiguous.
    """

    def __init__(self, experts: int, memory: Bytes) -> None:
        super().__init__(memory, experts)

    @property
    def clock(self) -> int:
        """Tokens seen."""
        return int(self.state.clock)

    @property
    def resident(self) -> int:
        """Experts in memory."""
        return int((self.slot_of >= 0).sum())

    def make_room(self, used: Ids, last: Ids, tokens: int) -> Room:
        """Take note of what a call uses, and let go what has to go.

        Args:
            used: experts, ascending. last: the token of the call, from 0 on, that uses each of them last.
            tokens: of the call.
        """
        self.last_used[used] = self.clock + 1 + last
        self.state.clock += tokens
        there = self.slot_of >= 0
        needed = np.zeros_like(there)
        needed[used] = True
        candidates = np.flatnonzero(there | needed)
        order = np.lexsort((candidates, -self.last_used[candidates]))
        stay = candidates[order[: self.capacity]]
        stays = np.zeros_like(there)
        stays[stay] = True
        for expert in np.flatnonzero(there & ~stays & ~needed).tolist():
            self.drop(expert)
        missing = ~there[stay]
        return Room(
            hits=used[there[used]].tolist(),
            kept=stay[missing].tolist(),
            passing=np.flatnonzero(needed & ~there & ~stays).tolist(),
            leaving=np.flatnonzero(needed & there & ~stays).tolist(),
        )

    def put(self, expert: int, slot: int) -> None:
        """An expert is in a slot that was free."""
        self.slot_of[expert] = slot

    def drop(self, expert: int) -> None:
        """An expert's slot is free."""
        slot = int(self.slot_of[expert])
        self.slot_of[expert] = -1
        self.give(slot)


class Forgets(Protocol):
    """What holds something that may be half there after an interruption."""

    def forget(self) -> None: ...


class PassingSlots(_Slots):
    """Slots that all layers share, for experts that are not kept.

    Args:
        memory: uint8 [slots, bytes], contiguous.
        kept: the slots of every layer, and whatever else forgets with them.

    Attributes:
        interrupted: a call was interrupted, so that nobody knows which slots of its layer are whole.
    """

    def __init__(self, memory: Bytes, kept: Sequence[Forgets]) -> None:
        super().__init__(memory, 0)
        self.others, self.interrupted = kept, False

    def forget(self) -> None:
        """Nothing is in memory any more, in any layer. Call it when nothing is read any more."""
        for slots in self.others:
            slots.forget()
        super().forget()
        self.interrupted = False
