"""`ResidentWindow`: the neurons of one layer that are in DRAM (paper: section 3.3).

    matrix    [capacity, numbers of a unit]   allocated once
    pointer   [capacity]   the neuron that a row (*slot*) holds, or -1
    slot_of   [d_ff]       the inverse: the slot of a neuron, or -1
    last_used [d_ff]       the last token that used a neuron: `last_k_active` for every k at once
    score     [d_ff]       how often a neuron was used, with older uses counting less

The neurons that the last `window` tokens used stay. Older neurons stay as long as there is room, and when there is none the
least used go first. (The paper drops a neuron as soon as it leaves the window. On the shipped model, with room for half of the
neurons, that rule reads 75 % of a token's neurons again, the least recently used rule 23 %, and this one 21 %:
`scripts/window_rules.py`.)

The paper closes holes by moving the last rows, so that a product can run over all of them. Here only the neurons predicted for
a token are computed (contract C3), wherever they lie; so a new row goes into any free slot, and no row ever moves. Nothing
of the size of a row is allocated after construction.

One forward is `note_use` -> `make_room` -> `reserve` -> (the caller reads) -> `commit`, or `give_back` when reading fails. A
prompt calls `advance` instead of `note_use`, and `note_active` once its neurons are computed. A caller that is interrupted
anywhere in between calls `forget`. The window knows neither the reader nor the predictor, and never decides what is computed.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from hf_flash.base.arrays import Ids, Mask, count_uses

GROWTH: Final = 1 / 0.99  # growth of a use's weight per token: half of a neuron's score comes from the last 69 tokens
RESCALE_BEYOND: Final = 1e9  # when the weight has grown this large, it starts from 1 again
_FORGOTTEN: Final = 2000  # tokens after which older uses hardly count; more would make the weight overflow


class ResidentWindow:
    """The resident set of one layer.

    Args:
        d_ff: neurons in the layer.
        matrix: [capacity, any], one row for each neuron that fits: memory that the arithmetic provides.
        window: for how many tokens a neuron stays after its last use.
    """

    def __init__(self, d_ff: int, matrix: torch.Tensor, window: int) -> None:
        capacity = len(matrix)
        self.capacity, self.window = capacity, window
        self.matrix = matrix.zero_()  # allocates its pages now, or the first reads would wait for them
        self.last_used = np.full(d_ff, np.iinfo(np.int64).min, dtype=np.int64)
        self.score = np.zeros(d_ff)
        self.use_score = 1.0  # what a use adds to `score` now; it grows, so that `score` need not be scaled down
        self.clock = 0  # tokens seen
        self.consistent = True  # kept by callers: False while they change the window, or were interrupted doing so
        self.slot_of, self.pointer = np.empty(d_ff, dtype=np.int64), np.empty(capacity, dtype=np.int64)
        self._free = np.empty(capacity, dtype=np.int64)
        self.forget()

    @property
    def arrays(self) -> tuple[Ids, Ids, Ids, Ids, npt.NDArray[np.float64]]:
        """`slot_of`, `pointer`, `last_used`, the stack of free slots and `score`. These arrays are never replaced."""
        return self.slot_of, self.pointer, self.last_used, self._free, self.score

    @property
    def resident(self) -> Ids:
        """The neurons in DRAM, sorted."""
        return np.flatnonzero(self.slot_of >= 0)

    def note_use(self, selected: Mask | None, tokens: int, union: Ids) -> None:
        """Advance the clock by a call's tokens and mark which neurons they use.

        Args:
            selected: bool [tokens, d_ff], or `None` when every token uses all of `union`.
            tokens: number of tokens.
            union: ids that any token uses, sorted.
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
        """Mark which neurons the last tokens of a call used, once they are computed. Call it after [`advance`].

        Args:
            uses: int64 [n] how many of those tokens used each neuron.
            last: int64 [n] number of the last such token, from 1 on.
            tokens: number of tokens.
            ids: [n] the neurons.
        """
        used = np.flatnonzero(uses)
        at = ids[used]
        self.score[at] += self.use_score * uses[used]
        self.last_used[at] = np.maximum(self.clock - tokens + last[used], self.clock - min(tokens, self.window))  # or before it

    def missing(self, ids: Ids) -> Ids:
        """The ones of `ids` that are not in DRAM, in the same order."""
        return ids[self.slot_of[ids] < 0]

    def make_room(self, count: int, union: Ids) -> None:
        """Evict neurons until `count` slots are free, but none of `union`.

        Call it only if `count` is at most the capacity less the residents among `union`. Among equals the higher id goes first.
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
        """Number of slots that are free, or hold a neuron that is neither in `union` nor used by the last `window` tokens."""
        evictable = (self.slot_of >= 0) & (self.last_used <= self.clock - self.window)
        evictable[union] = False
        return self.free + int(evictable.sum())

    def _rank(self, ids: Ids) -> npt.NDArray[np.float64]:
        """The order of eviction, lowest first: neurons outside the window by score, then the ones inside by last use."""
        last = self.last_used[ids]
        return np.where(last > self.clock - self.window, 1e30 * last, self.score[ids])

    def worth_keeping(self, union: Ids, until: int | None = None) -> Mask:
        """Which of the residents and `union` should stay when not all of them fit, bool [until].

        Among equals, neurons that are in DRAM already come first, then lower ids.

        Args:
            union: ids of the neurons that may be taken in.
            until: the first id that is not judged yet: residents from there on stay. `None`: all are judged.
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
        least = np.partition(rank, excess - 1)[excess - 1]  # the best rank among those that go
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
        """Take free slots for `count` new neurons, ascending. They hold nothing before [`commit`]."""
        if count > self.free:
            raise AssertionError(f"window overflow: {count} of {self.free} free slots")
        self.free -= count
        return np.sort(self._free[self.free : self.free + count])

    def commit(self, ids: Ids, slots: Ids) -> None:
        """Record that `slots`, which [`reserve`] gave, now hold `ids`."""
        self.pointer[slots] = ids
        self.slot_of[ids] = slots

    def give_back(self, slots: Ids) -> None:
        """Make slots that hold nothing free again."""
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
