"""A call of several blocks: neurons that do not all fit into the window are read one block at a time, while others compute.

What a call computes, and in which blocks, follows from the call alone ([`Call`]), so that results do not depend on what is in
memory. Where its neurons fit into the window, all blocks are computed from there. Otherwise they are *streamed* ([`stream`])
through two buffers, one of which is filled while the other is computed. Neurons worth keeping are copied into the window.
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
"""Called with a layer's input x, float32 [tokens, d_model], the ids of a block and the values computed of these neurons."""


LEARNT_TOKENS: Final = 64  # last tokens of a prompt: the neurons that they used decide what stays in the window
_BUFFERS: Final = 2  # one is filled while the other is computed


class Call:
    """What one forward of a layer computes, and in which blocks.

    Args:
        arithmetic: computes the products.
        x: [tokens, d_model] in the compute dtype, contiguous.
        biases: the layer's biases.
        selected: bool [tokens, d_ff], which neurons each token uses; `None`: all.
        ids: neurons that any token uses, sorted.
        d_ff: the layer's number of neurons.
        streamed: whether neurons are read past the window.
        observer: is shown the values that are computed, where all tokens use all neurons.
        learner: the layer's window, if it is to learn from this call which neurons are active.

    Attributes:
        step: the most neurons in a block.
        uses_all: whether every token uses every neuron.
        uses_most: whether `ids` are more than half of the layer's neurons.
        of_neighbours: whether blocks are made of neighbours.
        blocks: sorted ids of each block. Blocks of neighbours hold the used ones of `step` consecutive ids, which lie together
            on flash. All others hold `step` used neurons: for one token; and for several whose neurons are in the window, if
            the arithmetic multiplies each neuron only with the tokens that use it.
        one_block: whether the call is of one token, with a single block.
        has_several_tokens: whether the call is of several tokens.
        together: columns of a streamed block's neurons that have to be in one matrix.
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
        self.step = block_rows(d_ff, len(x) if selected is not None else 2)  # with all neurons: blocks that two buffers hold
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
        """Add a block's share to `out` [tokens, d_model] float32; `rows` of `matrix` hold the neurons `ids`."""
        if self._several is None:
            token = self._arithmetic.one_token(self._x, self._biases, matrix, rows, ids, one_block=self.one_block)
            token.finish(out)
            return
        self._observe(ids, self._several.add(matrix, rows, ids, out))

    def add_streamed(self, matrix: torch.Tensor, rows: Ids, places: Ids, ids: Ids, out: torch.Tensor) -> None:
        """As [`add`], for several tokens and a streamed block.

        Args:
            matrix: its `rows` hold the columns `together` of the neurons `ids`.
            places: addresses of the whole neurons.
        """
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
    """Compute a call whose neurons do not fit into the window. The next block is read while one is computed.

    Args:
        layer: the layer's index.
        window: the layer's window, which takes in the neurons worth keeping.
        call: the call.
        out: float32 [tokens, d_model], to which the sum is added.
        at_end: called with the free buffers once everything is read, if the call uses most of the layer's neurons.

    Returns:
        Seconds spent on starting reads and waiting for them, while nothing was computed.
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
        engine.reader.forget()  # from here on no read may write to the buffers
        raise
    return waited


def start_early(engine: Engine, layer: int, window: ResidentWindow, step: int, free: list[torch.Tensor]) -> None:
    """Start to read the next layer's first incomplete block, for a call of all its neurons, so that the disk is not idle.

    Args:
        layer, window: the next layer's index and window.
        step: neurons in a block.
        free: buffers of `step` rows; the next layer's call uses the same ones.
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
    """Put the block that was started early in place of its equal among `blocks`, if that still lacks the same neurons."""
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
    """Some neurons of a call: resident ones, and missing ones, to be read into a buffer. It is `complete` if none is missing.

    Args:
        layer: the layer's index.
        window: the layer's window.
        ids: the neurons, sorted.
        step: block size, if the block is one of neighbours; else 0.
        d_ff: the layer's number of neurons.
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
        """Whether no read is left to be started."""
        return self.complete or self._reading is not None

    def is_alike(self, other: _Block) -> bool:
        """Whether both read the same neurons of the same layer into the same rows of a buffer."""
        return (
            self._layer == other._layer
            and np.array_equal(self.ids, other.ids)
            and np.array_equal(self._rows, other._rows)
            and np.array_equal(self._missing, other._missing)
        )

    def start(self, engine: Engine, free: list[torch.Tensor]) -> None:
        """Start to read missing neurons, if there are any, into a buffer taken from `free`."""
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
        """Wait for the read, and count it."""
        if self._reading is None:
            return
        try:
            read = self._reading.wait()
        except StoreReadError:
            if not self.is_early:
                raise
            self._start(engine)  # `forget` may have dropped it with the reads of another call
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
        """Keep in the window, or copy into it, what is worth keeping of this block and those before it."""
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
