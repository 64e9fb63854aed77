"""`ExpertTokenStep`: a few tokens through the experts of one layer, in one call of the compiled part (compute/experts.c).

Decoding consists of such calls. Which calls these are follows from their shape alone, not from what is in memory: so a token
gets the same bits whatever is there.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hf_flash.base.arrays import Ids
from hf_flash.compute import dense
from hf_flash.compute import library as native
from hf_flash.compute.coded import CODES, scales_of
from hf_flash.compute.expert_gate import known_gate
from hf_flash.compute.expert_products import reads_as
from hf_flash.compute.library import DTYPES, MOST_PIECES, ExpertPiece, ExpertStep
from hf_flash.reading.experts import ExpertReader
from hf_flash.runtime.expert_slots import ExpertSlots, PassingSlots
from hf_flash.store.experts import ExpertLayer, Piece


class ExpertTokenStep:
    """The step of one layer; see [`expert_step`].

    Attributes:
        call: what the compiled part is told, and what it says after a call.
    """

    def __init__(
        self, call: ExpertStep, keep: Sequence[Any], dtype: torch.dtype, window: ExpertSlots, passing: PassingSlots
    ) -> None:
        self.call, self._keep, self._dtype = call, keep, dtype
        call.window, call.passing = ctypes.addressof(window.state), ctypes.addressof(passing.state)
        self._window, self._passing = window, passing
        library = native.loaded()
        assert library is not None  # whoever makes this has asked
        self._run, self._ahead, self._settle = library.hf_expert_step, library.hf_expert_ahead, library.hf_expert_settle

    def takes(self, tokens: int, top_k_weights: torch.Tensor) -> bool:
        """Whether this is a call of a few tokens."""
        return 0 < tokens and dense.few(tokens, self._dtype) and top_k_weights.dtype in DTYPES

    def run(self, x: torch.Tensor, index: Ids, weights: torch.Tensor, biases: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """What the layer makes of some tokens, [tokens, d_model] in the dtype of compute.

        Args:
            x: [tokens, d_model] in the dtype of compute, contiguous.
            index: [tokens, k] experts, contiguous. weights: [tokens, k] the router's, contiguous, in a dtype of `DTYPES`.
            biases: [experts, outputs] before and behind the gate, contiguous, in the dtype of compute.

        Raises:
            MemoryError: there is none for a few rows. What could not be read is in `call`.
        """
        call, out = self.call, torch.empty_like(x)
        call.x, call.index, call.weights, call.out = x.data_ptr(), index.ctypes.data, weights.data_ptr(), out.data_ptr()
        call.tokens, call.k = index.shape
        call.weights_dtype, call.threads = DTYPES[weights.dtype], native.threads()
        call.up_bias, call.down_bias = (None if bias is None else bias.data_ptr() for bias in biases)
        if not self._run(ctypes.byref(call)):
            raise MemoryError(f"no memory for {index.size} pairs of a token and an expert")
        return out

    def ahead(self, index: Ids) -> int:
        """Begin to read experts that the next call will probably use; returns how many are read.

        Args:
            index: [1, k] experts, contiguous.
        """
        self.call.index, self.call.k = index.ctypes.data, index.shape[1]
        return int(self._ahead(ctypes.byref(self.call)))

    def settle(self) -> None:
        """Wait for what was read on a guess: for those who use the slots without the compiled part."""
        self._settle(ctypes.byref(self.call))


def expert_step(
    stock: Any,
    layer: ExpertLayer,
    index: int,
    reader: ExpertReader,
    dtype: torch.dtype,
    slots: tuple[ExpertSlots, PassingSlots],
) -> ExpertTokenStep | None:
    """The step of a layer; `None` where there is no compiled part for it.

    Args:
        stock: the stock module of experts.
        index: of the layer.
        slots: of the layer, and those that all layers share.
    """
    gate = known_gate(stock)
    if gate is None or native.library() is None or stock.has_post_expert_norm or reader.queue is None:
        return None
    if len(layer.pieces) > MOST_PIECES or not all(piece.turns == 1 and reads_as(piece, dtype) for piece in layer.pieces):
        return None
    first = layer.of(layer.first)
    plan = reader.read_plan(index)
    at = np.ascontiguousarray(reader.places.at(index))
    call = ExpertStep(
        reader=reader.queue, pieces=len(layer.pieces), places=len(layer.ranges), up_pieces=len(first),
        up_outputs=sum(piece.outputs for piece in first),
        neurons=layer.neurons, width=layer.width, gate=gate, dtype=DTYPES[dtype], at=at.ctypes.data, files=reader.file_table,
        orders=plan.orders.ctypes.data, first_order=plan.first_order.ctypes.data, reads=plan.reads.ctypes.data,
        most_reads=max(plan.orders[:, 2].tolist()),
    )  # fmt: skip
    for number, (piece, place) in enumerate(zip(layer.pieces, layer.scale_places, strict=True)):
        call.piece[number] = _piece(piece, place)
    return ExpertTokenStep(call, [plan, at, reader], dtype, *slots)


def _piece(piece: Piece, place: int) -> ExpertPiece:
    code = CODES[piece.dtype]
    return ExpertPiece(piece.outputs, piece.inputs, piece.first_output, place, scales_of(piece), code, piece.turned)
