"""The measured margin: how far below zero a quantized predictor must look to find nearly all active neurons of real text.

Rounding adds an error to a quantized predictor's score of a neuron. Without calibration its size is assumed; here its mean
(`shift`) and its standard deviation (`spread`) follow from the mean and the covariance of the layer's real inputs. Held-out
text then tells how many spreads wide the margin must be.
"""

from __future__ import annotations

from typing import Final

import torch

from hf_flash.calibration.activity import Activations, reached_by
from hf_flash.predictors.base import find_predictor, read_tensors
from hf_flash.predictors.low_bit import widen
from hf_flash.predictors.quantized import DEFAULT_MARGIN, WEIGHTS_AT_A_TIME, QuantizedFormat, QuantizedPredictor
from hf_flash.store.layer_file import LayerStore
from hf_flash.store.layout import FlashStore

MEASURED_RECALL: Final = 0.999  # share of the active neurons that a measured margin has to find


def rounding(
    store: FlashStore, layer: LayerStore, fmt: QuantizedFormat, mean: torch.Tensor, covariance: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean `shift` and standard deviation `spread` of the rounding error in each neuron's score, float32 [d_ff] each.

    Args:
        store, layer: the weights, and the predictor that is stored with them.
        fmt: the predictor's format.
        mean, covariance: of the layer's inputs, [d_model] and [d_model, d_model].
    """
    tensors = read_tensors(find_predictor(store, fmt), f"{layer.prefix}.predictor")
    up, shift, spread = layer.part(layer.unit.deciding), [], []
    rows = max(1, WEIGHTS_AT_A_TIME // layer.d_model)
    for at in range(0, layer.d_ff, rows):
        part = {name: tensor[at : at + rows] for name, tensor in tensors.items()}
        error = widen(part["codes"], part["scales"], part.get("zeros")) - up[at : at + rows].float()
        shift.append(error @ mean)
        spread.append(((error @ covariance) * error).sum(1).clamp_(min=0).sqrt())
    return torch.cat(shift), torch.cat(spread)


def measure_margin(
    store: FlashStore,
    layer: LayerStore,
    fmt: QuantizedFormat,
    bias: torch.Tensor | None,
    data: Activations,
    mean: torch.Tensor,
    covariance: torch.Tensor,
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Measure the margin that finds nearly all active neurons of held-out tokens, and compare rounding with what was assumed.

    Args:
        store, layer: the weights, and the predictor that is stored with them.
        fmt: the predictor's format.
        bias: bias [d_ff] of the projection that decides, if it has one.
        data: the layer's recorded activations.
        mean, covariance: of the layer's inputs, [d_model] and [d_model, d_model].

    Returns:
        A report, and the tensors that [`read_measured`] gives back.
    """
    shift, spread = rounding(store, layer, fmt, mean, covariance)
    stored = read_tensors(store.predictors[fmt.variant], f"{layer.prefix}.predictor")
    predictor = QuantizedPredictor(stored, bias, fmt, -shift, measured=True)
    spread = spread.clamp_(min=float(spread.mean()) * 1e-3 + 1e-12)
    chunks = list(data.held_out_chunks)
    lacking = reached_by(
        MEASURED_RECALL, lambda: ((predictor.score(data.x[rows]) / spread)[data.active(rows)] for rows in chunks)
    )
    margin = DEFAULT_MARGIN[8] if lacking is None else max(0.0, -lacking)  # the default if no neuron is ever active
    positives, selected, found = data.judge(lambda x: predictor.score(x) + margin * spread > 0)
    size = covariance.diagonal() + mean.square()  # mean square of each input
    assumed = stored["error"].square().mean() * size.mean()
    report = {
        "margin": margin,
        "recall": found / positives if positives else 1.0,
        "selected": selected / max(1, positives),
        "shift_in_spreads": float((shift.abs() / spread).mean()),  # large if the error is mostly constant
        "real_over_assumed": float(((spread.square() + shift.square()).mean() / assumed).sqrt()),
        "largest_input_over_typical": float((size.max() / size.median().clamp(min=1e-12)).sqrt()),
    }
    return report, {"shift": shift, "spread": spread, "margin": torch.tensor([margin], dtype=torch.float32, device="cpu")}
