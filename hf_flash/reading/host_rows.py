"""`HostRows`: neurons of one layer that stay in this machine's memory, as a second tier behind a device with less memory.

The neurons that the device requested most recently stay. A neuron may be here and on the device: to move neurons back, the
device would have to gather them and this machine to scatter them, row by row, which costs more than the room it saves.

A read is `take` -> (the caller reads missing neurons) -> `commit`, or `give_back` if reading fails.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from hf_flash.base.arrays import Ids
from hf_flash.base.buffers import aligned_empty


class Taken(NamedTuple):
    """Where the neurons of a read are. `here`, `coming` and `passing` are positions in its ids.

    Attributes:
        here: neurons that are in this memory.
        slots: their slots.
        coming: missing neurons that get a slot.
        free: the slots for them.
        passing: missing neurons that get no slot.
    """

    here: Ids
    slots: Ids
    coming: Ids
    free: Ids
    passing: Ids


class HostRows:
    """Rows of neurons in this machine's memory.

    Args:
        d_ff: neurons of the layer.
        rows: how many neurons there is room for.
        numbers: how many numbers a neuron has.
        dtype: the compute dtype.
    """

    _free: Ids

    def __init__(self, d_ff: int, rows: int, numbers: int, dtype: torch.dtype) -> None:
        self.matrix = aligned_empty((rows, numbers), dtype)
        self.slot_of, self._asked = np.empty(d_ff, np.int64), np.zeros(d_ff, np.int64)
        self._clock = 0
        self.forget()

    def take(self, ids: Ids) -> Taken:
        """Find neurons, or slots for them. The least recently requested are evicted, among equals the higher id first."""
        self._clock += 1
        self._asked[ids] = self._clock
        slots = self.slot_of[ids]
        here, missing = np.flatnonzero(slots >= 0), np.flatnonzero(slots < 0)
        evictable = np.flatnonzero((self.slot_of >= 0) & (self._asked < self._clock))
        excess = min(len(missing) - len(self._free), len(evictable))
        if excess > 0:
            order = np.lexsort((-evictable, self._asked[evictable]))
            gone = evictable[order[:excess]]
            self._free = np.concatenate([self._free, self.slot_of[gone]])
            self.slot_of[gone] = -1
        count = min(len(missing), len(self._free))
        free, self._free = self._free[:count], self._free[count:]
        return Taken(here, slots[here], missing[:count], free, missing[count:])

    def commit(self, ids: Ids, slots: Ids) -> None:
        """Note that slots from `take` now hold these neurons."""
        known = self.slot_of[ids] >= 0  # two reads of the same neuron may have been under way
        self.slot_of[ids[~known]] = slots[~known]
        self.give_back(slots[known])

    def give_back(self, slots: Ids) -> None:
        """Give back slots from `take` that hold nothing."""
        self._free = np.concatenate([self._free, slots])

    def forget(self) -> None:
        """Forget all neurons: every slot is free."""
        self.slot_of[:] = -1
        self._free = np.arange(len(self.matrix))

    def release(self) -> None:
        """Give the memory back."""
        self.matrix = self.matrix.new_empty((0, self.matrix.shape[1]))
        self.forget()
