"""`ExpertTokenStep`: a few tokens through the experts of one layer, in one call of the compiled part (compute/experts.c).

Decoding consists of such calls. Whether a call is one of them follows from its shape alone, not from what is in memory: so a
token gets the same bits whatever the slots hold.
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
    """The step of one layer. Made by [`expert_step`].

    Args:
        call: arguments and results of the compiled part.
        keep: objects whose memory `call` points to.
        dtype: the compute dtype.
        window: the layer's slots.
        passing: slots that all layers share.

    Attributes:
        call: arguments and results of the compiled part.
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
        """Whether a call is one for this step: few tokens, with router weights in a dtype of `DTYPES`."""
        return 0 < tokens and dense.few(tokens, self._dtype) and top_k_weights.dtype in DTYPES

    def run(self, x: torch.Tensor, index: Ids, weights: torch.Tensor, biases: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """The layer's output for some tokens, [tokens, d_model] in the compute dtype. `call` says if a read failed.

        Args:
            x: [tokens, d_model] in the compute dtype, contiguous.
            index: int64 [tokens, k] the experts that the router named, contiguous.
            weights: [tokens, k] the router's weights, contiguous, in a dtype of `DTYPES`.
            biases: two, of the products before and after the gate: [experts, outputs], contiguous, in the compute dtype, or
                `None`.

        Raises:
            MemoryError: there is no memory for a few rows.
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
        """Start to read experts that the next call will probably use; returns how many are read.

        Args:
            index: int64 [1, k] experts, contiguous.
        """
        self.call.index, self.call.k = index.ctypes.data, index.shape[1]
        return int(self._ahead(ctypes.byref(self.call)))

    def settle(self) -> None:
        """Wait for reads that [`ahead`] started. Call it before the slots are used without the compiled part."""
        self._settle(ctypes.byref(self.call))


def expert_step(
    stock: Any,
    layer: ExpertLayer,
    index: int,
    reader: ExpertReader,
    dtype: torch.dtype,
    slots: tuple[ExpertSlots, PassingSlots],
) -> ExpertTokenStep | None:
    """The [`ExpertTokenStep`] of a layer; `None` if the compiled part is missing or does not support the layer.

    Args:
        stock: the stock module of experts.
        layer: its experts on flash.
        index: number of the layer among those with experts.
        reader: reads the experts.
        dtype: the compute dtype.
        slots: the layer's slots, and those that all layers share.
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
