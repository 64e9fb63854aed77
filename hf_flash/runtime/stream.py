"""A call of several blocks: neurons that do not all fit into the window are worked off in blocks, read while others compute.

What a call computes, and in which blocks, follows from the call alone ([`Call`]), so that results do not depend on what is in
memory. Where its neurons fit into the window, all blocks are computed from there. Otherwise they are *streamed* ([`stream`])
through two buffers, one of which is filled while the other is computed. What is worth keeping goes on to the window.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from time import perf_counter
from typing import Final

import numpy as np
import torch

from hf_flash.base.arrays import Ids
from hf_flash.compute.arithmetic import Arithmetic, Values, block_rows
from hf_flash.compute.kernels import Biases, addresses
from hf_flash.errors import StoreReadError
from hf_flash.reading.reader import Reading
from hf_flash.runtime.engine import Engine
from hf_flash.runtime.window import ResidentWindow

Observer = Callable[[torch.Tensor, Ids, Values], None]
"""Called with a layer's input x, float32 [tokens, d_model], the ids of a block and what was computed of them."""


LEARNT_TOKENS: Final = 64  # at the end of a prompt: which neurons they used decides what stays in the window
_BUFFERS: Final = 2  # one is filled while the other is computed


class Call:
    """What one forward of a layer computes, and in which blocks.

    Args:
        x: [tokens, d_model] in the dtype of compute, contiguous.
        selected: bool [tokens, d_ff], which neurons each token uses; `None`: all.
        ids: neurons that any of them uses, sorted.
        streamed: whether they are read past the window.
        observer: sees what is computed, where all tokens use all neurons.
        learner: the layer's window, if it is to learn from these which neurons are in use.

    Attributes:
        step: neurons in a block at most.
        uses_all: whether every token uses every neuron.
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
        self.d_ff = d_ff
        self.step = block_rows(d_ff, len(x) if selected is not None else 2)  # of all neurons as many as have two buffers
        self.one_block = len(x) == 1 and len(ids) <= self.step
        self.uses_all, self.uses_most = selected is None, 2 * len(ids) > d_ff
        self._several = arithmetic.several_tokens(x, selected, len(ids), biases) if len(x) > 1 else None
        self.has_several_tokens = self._several is not None
        self.together = slice(None) if self._several is None else self._several.together
        self.of_neighbours = self.uses_all if self._several is None else streamed or not self._several.scattered
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

    def _observe(self, ids: Ids, found: Values | None) -> None:
        if found is None:
            return
        if self._observer is not None:
            self._observer(self._x.float(), ids, found)
        if self._learner is not None:
            last = found.before[-LEARNT_TOKENS:]
            self._learner.note_active(*self._arithmetic.count_uses(last), len(last), ids)


def stream(
    engine: Engine,
    layer: int,
    window: ResidentWindow,
    call: Call,
    out: torch.Tensor,
    at_end: Callable[[list[torch.Tensor]], None],
) -> float:
    """Work off what does not fit into the window, the next block on its way while one is computed.

    Args:
        out: float32 [tokens, d_model], to which the sum is added.
        at_end: called when everything that the call needs is read, with the buffers that are free.

    Returns:
        Seconds spent on reading and nothing else.
    """
    rows, waited = engine.arithmetic.rows, 0.0
    free = [rows[at : at + call.step] for at in range(0, len(rows) - call.step + 1, call.step)][:_BUFFERS]
    blocks = [_Block(layer, window, ids, call.step if call.of_neighbours else 0, call.d_ff) for ids in call.blocks]
    try:
        _take_early(engine, blocks, free)
        waiting = deque(blocks)
        for block in blocks:
            start = perf_counter()
            while waiting and (free or waiting[0].is_started):
                waiting.popleft().start(engine, free)
            block.wait(engine)
            if block is blocks[-1] and call.uses_most:
                at_end(free)
            waited += perf_counter() - start
            block.compute(engine, call, out)
            block.keep(engine)
            if not block.complete:
                free.append(block.buffer)
    except BaseException:
        engine.early = None
        engine.reader.forget()  # nothing may write to the buffers any more
        raise
    return waited


def start_early(engine: Engine, layer: int, window: ResidentWindow, step: int, free: list[torch.Tensor]) -> None:
    """Start to read the first block that a call of all neurons of the next layer will lack: the disk is not idle meanwhile.

    Args:
        layer, window: of that layer.
        step: neurons in a block.
        free: buffers of so many rows, which that layer's call will have, too.
    """
    d_ff = len(window.slot_of)
    missing = np.flatnonzero(window.slot_of < 0)
    if not len(missing) or not free:
        return
    first = int(missing[0]) // step * step
    block = _Block(layer, window, np.arange(first, min(first + step, d_ff)), step, d_ff)
    with suppress(StoreReadError):  # the call reads it again, and says what is wrong
        block.start(engine, free[:])
        engine.early = block


def _take_early(engine: Engine, blocks: list[_Block], free: list[torch.Tensor]) -> None:
    """Let what was started early stand for the block that it is, if that still lacks the same neurons."""
    early, engine.early = engine.early, None
    if early is None:
        return
    for number, block in enumerate(blocks):
        if not block.complete and block.is_alike(early):
            blocks[number], early.is_early = early, True
            free[:] = [buffer for buffer in free if buffer.data_ptr() != early.buffer.data_ptr()]
            return
    with suppress(StoreReadError):
        early.wait(engine)  # another call uses its buffer


class _Block:
    """Some neurons of a call: resident ones, and others that are to be read into a buffer. It is `complete` without those.

    Args:
        ids: sorted.
        step: of neurons that are neighbours in blocks of so many; else 0.
        d_ff: neurons of the layer.
    """

    buffer: torch.Tensor
    is_early = False

    def __init__(self, layer: int, window: ResidentWindow, ids: Ids, step: int, d_ff: int) -> None:
        self._layer, self._window, self.ids = layer, window, ids
        slots = window.slot_of[ids]
        self._present, self._missing = np.flatnonzero(slots >= 0), np.flatnonzero(slots < 0)  # positions in `ids`
        self.complete = len(self._missing) == 0
        first = int(ids[0]) // step * step if step else 0
        self._range = (first, min(first + step, d_ff)) if step else None
        self._rows: Ids = ids - first if step else np.arange(len(ids))
        self._reading: Reading | None = None

    @property
    def is_started(self) -> bool:
        """Whether nothing is left to be started."""
        return self.complete or self._reading is not None

    def is_alike(self, other: _Block) -> bool:
        """Whether it reads the same neurons of the same layer to the same rows of a buffer."""
        return (
            self._layer == other._layer
            and np.array_equal(self.ids, other.ids)
            and np.array_equal(self._rows, other._rows)
            and np.array_equal(self._missing, other._missing)
        )

    def start(self, engine: Engine, free: list[torch.Tensor]) -> None:
        """Start to read what is missing, if anything is, into a buffer taken from `free`."""
        if self.is_started:
            return
        self.buffer = free.pop(0)
        self._start(engine)

    def _start(self, engine: Engine) -> None:
        missing, rows = self.ids[self._missing], self._rows[self._missing]
        if self._range is not None:
            missing = engine.reader.through_gaps(self._layer, missing, *self._range, self.buffer)
            rows = missing - self._range[0]
        self._reading = engine.reader.start(self._layer, missing, self.buffer, rows, background=True)

    def wait(self, engine: Engine) -> None:
        """Wait until what is read is there, and count it."""
        if self._reading is None:
            return
        try:
            read = self._reading.wait()
        except StoreReadError:
            if not self.is_early:
                raise
            self._start(engine)  # it may have been forgotten with the reads of another call
            read = self._reading.wait()
        engine.counters.add_read(read)

    def compute(self, engine: Engine, call: Call, out: torch.Tensor) -> None:
        """Add the share of these neurons to `out`."""
        matrix, present = self._window.matrix, self._present
        slots = self._window.slot_of[self.ids[present]]
        if self.complete:
            call.add(matrix, slots, self.ids, out)
            return
        engine.arithmetic.copy_rows(matrix, slots, self.buffer, self._rows[present], call.together)
        if call.has_several_tokens:
            places = addresses(self.buffer, self._rows)
            places[present] = addresses(matrix, slots)
            call.add_streamed(self.buffer, self._rows, places, self.ids, out)
        else:
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
