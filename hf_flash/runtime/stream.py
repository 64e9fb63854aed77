"""A call of several blocks: neurons that do not all fit into the window are worked off in blocks, read while others compute.

What a call computes, and in which blocks, follows from the call alone ([`Call`]), so that results do not depend on what is in
memory. Where its neurons fit into the window, all blocks are computed from there. Otherwise they are *streamed* ([`stream`])
through two buffers, one of which is filled while the other is computed. What is worth keeping goes on to the window.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from time import perf_counter
from typing import Final

import numpy as np
import torch

from hf_flash.base.arrays import Ids
from hf_flash.compute.arithmetic import Arithmetic, Biases, block_rows
from hf_flash.compute.kernels import addresses
from hf_flash.reading.reader import Reading
from hf_flash.runtime.engine import Engine
from hf_flash.runtime.window import ResidentWindow

Observer = Callable[[torch.Tensor, Ids, torch.Tensor], None]
"""Called with a layer's input x, float32 [tokens, d_model], the ids of a block and their pre-activations [tokens, ids]."""


LEARNT_TOKENS: Final = 64  # at the end of a prompt: which neurons they used decides what stays in the window
_BUFFERS: Final = 2  # one is filled while the other is computed


class Call:
    """What one forward of a layer computes, and in which blocks.

    Args:
        x: [tokens, d_model] in the dtype of compute, contiguous.
        selected: bool [tokens, d_ff], which neurons each token uses; `None`: all.
        ids: neurons that any of them uses, sorted.
        streamed: whether they are read past the window.
        observer: sees pre-activations, where all tokens use all neurons.
        learner: the layer's window, if it is to learn from these which neurons are in use.

    Attributes:
        step: neurons in a block at most.
        blocks: sorted ids. One token: `step` neurons of those it uses. Several: those used of `step` neighbours, which lie
            together on flash; in the window, where that matters to nobody, `step` used ones if every token is on its own.
        one_block: whether one token is done with a single one.
        of_neighbours: whether blocks are of neighbours.
        together: columns of the neurons of a streamed block that have to be in one matrix.
        uses_most: whether these are most of the layer's neurons.
    """

    def __init__(
        self,
        arithmetic: Arithmetic,
        x: torch.Tensor,
        biases: Biases,
        selected: torch.Tensor | None,
        ids: Ids,
        d_ff: int,
        *,
        streamed: bool,
        observer: Observer | None = None,
        learner: ResidentWindow | None = None,
    ) -> None:
        self._arithmetic, self._x, self._biases = arithmetic, x, biases
        self._observer, self._learner = observer, learner
        self.d_ff, self.step = d_ff, block_rows(d_ff, len(x))
        self.one_block = len(x) == 1 and len(ids) <= self.step
        self.uses_most = 2 * len(ids) > d_ff
        self._several = arithmetic.several_tokens(x, selected, len(ids), biases) if len(x) > 1 else None
        self.together = slice(None) if self._several is None else self._several.together
        self.of_neighbours = self._several is not None and (streamed or not self._several.scattered)
        if self.of_neighbours:
            ends = np.searchsorted(ids, np.arange(0, d_ff + self.step, self.step)).tolist()
            self.blocks = [ids[start:end] for start, end in itertools.pairwise(ends) if end > start]
        else:
            self.blocks = [ids[at : at + self.step] for at in range(0, len(ids), self.step)]

    def add(self, matrix: torch.Tensor, rows: Ids, ids: Ids, out: torch.Tensor) -> None:
        """Add a block's share to `out` [tokens, d_model] float32; `rows` of `matrix` hold neurons `ids`."""
        if self._several is None:
            token = self._arithmetic.one_token(self._x, self._biases, matrix, rows, ids, one_block=self.one_block)
            token.finish(out)
            return
        self._observe(ids, self._several.add(matrix, rows, ids, out))

    def add_streamed(self, matrix: torch.Tensor, rows: Ids, places: Ids, ids: Ids, out: torch.Tensor) -> None:
        """Of several tokens, the same for neurons at addresses `places`, of which `rows` have the columns `together`."""
        assert self._several is not None
        self._observe(ids, self._several.add_streamed(matrix, rows, places, ids, out))

    def _observe(self, ids: Ids, before: torch.Tensor | None) -> None:
        if before is None:
            return
        if self._observer is not None:
            self._observer(self._x.float(), ids, before)
        if self._learner is not None:
            last = before[-LEARNT_TOKENS:]
            self._learner.note_active(*self._arithmetic.count_uses(last), len(last), ids)


def stream(
    engine: Engine, layer: int, window: ResidentWindow, call: Call, out: torch.Tensor, at_end: Callable[[], None]
) -> float:
    """Work off what does not fit into the window, the next block on its way while one is computed.

    Args:
        out: float32 [tokens, d_model], to which the sum is added.
        at_end: called when everything that the call needs is read.

    Returns:
        Seconds spent on reading and nothing else.
    """
    rows, waited = engine.arithmetic.rows, 0.0
    free = [rows[at : at + call.step] for at in range(0, len(rows) - call.step + 1, call.step)][:_BUFFERS]
    blocks = [_Block(layer, window, call, ids) for ids in call.blocks]
    waiting = deque(blocks)
    try:
        for block in blocks:
            start = perf_counter()
            while waiting and (free or waiting[0].complete):
                waiting.popleft().start(engine, free)
            block.wait(engine)
            if block is blocks[-1] and call.uses_most:
                at_end()
            waited += perf_counter() - start
            block.compute(engine, call, out)
            block.keep(engine)
            if not block.complete:
                free.append(block.buffer)
    except BaseException:
        engine.reader.forget()  # nothing may write to the buffers any more
        raise
    return waited


class _Block:
    """Some neurons of a call: resident ones, and others that are to be read into a buffer. It is `complete` without those."""

    buffer: torch.Tensor

    def __init__(self, layer: int, window: ResidentWindow, call: Call, ids: Ids) -> None:
        self._layer, self._window, self.ids = layer, window, ids
        slots = window.slot_of[ids]
        self._present, self._missing = np.flatnonzero(slots >= 0), np.flatnonzero(slots < 0)  # positions in `ids`
        self.complete = len(self._missing) == 0
        first = int(ids[0]) // call.step * call.step
        self._range = (first, min(first + call.step, call.d_ff)) if call.of_neighbours else None
        self._rows: Ids = ids - first if call.of_neighbours else np.arange(len(ids))
        self._reading: Reading | None = None

    def start(self, engine: Engine, free: list[torch.Tensor]) -> None:
        """Start to read what is missing, if anything is, into a buffer taken from `free`."""
        if self.complete:
            return
        self.buffer, missing, rows = free.pop(0), self.ids[self._missing], self._rows[self._missing]
        if self._range is not None:
            missing = engine.reader.through_gaps(self._layer, missing, *self._range, self.buffer)
            rows = missing - self._range[0]
        self._reading = engine.reader.start(self._layer, missing, self.buffer, rows, background=True)

    def wait(self, engine: Engine) -> None:
        """Wait until what is read is there, and count it."""
        if self._reading is not None:
            engine.counters.add_read(self._reading.wait())

    def compute(self, engine: Engine, call: Call, out: torch.Tensor) -> None:
        """Add the share of these neurons to `out`."""
        matrix, present = self._window.matrix, self._present
        slots = self._window.slot_of[self.ids[present]]
        if self.complete:
            call.add(matrix, slots, self.ids, out)
            return
        engine.arithmetic.copy_rows(matrix, slots, self.buffer, self._rows[present], call.together)
        if call.of_neighbours:
            places = addresses(self.buffer, self._rows)
            places[present] = addresses(matrix, slots)
            call.add_streamed(self.buffer, self._rows, places, self.ids, out)
        else:  # one token
            call.add(self.buffer, self._rows, self.ids, out)

    def keep(self, engine: Engine) -> None:
        """Leave in the window, or take into it, what is worth keeping of this block and those before it."""
        window, ids = self._window, self.ids
        if not window.capacity:
            return
        keep = window.worth_keeping(ids, until=int(ids[-1]) + 1)
        staying = np.flatnonzero(keep[ids[self._missing]])
        window.evict(np.flatnonzero((window.slot_of[: len(keep)] >= 0) & ~keep))
        if len(staying):
            rows, slots = self._missing[staying], window.reserve(len(staying))
            engine.arithmetic.copy_rows(self.buffer, self._rows[rows], window.matrix, slots)
            window.commit(ids[rows], slots)
