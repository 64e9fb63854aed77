"""`ExpertSlots`: which experts of a layer are in memory, and which ones go when room is needed.

The least recently used experts go first, token by token, even within a prompt. So after a prompt the slots hold what its last
tokens used. If a call uses more experts than there are slots, some are not kept: they pass through slots that all layers share.
compute/experts.c has the same rules and works on the same arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from hf_flash.base.arrays import Bytes, Ids
from hf_flash.compute.library import ExpertWindow


class Room(NamedTuple):
    """What a call's experts need of the slots.

    Attributes:
        hits: experts that are in memory, ascending.
        kept: missing experts that get a slot, the most recently used first.
        passing: missing experts that do not get one.
        leaving: hits that have to be dropped once they are computed.
    """

    hits: list[int]
    kept: list[int]
    passing: list[int]
    leaving: list[int]


class _Slots:
    """Slots in memory, and which of them are free.

    Args:
        memory: uint8 [slots, bytes], contiguous.
        experts: number of experts that may be in them.
    """

    def __init__(self, memory: Bytes, experts: int) -> None:
        self.memory = memory
        self.slot_of: Ids = np.full(experts, -1, np.int64)
        self.last_used: Ids = np.zeros(experts, np.int64)  # the last token that used each expert, from 1 on; 0: none
        self._free: Ids = np.arange(len(memory))
        self.state = ExpertWindow(  # shared with the compiled part
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
        """Take a free slot."""
        self.state.free -= 1
        return int(self._free[self.state.free])

    def give(self, slot: int) -> None:
        """Make a slot free again."""
        self._free[self.state.free] = slot
        self.state.free += 1

    def forget(self) -> None:
        """Drop every expert."""
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
        experts: number of experts in the layer.
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
        """Record which experts a call uses, and drop those that have to go and are not used.

        Args:
            used: experts that the call uses, ascending.
            last: the last token of the call, from 0 on, that uses each of them.
            tokens: number of tokens in the call.
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
        """Record that a slot now holds an expert."""
        self.slot_of[expert] = slot

    def drop(self, expert: int) -> None:
        """Remove an expert, and free its slot."""
        slot = int(self.slot_of[expert])
        self.slot_of[expert] = -1
        self.give(slot)


class Forgets(Protocol):
    """Anything whose contents may be incomplete after an interruption, and that can forget them."""

    def forget(self) -> None: ...


class PassingSlots(_Slots):
    """Slots that all layers share, for experts that are not kept.

    Args:
        memory: uint8 [slots, bytes], contiguous.
        kept: the slots of every layer, and everything else that has to forget with them.

    Attributes:
        interrupted: a call is running or was interrupted; in the latter case nobody knows which of its slots are whole.
    """

    def __init__(self, memory: Bytes, kept: Sequence[Forgets]) -> None:
        super().__init__(memory, 0)
        self.others, self.interrupted = kept, False

    def forget(self) -> None:
        """Drop the experts of all layers. Call it when no read is under way."""
        for slots in self.others:
            slots.forget()
        super().forget()
        self.interrupted = False
