"""`ResidentWindow`: the neurons of one layer that are in DRAM (paper: section 3.3).

    matrix   [capacity, 2 * d_model]   allocated once; rows 0 .. num_used-1 are live, in no particular order
    pointer  [capacity]                which neuron a row holds
    slot_of  [d_ff]                    the way back: the row of a neuron, or -1
    last_used[d_ff]                    the token that used a neuron last: `last_k_active` for every k at once

A neuron belongs in the window while one of the last `window` tokens used it. Deleting c neurons moves the last live rows
into the holes, O(c * d_model); inserting appends, so that neighbours on flash can arrive in one read. Nothing of the size
of a row is allocated after construction.

One forward is `note_use` -> `evict_for` -> `reserve` -> (the caller reads) -> `commit`. A read that fails leaves reserved
rows uncommitted, that is: free; a caller that is interrupted anywhere in between calls `forget`. The window knows neither the
reader nor the predictor, and never decides what is computed.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from .memory import aligned_empty

Ids = npt.NDArray[np.int64]


class ResidentWindow:
    """The resident set of one layer.

    Args:
        d_ff: neurons in the layer.
        d_model: half the width of a bundle.
        capacity: neurons that fit.
        window: tokens a neuron stays for after its last use.
        dtype: dtype of compute.
        scratch: [rows, 2 * d_model] in `dtype`, borrowed while rows move.
    """

    def __init__(self, d_ff: int, d_model: int, capacity: int, window: int, dtype: torch.dtype, scratch: torch.Tensor) -> None:
        self.capacity, self.window = capacity, window
        self.matrix = aligned_empty((capacity, 2 * d_model), dtype)
        self.pointer = np.full(capacity, -1, dtype=np.int64)
        self.slot_of = np.full(d_ff, -1, dtype=np.int64)
        self.last_used = np.full(d_ff, np.iinfo(np.int64).min, dtype=np.int64)
        self.num_used = 0
        self.high_water = 0  # rows ever used: the memory that the matrix really takes
        self.clock = 0  # tokens seen
        self._scratch = scratch

    @property
    def resident(self) -> Ids:
        """The neurons in DRAM, by slot. A view."""
        return self.pointer[: self.num_used]

    @property
    def high_water_bytes(self) -> int:
        return self.high_water * self.matrix.shape[1] * self.matrix.element_size()

    def note_use(self, selected: npt.NDArray[np.bool_] | None, tokens: int, union: Ids) -> None:
        """Advance the clock by a call's tokens and mark which neurons they use.

        Args:
            selected: bool [tokens, d_ff], or `None` when every token uses all of `union`.
            tokens: how many.
            union: sorted ids used by any of them.
        """
        start, self.clock = self.clock, self.clock + tokens
        if selected is None or tokens == 1:
            self.last_used[union] = self.clock
            return
        recent = max(0, tokens - self.window)
        self.last_used[union] = np.maximum(self.last_used[union], start + recent)  # used, but before the window
        for token in range(recent, tokens):
            self.last_used[selected[token]] = start + token + 1

    def missing(self, ids: Ids) -> Ids:
        """Those of `ids` that are not in DRAM, in the same order."""
        return ids[self.slot_of[ids] < 0]

    def evict_for(self, union: Ids) -> None:
        """Drop what left the window and is not needed now; then the least recently used, until `union` fits.

        Call only if `len(union) <= capacity`.
        """
        resident = self.resident
        needed = np.zeros(len(self.slot_of), dtype=bool)
        needed[union] = True
        idle = resident[~needed[resident]]
        old = self.last_used[idle] <= self.clock - self.window
        self.evict(idle[old])
        idle = idle[~old]
        excess = len(idle) + len(union) - self.capacity
        if excess > 0:
            self.evict(idle[np.lexsort((idle, self.last_used[idle]))[:excess]])

    def worth_keeping(self, union: Ids) -> Ids:
        """Of the residents and `union`: what should stay when not all of it can, sorted.

        The most recently used win; among equals what is in DRAM already, then the lower id.
        """
        candidates = np.union1d(self.resident, union)
        candidates = candidates[self.last_used[candidates] > self.clock - self.window]
        newest_first = np.lexsort((candidates, self.slot_of[candidates] < 0, -self.last_used[candidates]))
        return np.sort(candidates[newest_first[: self.capacity]])

    def evict(self, ids: Ids) -> None:
        """Delete rows; the last live rows move into the holes."""
        if not len(ids):
            return
        slots = self.slot_of[ids]
        self.slot_of[ids] = -1
        self.pointer[slots] = -1
        end = self.num_used - len(ids)
        tail = np.arange(end, self.num_used)
        movers = tail[self.pointer[tail] >= 0]
        holes = np.sort(slots[slots < end])
        self.num_used = end
        if not len(movers):
            return
        moved = self.pointer[movers]
        self.pointer[holes], self.pointer[movers] = moved, -1
        self.slot_of[moved] = holes
        step = len(self._scratch)
        for at in range(0, len(movers), step):
            source, target = torch.from_numpy(movers[at : at + step]), torch.from_numpy(holes[at : at + step])
            rows = torch.index_select(self.matrix, 0, source, out=self._scratch[: len(source)])
            self.matrix.index_copy_(0, target, rows)

    def reserve(self, count: int) -> Ids:
        """Rows for `count` new neurons, in order, at the end of the live ones. Not live before [`commit`]."""
        if self.num_used + count > self.capacity:
            raise AssertionError(f"window overflow: {self.num_used} + {count} > {self.capacity}")
        return np.arange(self.num_used, self.num_used + count)

    def commit(self, ids: Ids) -> None:
        """The rows that [`reserve`] gave now hold `ids`."""
        slots = self.reserve(len(ids))
        self.pointer[slots] = ids
        self.slot_of[ids] = slots
        self.num_used += len(ids)
        self.high_water = max(self.high_water, self.num_used)

    @property
    def free(self) -> int:
        return self.capacity - self.num_used

    def forget(self) -> None:
        """Drop every neuron: after an interruption nobody knows which rows are whole."""
        self.slot_of[:] = -1
        self.pointer[:] = -1
        self.num_used = 0

    def release(self) -> None:
        """Forget every neuron and give the memory back."""
        self.forget()
        self.high_water = self.capacity = 0
        self.matrix = self.matrix.new_empty((0, self.matrix.shape[1]))
