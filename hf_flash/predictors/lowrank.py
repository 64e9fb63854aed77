"""The paper's predictor: two thin matrices per layer, trained on the model's own activations (section 3.1, appendix B).

Neuron i is called active when

    B_i . (A x) + offset_i  >  0            A [rank, d_model], B [d_ff, rank]

The offset includes the bias of the deciding projection and the layer's threshold. `calibrate` chooses the rank of each layer. A
and B are kept in 8 bits with one scale per row, which has no measurable effect on the result and halves memory and time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import torch

from hf_flash.errors import StoreFormatError
from hf_flash.families.base import Shape
from hf_flash.predictors.base import CPU, Predictor, made_up_tensor, narrowed, read_tensors
from hf_flash.predictors.low_bit import Scores, by_tokens, matrix_in, quantize_rows
from hf_flash.store.layer_file import LayerStore
from hf_flash.store.layout import FlashStore
from hf_flash.store.safetensors_files import TensorSpec, read_header

VARIANT: Final = "lowrank"


@dataclass(frozen=True)
class LowRankFormat:
    """The ranks of a low-rank predictor, by layer."""

    ranks: tuple[int, ...]

    kind = "lowrank"
    assumed_margin = None

    @property
    def arguments(self) -> dict[str, Any]:
        return {"predictor": self.kind}

    @property
    def detail(self) -> str:
        low, high = min(self.ranks), max(self.ranks)
        return f"rank {low}" + (f" to {high}" if high > low else "")

    @property
    def variant(self) -> str:
        return VARIANT

    def specs(self, layer: LayerStore) -> dict[str, TensorSpec]:
        return lowrank_specs(layer.prefix, layer.d_ff, layer.d_model, self.ranks[layer.index])

    def dram_bytes(self, shape: Shape) -> int:
        ranks = zip(self.ranks, shape.widths, strict=True)
        return sum(lowrank_bytes(rank, d_ff, shape.d_model) for rank, d_ff in ranks)

    def made_up(self, d_ff: int, d_model: int) -> LowRankPredictor:
        specs = lowrank_specs("x", d_ff, d_model, fast_rank(sum(self.ranks) / len(self.ranks)))
        return LowRankPredictor({name.rpartition(".")[2]: made_up_tensor(spec) for name, spec in specs.items()})

    def load(
        self, store: FlashStore, layer: LayerStore, bias: torch.Tensor | None, device: torch.device = CPU
    ) -> LowRankPredictor:
        return LowRankPredictor(read_tensors(store.predictors[VARIANT], f"{layer.prefix}.predictor"), device)

    @classmethod
    def of(cls, store: FlashStore) -> LowRankFormat | None:
        """The format of the low-rank predictor in a store, if there is one."""
        path = store.predictors.get(VARIANT)
        if path is None:
            return None
        tensors, ranks = read_header(path)[0], []
        for layer in store.layers:
            name = f"{layer.prefix}.predictor.a_codes"
            shape = tensors[name][0][1] if name in tensors else ()
            if len(shape) != 2 or shape[0] < 1:
                raise StoreFormatError("the predictor lacks a layer", where=path, expected=f"{name} [rank, d_model]", got=shape)
            ranks.append(shape[0])
        return cls(tuple(ranks))


def expected_low_rank(shape: Shape) -> LowRankFormat:
    """The format that calibration will probably produce, by the paper's ranks: 128, and 1024 in the last 4 of 32 layers, at
    d_model 4096."""
    wide, narrow = shape.layers // 8, shape.layers - shape.layers // 8
    return LowRankFormat((fast_rank(shape.d_model // 32),) * narrow + (fast_rank(shape.d_model // 4),) * wide)


def fast_rank(rank: float) -> int:
    """The next higher rank for which torch has a fast product."""
    return max(16, math.ceil(rank / 16) * 16)


def lowrank_specs(prefix: str, d_ff: int, d_model: int, rank: int) -> dict[str, TensorSpec]:
    """The tensors of one layer, in file order."""
    return {
        f"{prefix}.predictor.a_codes": (torch.int8, (rank, d_model)),
        f"{prefix}.predictor.a_scales": (torch.bfloat16, (rank, 1)),
        f"{prefix}.predictor.b_codes": (torch.int8, (d_ff, rank)),
        f"{prefix}.predictor.b_scales": (torch.bfloat16, (d_ff, 1)),
        f"{prefix}.predictor.offset": (torch.float32, (d_ff,)),
    }


def lowrank_bytes(rank: int, d_ff: int, d_model: int) -> int:
    """Bytes that one layer takes, on disk and in DRAM."""
    return rank * (d_model + d_ff) + 2 * (rank + d_ff) + 4 * d_ff


def pack_lowrank(a: torch.Tensor, b: torch.Tensor, offset: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of one layer from its float matrices `a` [rank, d_model], `b` [d_ff, rank] and `offset` [d_ff]."""
    down, up = quantize_rows(a, 8, a.shape[1]), quantize_rows(b, 8, b.shape[1])
    return {
        "a_codes": down["codes"],
        "a_scales": down["scales"],
        "b_codes": up["codes"],
        "b_scales": up["scales"],
        "offset": offset.float().clone(),
    }


class LowRankPredictor(Predictor):
    """The loaded predictor. Args: `tensors` as [`pack_lowrank`] returns them; `device` computes.

    It was trained with the model's biases at that time and does not follow later changes, so `bias` has no effect.
    """

    def __init__(self, tensors: dict[str, torch.Tensor], device: torch.device = CPU) -> None:
        a, b = (matrix_in(device, tensors[f"{name}_codes"], tensors[f"{name}_scales"], None, 0) for name in "ab")
        offset = tensors["offset"].to(device, copy=True)
        self._scores = Scores(b, offset, first=a)
        self.nbytes = a.nbytes + b.nbytes + offset.nbytes

    def select(self, x: torch.Tensor, allowed: torch.Tensor | None = None) -> torch.Tensor:
        return narrowed(by_tokens(x.bfloat16(), self._scores.called_active), allowed)

    def score(self, x: torch.Tensor) -> torch.Tensor:
        """Logits, float32 [tokens, d_ff]: positive for neurons called active."""
        return self._scores(x.bfloat16())
