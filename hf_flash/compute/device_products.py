"""`DeviceProducts`: the products of tokens with experts that lie in packed slots on a device, by torch's own operators.

Each expert has a product of its own, so that its result does not depend on which other experts are on the device. In a call of
a few tokens, each expert is multiplied with every token, whether the token uses it or not: a device's library chooses the order
of a sum by the shape, and so a token's bits do not depend on the tokens beside it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from hf_flash.compute.coded import decode_with_torch
from hf_flash.store.experts import ExpertLayer, Piece


class _Part(NamedTuple):
    """A piece of an expert, and the byte offsets of its numbers and its scales in a packed slot."""

    piece: Piece
    at: int
    scales_at: int


class DeviceProducts:
    """The products with one parameter of a layer's experts.

    Args:
        layer: the layer of the experts.
        param: the name of the parameter.
        dtype: the compute dtype.
        device: the device of the slots.
    """

    def __init__(self, layer: ExpertLayer, param: str, dtype: torch.dtype, device: torch.device) -> None:
        at = layer.packed_at
        self._parts = [
            _Part(piece, at[number], at[place])
            for number, (piece, place) in enumerate(zip(layer.pieces, layer.scale_places, strict=True))
            if piece.param == param
        ]
        self.dtype, self.outputs = dtype, sum(part.piece.outputs for part in self._parts)
        order = np.concatenate([part.piece.order for part in self._parts])
        in_order = np.array_equal(order, np.arange(self.outputs))
        self._order = None if in_order else torch.from_numpy(np.argsort(order)).to(device)

    def multiply(self, x: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        """The products of some tokens with one parameter of one expert.

        Args:
            x: [tokens, inputs] in the compute dtype, on the device.
            slot: the expert's packed slot, uint8 [bytes], contiguous.

        Returns:
            [tokens, outputs].
        """
        found = [self._product(x, slot, part) for part in self._parts]
        out = found[0] if len(found) == 1 else torch.cat(found, dim=1)
        return out if self._order is None else out.index_select(1, self._order)

    def _product(self, x: torch.Tensor, slot: torch.Tensor, part: _Part) -> torch.Tensor:
        piece = part.piece
        numbers = slot[part.at : part.at + piece.nbytes]
        if piece.scales is None:
            weight = numbers.view(piece.dtype).view(piece.rows, piece.columns).to(self.dtype)
            return x @ weight if piece.turned else F.linear(x, weight)
        scales = slot[part.scales_at : part.scales_at + piece.scale_bytes]
        return F.linear(x, decode_with_torch(piece, numbers, scales, slice(0, piece.rows)).to(self.dtype))
