"""`ExpertStack`: a parameter of a module of experts as the stock model has it, for code that asks for it by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from hf_flash.base.arrays import Bytes
from hf_flash.base.files import StoredFile
from hf_flash.compute.coded import decode
from hf_flash.runtime.flash_weights import StoredWeight
from hf_flash.store.checkpoint import Checkpoint
from hf_flash.store.experts import ExpertLayer


@dataclass(frozen=True)
class ExpertStack(StoredWeight):
    """All experts of a layer in one parameter [experts, outputs, inputs], or [experts, inputs, outputs] if it is `turned`.

    Attributes:
        layer: the layer's experts.
        param: the parameter's name in the module.
        checkpoint: the checkpoint whose files hold the experts.
        turned: whether the module's matrices have inputs first.
        dtype: the compute dtype.
    """

    layer: ExpertLayer
    param: str
    checkpoint: Checkpoint
    turned: bool
    dtype: torch.dtype

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.layer.name}.{self.param}"

    @property
    def layer_name(self) -> str:
        return self.layer.name

    @property
    def shape(self) -> tuple[int, int, int]:
        pieces = self.layer.of(self.param)
        outputs, inputs = sum(piece.outputs for piece in pieces), pieces[0].inputs
        return (self.layer.experts, inputs, outputs) if self.turned else (self.layer.experts, outputs, inputs)

    def _read(self, out: torch.Tensor) -> None:
        for expert in range(self.layer.experts):
            matrix = out[expert].T if self.turned else out[expert]
            for order, rows in self._pieces(expert):
                matrix[order] = rows

    def _equals(self, other: torch.Tensor) -> bool:
        by_expert = other.mT if self.turned else other
        return all(
            torch.equal(by_expert[expert][order].cpu().to(self.dtype), rows)
            for expert in range(self.layer.experts)
            for order, rows in self._pieces(expert)
        )

    def _pieces(self, expert: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """An expert's pieces of this parameter: which outputs, and their rows [outputs, inputs] in the compute dtype."""
        for number, (piece, place) in enumerate(zip(self.layer.pieces, self.layer.scale_places, strict=True)):
            if piece.param == self.param:
                raw = self._range(expert, number)
                if piece.scales:
                    yield (
                        torch.from_numpy(piece.order),
                        decode(piece, raw, self._range(expert, place), slice(0, piece.rows), self.dtype),
                    )
                    continue
                stored = torch.from_numpy(raw).view(piece.dtype).view(piece.rows, piece.columns)
                yield torch.from_numpy(piece.order), (stored.T if piece.turned else stored).to(self.dtype)

    def _range(self, expert: int, number: int) -> Bytes:
        """The bytes of one of an expert's ranges, as stored in the file."""
        path, offset = self.checkpoint.place(self.layer.tensors[expert][number])
        with StoredFile(path) as file:
            raw = file.read(self.layer.ranges[number], offset + int(self.layer.begin[expert, number]))
        return np.frombuffer(bytearray(raw), np.uint8)
