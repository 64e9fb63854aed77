"""A predictor that no library has: the deciding matrix itself, in 16 bits. It is what CONTRIBUTING.md asks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hf_flash.families.base import Shape
from hf_flash.predictors.base import Predictor, made_up_tensor, narrowed, read_tensors
from hf_flash.predictors.choice import PredictorKind
from hf_flash.store.layer_file import LayerStore
from hf_flash.store.layout import FlashStore
from hf_flash.store.safetensors_files import TensorSpec


class Mirror(Predictor):
    def __init__(self, rows: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.rows, self.bias, self.nbytes = rows, bias, rows.nbytes

    def select(self, x: torch.Tensor, allowed: torch.Tensor | None = None) -> torch.Tensor:
        scores = [self.rows.float() @ token for token in x.float()]  # one token at a time, whatever is beside it
        score = torch.stack(scores) + (0.0 if self.bias is None else self.bias.float())
        return narrowed(~(score <= -0.05), allowed)


@dataclass(frozen=True)
class MirrorFormat:
    kind = "mirror"
    variant = "mirror-16"
    detail = "16 bits"
    assumed_margin = None

    @property
    def arguments(self) -> Mapping[str, Any]:
        return {"predictor": self.kind}

    def specs(self, layer: LayerStore) -> dict[str, TensorSpec]:
        return self.shapes(layer.prefix, layer.d_ff, layer.d_model)

    def shapes(self, prefix: str, d_ff: int, d_model: int) -> dict[str, TensorSpec]:
        return {f"{prefix}.predictor.rows": (torch.bfloat16, (d_ff, d_model))}

    def tensors(self, layer: LayerStore) -> Iterator[torch.Tensor]:
        yield layer.part(layer.unit.deciding)[:].bfloat16()

    def dram_bytes(self, shape: Shape) -> int:
        return torch.bfloat16.itemsize * shape.d_model * sum(shape.widths)

    def load(self, store: FlashStore, layer: LayerStore, bias: torch.Tensor | None) -> Mirror:
        return Mirror(read_tensors(store.predictors[self.variant], f"{layer.prefix}.predictor")["rows"], bias)

    def made_up(self, d_ff: int, d_model: int) -> Mirror:
        return Mirror(made_up_tensor((torch.bfloat16, (d_ff, d_model))), None)


def in_store(store: FlashStore) -> list[MirrorFormat]:
    return [MirrorFormat()] if MirrorFormat.variant in store.predictors else []


MIRROR = PredictorKind((MirrorFormat.variant,), in_store, from_weights=lambda wish: MirrorFormat())
