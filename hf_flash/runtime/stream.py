"""Stream."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from hf_flash.base.arrays import Ids, Mask, uses
from hf_flash.compute.arithmetic import OneToken, Scratch, SeveralTokens, block_rows
from hf_flash.compute.kernels import addresses, copy_rows
from hf_flash.reading.reader import ReadCount, Reading
from hf_flash.runtime.counters import Counters
from hf_flash.runtime.engine import Engine
from hf_flash.runtime.layer import FlashFFN


class _Call:
    """What one forward computes, and in which blocks.

    Attributes:
        blocks: sorted ids. One token: `step` neurons of those it uses. Several: those used of `step` neighbours, which lie
            together on flash; in the window, where that matters to nobody, `step` used ones if every token is on its own.
        one_block: whether one token is done with a single one.
        apart: whether rows are multiplied wherever they lie, each with the tokens that use it (`add_apart`).
        spans: whether blocks are of neighbours.
        most: whether these are most of the layer's neurons.
    """

    def __init__(
        self, scratch: Scratch, ffn: FlashFFN, x: torch.Tensor, selected: torch.Tensor | None, ids: Ids, streamed: bool
    ) -> None:
        self._scratch, self._ffn, self._x = scratch, ffn, x
        self.step = block_rows(ffn.d_ff, len(x))
        self.one_block = len(x) == 1 and len(ids) <= self.step
        self.most = 2 * len(ids) > ffn.d_ff
        self._several = SeveralTokens(scratch, ffn.activation, x, selected, len(ids), ffn.bias) if len(x) > 1 else None
        self.apart = self._several is not None and self._several.apart
        self.spans = self._several is not None and (streamed or not self.apart)
        if self.spans:
            ends = np.searchsorted(ids, np.arange(0, ffn.d_ff + self.step, self.step)).tolist()
            self.blocks = [ids[start:end] for start, end in itertools.pairwise(ends) if end > start]
        else:
            self.blocks = [ids[at : at + self.step] for at in range(0, len(ids), self.step)]

    def add(self, matrix: torch.Tensor, rows: Ids, ids: Ids, out: torch.Tensor) -> None:
        """Add a block's share to `out` [tokens, d_model] float32; `rows` of `matrix` [any, 2 * d_model] hold neurons `ids`."""
        ffn = self._ffn
        if self.apart:
            self.add_apart(addresses(matrix, rows), ids, out)
        elif self._several is not None:
            before = self._several.add(matrix, rows, ids, out)
            if ffn.observer is not None:
                ffn.observer(self._several.x, ids, before)
        else:
            token = OneToken(self._scratch, ffn.activation, self._x, ffn.bias, matrix, rows, ids, one_block=self.one_block)
            token.finish(out)

    def add_apart(self, places: Ids, ids: Ids, out: torch.Tensor) -> None:
        """Only if `apart`: the same for neurons at addresses `places`."""
        assert self._several is not None
        self._several.add_apart(places, ids, out)


class _Block:
    """Some neurons of a call: resident ones, and others that are to be read into a buffer. It is `complete` without those."""

    buffer: torch.Tensor

    def __init__(self, ffn: FlashFFN, call: _Call, ids: Ids) -> None:
        self._layer, self._window, self.ids = ffn.index, ffn.window, ids
        slots = ffn.window.slot_of[ids]
        self._there, self._away = np.flatnonzero(slots >= 0), np.flatnonzero(slots < 0)
        self.complete = len(self._away) == 0
        first = int(ids[0]) // call.step * call.step
        self._span = (first, min(first + call.step, ffn.d_ff)) if call.spans else None
        self._rows: Ids = ids - first if call.spans else np.arange(len(ids))
        self._reading: Reading | None = None

    def start(self, engine: Engine, free: list[torch.Tensor]) -> None:
        """Start to read what is missing, if anything is, into a buffer taken from `free`."""
        if self.complete:
            return
        self.buffer, missing, rows = free.pop(0), self.ids[self._away], self._rows[self._away]
        if self._span is not None:
            missing = engine.reader.bridged(self._layer, missing, *self._span, self.buffer)
            rows = missing - self._span[0]
        self._reading = engine.reader.start(self._layer, missing, self.buffer, rows, background=True)

    def arrive(self, engine: Engine) -> None:
        """Wait until what is read is there, and count it."""
        if self._reading is not None:
            _note(engine.counters, self._reading.wait())

    def compute(self, engine: Engine, call: _Call, out: torch.Tensor) -> None:
        """Add the share of these neurons to `out`."""
        matrix, slots, there = self._window.matrix, self._window.slot_of[self.ids[self._there]], self._there
        if self.complete:
            call.add(matrix, slots, self.ids, out)
        elif call.apart:
            places = addresses(self.buffer, self._rows)
            places[there] = addresses(matrix, slots)
            call.add_apart(places, self.ids, out)
        else:  # in id order in one matrix; over what was read through
            _copy_rows(engine.scratch, matrix, slots, self.buffer, self._rows[there])
            call.add(self.buffer, self._rows, self.ids, out)

    def keep(self, engine: Engine, keep: Mask) -> None:
        """Leave in the window, or take into it, what is worth keeping."""
        window, ids = self._window, self.ids
        there = ids[self._there]
        window.evict(there[~keep[there]])
        staying = self._away[keep[ids[self._away]]][: window.free]
        if len(staying):
            slots = window.reserve(len(staying))
            _copy_rows(engine.scratch, self.buffer, self._rows[staying], window.matrix, slots)
            window.commit(ids[staying], slots)


def _note(counters: Counters, read: ReadCount) -> None:
    counters.read_bytes += read.nbytes
    counters.reads += read.chunks


def _copy_rows(scratch: Scratch, source: torch.Tensor, those: Ids, target: torch.Tensor, places: Ids) -> None:
    """`target[places] = source[those]`; without the compiled part some rows at a time through a scratch buffer."""
    if copy_rows(source, those, target, places):
        return
    step = len(scratch.gathered)
    for at in range(0, len(those), step):
        part = torch.from_numpy(those[at : at + step])
        picked = torch.index_select(source, 0, part, out=scratch.gathered[: len(part)])
        target.index_copy_(0, torch.from_numpy(places[at : at + step]), picked)


def _union(selected: torch.Tensor) -> Ids:
    """Sorted ids of the neurons that any token selected."""
    return np.flatnonzero(selected[0].numpy() if len(selected) == 1 else uses(selected.numpy()))
