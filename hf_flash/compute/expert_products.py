"""`ExpertProducts`: the products of tokens with the experts of a layer, read directly from their slots.

    few tokens for an expert     the compiled part multiplies all experts of a call at once, at the speed of DRAM (linear.c). A
                                 token gets the same bits beside others and alone
    many                         one expert at a time, in the fastest way for whole matrices (dense.py)
    other dtypes in the file     widened by the compiled part while it multiplies; else converted, one expert at a time
    numbers with scales          multiplied in their stored form, or decoded, some rows at a time (coded.py)

Sums are made in fp32 and rounded once to the compute dtype, as in the stock model, but perhaps in another order.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from hf_flash.base.arrays import Bytes
from hf_flash.compute import coded, dense
from hf_flash.compute import library as native
from hf_flash.compute.coded import CODES
from hf_flash.compute.library import DTYPES, LinearJob, LinearsJob, Scales
from hf_flash.store.experts import ExpertLayer, Piece

_JOB: Final = np.dtype(LinearJob)
_DECODED_BYTES: Final = 8 << 20  # bytes of plain numbers decoded at a time, if one block of rows is not more
_WIDENED: Final = {(torch.bfloat16, torch.float32), (torch.float16, torch.float32)}  # (file, compute): exact


class Group(NamedTuple):
    """Tokens that use one expert.

    Attributes:
        expert: the expert's number.
        slot: the slot that it is in.
        begin, end: its rows among all token-expert pairs of a call, which are ordered by expert.
    """

    expert: int
    slot: int
    begin: int
    end: int


class Waiting(Protocol):
    """Reads that are under way, for which either Python or the compiled part waits."""

    def wait(self) -> None:
        """Wait until they are done."""

    def hand_over(self) -> tuple[int | None, int]:
        """The reader and the ticket with which the compiled part waits instead of `wait`; ticket 0 if there is nothing."""
        ...

    def waited(self, error: int, seconds: float) -> None:
        """Report the result after `hand_over`: what `hf_read_wait` returned, and the seconds that were waited."""


def reads_as(piece: Piece, dtype: torch.dtype) -> bool:
    """Whether the compiled part can compute in this dtype with a piece in its stored form."""
    return piece.dtype == dtype or (piece.dtype, dtype) in _WIDENED or coded.is_known(piece)


def decoded_rows(piece: Piece, dtype: torch.dtype) -> int:
    """How many rows of a piece with scales are decoded to plain numbers at a time."""
    assert piece.scales is not None
    block = piece.scales.block_rows
    return min(piece.rows, max(1, _DECODED_BYTES // (block * piece.columns * decoded_size(piece, dtype))) * block)


def decoded_size(piece: Piece, dtype: torch.dtype) -> int:
    """The most bytes that decoding takes per number of a piece with scales, temporary copies included."""
    compiled = native.library() is not None and coded.is_known(piece)
    return dtype.itemsize if compiled else dtype.itemsize + 3 * torch.float32.itemsize


class ExpertProducts:
    """The products with one parameter of a layer's experts.

    Args:
        layer: the layer of the experts.
        param: the name of the parameter.
        at: [experts, ranges] the byte offset in a slot where each range of an expert begins.
        dtype: the compute dtype.
    """

    def __init__(self, layer: ExpertLayer, param: str, at: npt.NDArray[np.int64], dtype: torch.dtype) -> None:
        mine = [number for number, piece in enumerate(layer.pieces) if piece.param == param]
        scaled = [layer.scale_places[number] for number in mine]
        self.pieces, self.dtype = layer.of(param), dtype
        pieces = self.pieces
        self.at, self.scales_at = at[:, mine], np.where(np.array(scaled) < 0, 0, at[:, scaled])
        self.outputs, self.inputs = sum(piece.outputs for piece in pieces), pieces[0].inputs
        order = np.concatenate([piece.order for piece in pieces])
        in_order = np.array_equal(order, np.arange(self.outputs))
        self._order = None if in_order else torch.from_numpy(np.argsort(order))
        known = all(reads_as(piece, dtype) for piece in pieces)
        self._compiled = native.library() is not None and known
        self._template = self._jobs()

    def _jobs(self) -> npt.NDArray[Any]:
        """[pieces] jobs for the compiled part, with all fields that are the same for every expert."""
        jobs = np.zeros(len(self.pieces), _JOB)
        for job, piece in zip(jobs, self.pieces, strict=True):
            job["rows"], job["columns"], job["turned"] = piece.outputs, piece.inputs, piece.turned
            job["out_stride"], job["dtype"], job["weight_dtype"] = self.outputs, DTYPES[self.dtype], CODES[piece.dtype]
            job["scales"] = np.frombuffer(bytes(coded.scales_of(piece)), np.dtype(Scales))[0]
        return jobs

    def few(self, tokens: int) -> bool:
        """Whether an expert with so many tokens is multiplied together with other experts, by the compiled part."""
        return self._compiled and dense.few(tokens, self.dtype)

    def multiply(self, x: torch.Tensor, groups: Sequence[Group], memory: Memory, wait: Waiting | None = None) -> torch.Tensor:
        """The products of each group's tokens with its expert.

        Args:
            x: [pairs of these groups, inputs] in the compute dtype, contiguous; or [1, inputs]: the same for all.
            groups: in the order of their rows.
            memory: the slots that the experts are in.
            wait: reads that the calling thread waits for when it has nothing more to compute.

        Returns:
            [pairs of these groups, outputs].
        """
        first = groups[0].begin if groups else 0
        pairs = groups[-1].end - first if groups else 0
        out = torch.empty(pairs, self.outputs, dtype=self.dtype, device="cpu")
        if self._compiled and all(self.few(group.end - group.begin) for group in groups):
            self._together(x, groups, first, memory, out, wait)
        else:
            for group in groups:
                rows = slice(group.begin - first, group.end - first)
                mine = x if len(x) == 1 else x[rows]
                if self.few(group.end - group.begin):  # decided for each expert alone, so that others change no bits
                    self._together(mine, [group], group.begin, memory, out[rows], None)
                else:
                    self._alone(mine, group, memory, out[rows])
            if wait is not None:
                wait.wait()
        return out if self._order is None else out.index_select(1, self._order)

    def _together(
        self, x: torch.Tensor, groups: Sequence[Group], first: int, memory: Memory, out: torch.Tensor, wait: Waiting | None
    ) -> None:
        size = self.dtype.itemsize
        begin, end = (np.array([getattr(group, name) for group in groups], np.int64) - first for name in ("begin", "end"))
        jobs = np.tile(self._template, (len(groups), 1))
        experts = [group.expert for group in groups]
        slots = np.array([memory.address(group.slot) for group in groups], np.int64)[:, None]
        jobs["weight"], jobs["scales"]["at"] = slots + self.at[experts], slots + self.scales_at[experts]
        jobs["x"] = (x.data_ptr() + (begin * (len(x) > 1)) * self.inputs * size)[:, None]
        jobs["tokens"] = (end - begin)[:, None]
        ahead = np.cumsum([0, *(piece.outputs for piece in self.pieces[:-1])]) * size
        jobs["out"] = (out.data_ptr() + begin * self.outputs * size)[:, None] + ahead
        call = LinearsJob(jobs.ctypes.data, jobs.size, None, 0, threads=native.threads())
        if wait is not None:
            call.reader, call.ticket = wait.hand_over()
        if not native.loaded().hf_linears(ctypes.byref(call)):  # type: ignore[union-attr]
            raise MemoryError(f"no memory for {x.numel()} numbers")
        if wait is not None:
            wait.waited(call.error, call.waited_s)

    def _alone(self, x: torch.Tensor, group: Group, memory: Memory, out: torch.Tensor) -> None:
        """Many tokens with one expert."""
        at = 0
        for number, piece in enumerate(self.pieces):
            part = out[:, at : at + piece.outputs]
            at += piece.outputs
            begin, scales = int(self.at[group.expert, number]), int(self.scales_at[group.expert, number])
            if piece.scales is not None:  # the rows of such a piece are outputs
                for rows, weight in self._decoded(piece, memory.part(group.slot, begin), memory.part(group.slot, scales)):
                    part[:, rows] = dense.multiply(x, weight, None, memory.wide)
                continue
            weight = memory.matrix(group.slot, begin, piece).to(self.dtype)
            if piece.turned:
                part.copy_(dense.multiply_turned(x, weight, memory.wide))
            else:
                part.copy_(dense.multiply(x, weight, None, memory.wide))

    def _decoded(self, piece: Piece, numbers: Bytes, scales: Bytes) -> Iterator[tuple[slice, torch.Tensor]]:
        """A piece with scales as plain numbers, some rows at a time: [rows, inputs] in the compute dtype."""
        step = decoded_rows(piece, self.dtype)
        for begin in range(0, piece.rows, step):
            rows = slice(begin, min(begin + step, piece.rows))
            yield rows, coded.decode(piece, numbers, scales, rows, self.dtype)


class Memory:
    """The slots that hold experts, and a buffer for products with them.

    Args:
        slots: [slots, bytes], contiguous.
        wide: float32, contiguous, with room for a row of any expert's matrix: [`dense.multiply`] widens into it.
    """

    def __init__(self, slots: Bytes, wide: torch.Tensor) -> None:
        self.slots, self.wide = slots, wide
        self._base: int = slots.ctypes.data
        self._stride = slots.shape[1]

    def address(self, slot: int) -> int:
        return int(self._base + slot * self._stride)

    def part(self, slot: int, begin: int) -> Bytes:
        """The bytes of a slot from offset `begin` on, as a view."""
        return self.slots[slot, begin:]

    def matrix(self, slot: int, begin: int, piece: Piece) -> torch.Tensor:
        """A piece without scales in its stored dtype, [rows, columns], as a view."""
        raw = self.slots[slot, begin : begin + piece.nbytes]
        return torch.from_numpy(raw).view(piece.dtype).view(piece.rows, piece.columns)
