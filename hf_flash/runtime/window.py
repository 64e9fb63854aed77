"""`ResidentWindow`: the neurons of one layer that are in DRAM (paper: section 3.3).

    matrix    [capacity, numbers of a unit]   allocated once
    pointer   [capacity]   which neuron a row (*slot*) holds, or -1
    slot_of   [d_ff]       the way back: the slot of a neuron, or -1
    last_used [d_ff]       the token that used a neuron last: `last_k_active` for every k at once
    score     [d_ff]       how often it was used, older uses counting less

What the last `window` tokens used stays. Older neurons stay as long as there is room; when there is none, those that were used
least go first. (The paper drops what left the window at once. On the shipped model, with room for half of the neurons, that
reads 75 % of a token's neurons again, the least recently used rule 23 %, and this one 21 %: `scripts/window_rules.py`.)

The paper closes holes by moving the last rows, so that a product can run over all of them. Here only the neurons predicted for
a token are computed (contract C3), wherever they lie; so a new row goes into any free slot, and no row ever moves. Nothing
of the size of a row is allocated after construction.

One forward is `note_use` -> `make_room` -> `reserve` -> (the caller reads) -> `commit`, or `give_back` when reading fails. A
prompt is `advance` instead, and `note_active` once its neurons are computed. A caller that is interrupted anywhere in between
calls `forget`. The window knows neither the reader nor the predictor, and never decides what is computed.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from hf_flash.base.arrays import Ids, Mask, count_uses

GROWTH: Final = 1 / 0.99  # of what a use scores, per token: half of a neuron's score is of the last 69 tokens
RESCALE_BEYOND: Final = 1e9  # when weights have grown this large they start from 1 again
_FORGOTTEN: Final = 2000  # tokens after which older uses count for nothing, and their weight still is a number


class ResidentWindow:
    """The resident set of one layer.

    Args:
        d_ff: neurons in the layer.
        matrix: [capacity, any], one row for each neuron that fits: memory that the arithmetic provides.
        window: tokens a neuron stays for after its last use.
    """

    def __init__(self, d_ff: int, matrix: torch.Tensor, window: int) -> None:
        capacity = len(matrix)
        self.capacity, self.window = capacity, window
        self.matrix = matrix.zero_()  # now, or reads wait for pages the first time
        self.last_used = np.full(d_ff, np.iinfo(np.int64).min, dtype=np.int64)
        self.score = np.zeros(d_ff)
        self.use_score = 1.0  # what a use adds to `score` now; it grows, instead of all of `score` shrinking
        self.clock = 0  # tokens seen
        self.consistent = True  # for callers: whether what they do with it was not interrupted halfway
        self.slot_of, self.pointer = np.empty(d_ff, dtype=np.int64), np.empty(capacity, dtype=np.int64)
        self._free = np.empty(capacity, dtype=np.int64)
        self.forget()

    @property
    def arrays(self) -> tuple[Ids, Ids, Ids, Ids, npt.NDArray[np.float64]]:
        """`slot_of`, `pointer`, `last_used`, the stack of free slots and `score`: the same arrays for good."""
        return self.slot_of, self.pointer, self.last_used, self._free, self.score

    @property
    def resident(self) -> Ids:
        """The neurons in DRAM, sorted."""
        return np.flatnonzero(self.slot_of >= 0)

    def note_use(self, selected: Mask | None, tokens: int, union: Ids) -> None:
        """Advance the clock by a call's tokens and mark which neurons they use.

        Args:
            selected: bool [tokens, d_ff], or `None` when every token uses all of `union`.
            tokens: how many.
            union: sorted ids used by any of them.
        """
        start = self.clock
        self.advance(tokens)
        if selected is None or tokens == 1:
            self.last_used[union] = self.clock
            self.score[union] += self.use_score * tokens
            return
        self.score += self.use_score * count_uses(selected)
        recent = max(0, tokens - self.window)
        self.last_used[union] = np.maximum(self.last_used[union], start + recent)  # used, but before the window
        for token in range(recent, tokens):
            self.last_used[selected[token]] = start + token + 1

    def advance(self, tokens: int) -> None:
        """Advance the clock by a call's tokens."""
        self.clock += tokens
        self.use_score *= GROWTH ** min(tokens, _FORGOTTEN)
        if self.use_score > RESCALE_BEYOND:
            self.score /= self.use_score
            self.use_score = 1.0

    def note_active(self, uses: Ids, last: Ids, tokens: int, ids: Ids) -> None:
        """Mark which neurons the last tokens of a call used, once they are computed; after [`advance`].

        Args:
            uses: int64 [n] by how many of those tokens.
            last: int64 [n] the number of the last that did, from 1 on.
            tokens: how many.
            ids: [n] the neurons.
        """
        used = np.flatnonzero(uses)
        at = ids[used]
        self.score[at] += self.use_score * uses[used]
        self.last_used[at] = np.maximum(self.clock - tokens + last[used], self.clock - min(tokens, self.window))  # or before it

    def missing(self, ids: Ids) -> Ids:
        """Those of `ids` that are not in DRAM, in the same order."""
        return ids[self.slot_of[ids] < 0]

    def make_room(self, count: int, union: Ids) -> None:
        """Evict until `count` slots are free, none of `union`. Call only if `union` and as many others fit.

        Among equals the higher id goes first.
        """
        excess = count - self.free
        if excess <= 0:
            return
        evictable = self.slot_of >= 0
        evictable[union] = False
        idle = np.flatnonzero(evictable)
        rank = self._rank(idle)
        least = np.partition(rank, excess - 1)[excess - 1]
        worse, equal = idle[rank < least], idle[rank == least]
        self.evict(np.append(worse, equal[len(equal) - (excess - len(worse)) :]))

    def spare(self, union: Ids) -> int:
        """Slots that are free, or hold what neither `union` nor the window needs."""
        evictable = (self.slot_of >= 0) & (self.last_used <= self.clock - self.window)
        evictable[union] = False
        return self.free + int(evictable.sum())

    def _rank(self, ids: Ids) -> npt.NDArray[np.float64]:
        """What goes first has the lowest: out of the window by score, then in the window by last use."""
        last = self.last_used[ids]
        return np.where(last > self.clock - self.window, 1e30 * last, self.score[ids])

    def worth_keeping(self, union: Ids, until: int | None = None) -> Mask:
        """Of the residents and `union`: what should stay when not all of it can, bool [until].

        Among equals what is in DRAM already, then the lower id.

        Args:
            until: the first id that is not to be judged yet. Residents from there on stay. `None`: all are judged.
        """
        wanted, judged = self.slot_of >= 0, len(self.slot_of) if until is None else until
        room = self.capacity - int(np.count_nonzero(wanted[judged:]))
        wanted[union] = True
        wanted = wanted[:judged]
        ids = np.flatnonzero(wanted)
        excess = len(ids) - room
        if excess <= 0:
            return wanted
        rank = self._rank(ids)
        least = np.partition(rank, excess - 1)[excess - 1]  # of those that go, the best
        worse, equal = ids[rank < least], ids[rank == least]
        present_first = equal[np.argsort(self.slot_of[equal] < 0, kind="stable")]
        wanted[worse] = False
        wanted[present_first[len(equal) - (excess - len(worse)) :]] = False
        return wanted

    def evict(self, ids: Ids) -> None:
        """Free the slots of these neurons."""
        slots = self.slot_of[ids]
        self.slot_of[ids] = -1
        self.pointer[slots] = -1
        self.give_back(slots)

    def reserve(self, count: int) -> Ids:
        """Free slots for `count` new neurons, ascending. They hold nothing before [`commit`]."""
        if count > self.free:
            raise AssertionError(f"window overflow: {count} of {self.free} free slots")
        self.free -= count
        return np.sort(self._free[self.free : self.free + count])

    def commit(self, ids: Ids, slots: Ids) -> None:
        """Slots that [`reserve`] gave now hold `ids`."""
        self.pointer[slots] = ids
        self.slot_of[ids] = slots

    def give_back(self, slots: Ids) -> None:
        """Slots that hold nothing, to be reserved again."""
        self._free[self.free : self.free + len(slots)] = slots
        self.free += len(slots)

    def forget(self) -> None:
        """Drop every neuron: after an interruption nobody knows which rows are whole."""
        self.slot_of[:] = self.pointer[:] = -1
        self._free[:] = np.arange(len(self._free))[::-1]  # a stack: the first slots come first
        self.free = self.capacity

    def release(self) -> None:
        """Forget every neuron and give the memory back."""
        self.capacity = 0
        self.forget()
        self.matrix = self.matrix.new_empty((0, self.matrix.shape[1]))
