"""The quantized predictor: a low-bit copy q of the deciding projection w (up, or the gate) stays in DRAM.

If it is made from weights alone, neuron i is called active when

    q_i . x + b_i + margin * ||w_i - q_i|| * ||x|| / sqrt(d_model)  >  0

The last term is `margin` standard deviations of the rounding error of the sum, *if* rounding errors and inputs are
independent and inputs spread evenly over the columns. It needs no training and no data.

Large OPTs have outlier features: a few columns of x that are always large and never change sign. Then the error is mostly a
constant, which the margin has to cover although it could be known. `hf-flash calibrate` measures the error instead: with
e_i = q_i - w_i and the mean m and covariance C of the layer's real inputs,

    q_i . x + b_i - e_i . m + margin * sqrt(e_i' C e_i)  >  0

and the margin of each layer is the one that finds the wanted share of the active neurons on held-out text.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from hf_flash.config_arguments import ARGUMENTS
from hf_flash.errors import ConfigError
from hf_flash.families.base import Shape
from hf_flash.predictors.base import CPU, Predictor, belonging, check_specs, made_up_tensor, narrowed, read_tensors
from hf_flash.predictors.low_bit import Scores, by_tokens, matrix_in, quantize_rows
from hf_flash.store.layer_file import LayerStore
from hf_flash.store.layout import FlashStore
from hf_flash.store.safetensors_files import TensorSpec

DEFAULT_MARGIN: Final = {4: 1.5, 8: 3.0}
_FOUR_BITS, _EIGHT_BITS = "int4-g", "int8"
VARIANTS: Final = (_FOUR_BITS + "N", _EIGHT_BITS)  # N: the group size
WEIGHTS_AT_A_TIME: Final = 1 << 19  # weights quantized at a time; three times faster if they fit into a core's cache


@dataclass(frozen=True)
class QuantizedFormat:
    """Describes a quantized predictor by its bits and group size.

    Args:
        bits: 4 or 8.
        group_size: columns that share a scale, in 4 bits.
        margin: standard deviations of rounding error to allow for. `None`: the measured margin if the store was calibrated,
            else `DEFAULT_MARGIN`.
    """

    bits: int
    group_size: int
    margin: float | None = None

    kind = "quantized"

    @property
    def assumed_margin(self) -> float:
        return DEFAULT_MARGIN[self.bits]

    @property
    def arguments(self) -> dict[str, Any]:
        return {"predictor": self.kind, "predictor_bits": self.bits, "predictor_group_size": self.group_size}

    @property
    def detail(self) -> str:
        return self.variant

    @property
    def variant(self) -> str:
        return f"{_FOUR_BITS}{self.group_size}" if self.bits == 4 else _EIGHT_BITS

    def group(self, d_model: int) -> int:
        """Columns that share a scale: in 8 bits the whole row, else the greatest common divisor of group size and d_model."""
        return d_model if self.bits == 8 else math.gcd(self.group_size, d_model)

    def specs(self, layer: LayerStore) -> dict[str, TensorSpec]:
        return self.shapes(layer.prefix, layer.d_ff, layer.d_model)

    def shapes(self, prefix: str, d_ff: int, d_model: int) -> dict[str, TensorSpec]:
        """The tensors of one layer, in file order. Raises `ConfigError` for 4 bits and an odd d_model."""
        if self.bits == 4 and d_model % 2:
            raise ConfigError(
                "two 4-bit codes share a byte, but d_model is odd", where=prefix, got=d_model, hint="use predictor_bits=8"
            )
        groups = d_model // self.group(d_model)
        codes: TensorSpec = (torch.uint8, (d_ff, d_model // 2)) if self.bits == 4 else (torch.int8, (d_ff, d_model))
        zeros: dict[str, TensorSpec] = {f"{prefix}.predictor.zeros": (torch.bfloat16, (d_ff, groups))} if self.bits == 4 else {}
        return {
            f"{prefix}.predictor.codes": codes,
            f"{prefix}.predictor.scales": (torch.bfloat16, (d_ff, groups)),
            **zeros,
            f"{prefix}.predictor.error": (torch.float32, (d_ff,)),
        }

    def tensors(self, layer: LayerStore) -> Iterator[torch.Tensor]:
        """The tensors of one layer, made from its bundles, in pieces."""
        copied, group = layer.part(layer.unit.deciding), self.group(layer.d_model)
        rows = max(1, WEIGHTS_AT_A_TIME // layer.d_model)
        parts = [quantize_rows(piece, self.bits, group) for piece in copied.pieces(rows)]
        for name in parts[0]:
            yield from (part[name] for part in parts)

    def dram_bytes(self, shape: Shape) -> int:
        groups = shape.d_model // self.group(shape.d_model)
        neuron = shape.d_model // 2 + 4 * groups if self.bits == 4 else shape.d_model + 2
        return sum(shape.widths) * (neuron + 4)  # 4: the margin

    def made_up(self, d_ff: int, d_model: int) -> QuantizedPredictor:
        tensors = {name.rpartition(".")[2]: made_up_tensor(spec) for name, spec in self.shapes("x", d_ff, d_model).items()}
        return QuantizedPredictor(tensors, None, self, tensors["error"])

    def load(
        self, store: FlashStore, layer: LayerStore, bias: torch.Tensor | None, device: torch.device = CPU
    ) -> QuantizedPredictor:
        tensors = read_tensors(store.predictors[self.variant], f"{layer.prefix}.predictor")
        margin, measured = self.margins(store, layer, tensors["error"])
        return QuantizedPredictor(tensors, bias, self, margin, device, measured=measured)

    def margins(self, store: FlashStore, layer: LayerStore, error: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """The arguments `margin` and `measured` of a layer's [`QuantizedPredictor`]; `error` [d_ff] is one of its tensors."""
        found = read_measured(store, layer, self.variant)
        if found is None:
            margin = DEFAULT_MARGIN[self.bits] if self.margin is None else self.margin
            return error * (margin / math.sqrt(layer.d_model)), False
        margin = float(found["margin"]) if self.margin is None else self.margin
        return margin * found["spread"] - found["shift"], True


def quantized_formats(store: FlashStore) -> list[QuantizedFormat]:
    """The quantized predictors in a store."""
    groups = [int(name.removeprefix(_FOUR_BITS)) for name in store.predictors if re.fullmatch(_FOUR_BITS + "[0-9]+", name)]
    any_group = ARGUMENTS["predictor_group_size"].default  # in 8 bits it has no effect
    eight = [QuantizedFormat(8, any_group)] if _EIGHT_BITS in store.predictors else []
    return [QuantizedFormat(4, group) for group in sorted(groups)] + eight


class QuantizedPredictor(Predictor):
    """The loaded predictor.

    Args:
        tensors: as [`quantize_rows`] returns them, for the whole layer.
        bias: [d_ff] of the deciding projection, or `None`. It is the layer's own tensor, not a copy, and may be replaced.
        fmt: the predictor's format.
        margin: float32 [d_ff], added to the score; multiplied by the norm of the token if it was not measured.
        device: the device that computes.
        measured: whether `margin` was measured.
    """

    def __init__(
        self,
        tensors: dict[str, torch.Tensor],
        bias: torch.Tensor | None,
        fmt: QuantizedFormat,
        margin: torch.Tensor,
        device: torch.device = CPU,
        *,
        measured: bool = False,
    ) -> None:
        codes = tensors["codes"]
        product = matrix_in(device, codes, tensors["scales"], tensors.get("zeros"), fmt.group(2 * codes.shape[1]))
        self._scores, self._measured = Scores(product, margin.to(device), bias), measured
        self.nbytes = product.nbytes + margin.nbytes

    @property
    def bias(self) -> torch.Tensor | None:
        return self._scores.bias

    @bias.setter
    def bias(self, bias: torch.Tensor | None) -> None:
        if bias is not self._scores.bias:
            self._scores = replace(self._scores, bias=bias)

    def with_margin(self, margin: torch.Tensor, *, measured: bool) -> QuantizedPredictor:
        """The same weights, not copied, with another margin."""
        other = copy.copy(self)
        other._scores, other._measured = replace(self._scores, shift=margin), measured
        return other

    def select(self, x: torch.Tensor, allowed: torch.Tensor | None = None) -> torch.Tensor:
        def called_active(part: torch.Tensor) -> torch.Tensor:
            return self._scores.called_active(part.bfloat16(), self._shift_scale(part))

        return narrowed(by_tokens(x, called_active), allowed)

    def score(self, x: torch.Tensor) -> torch.Tensor:
        """The scores, [tokens, d_ff]: positive for neurons called active."""
        return self._scores(x.bfloat16(), self._shift_scale(x))

    def _shift_scale(self, x: torch.Tensor) -> torch.Tensor | None:
        """The factor of the margin for each token, float32 [tokens]; `None`: 1."""
        return None if self._measured else torch.linalg.vector_norm(x, dim=1, dtype=torch.float32)


# --- measured on real inputs ------------------------------------------------------------------------------------------


def read_measured(store: FlashStore, layer: LayerStore, variant: str) -> dict[str, torch.Tensor] | None:
    """`shift` and `spread` float32 [d_ff] and `margin` float32 [1] of a quantized predictor; `None` if not calibrated."""
    if store.calibration is None:
        return None
    prefix = f"{layer.prefix}.calibration.{variant}"
    specs = measured_specs(layer, variant)
    tensors = belonging(store, store.calibration)
    if not specs.keys() & tensors.keys():
        return None
    check_specs(store.calibration, tensors, specs)
    return read_tensors(store.calibration, prefix)


def measured_specs(layer: LayerStore, variant: str) -> dict[str, TensorSpec]:
    """The tensors of the calibration file that [`read_measured`] reads."""
    prefix, vector = f"{layer.prefix}.calibration.{variant}", (torch.float32, (layer.d_ff,))
    return {f"{prefix}.shift": vector, f"{prefix}.spread": vector, f"{prefix}.margin": (torch.float32, (1,))}
