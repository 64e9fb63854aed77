"""The result of one layer: its low-rank predictor, and what its neurons do.

A layer's result depends only on its recorded activations, its weights and the settings, so that any process may make it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch

from hf_flash.calibration.activity import Activations, AggregatedUse, frequency, moments, partners
from hf_flash.calibration.margin import measure_margin
from hf_flash.calibration.placement import count_reads, place_neurons
from hf_flash.calibration.settings import Settings
from hf_flash.calibration.training import train_layer
from hf_flash.calibration.work_folder import WorkFolder
from hf_flash.predictors.lowrank import LowRankPredictor
from hf_flash.predictors.quantized import quantized_formats
from hf_flash.store.layer_file import LayerStore
from hf_flash.store.writer import write_safetensors

_USE_WINDOWS: Final = 64  # aggregated use is counted on the last so many windows


def make_layer_result(layer: LayerStore, bias: torch.Tensor | None, settings: Settings, work: WorkFolder) -> None:
    """Train and measure one layer, and write its result file.

    Args:
        layer: the layer's weights on flash.
        bias: bias [d_ff] of the projection that decides (up, or the gate), if it has one.
        settings: what is calibrated, and how.
        work: the folder with the recorded activations.
    """
    report, tensors = _train_and_measure(layer, bias, settings, work.activations(layer))
    write_safetensors(
        work.result(layer.index),
        {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()},
        tensors.values(),
        {"report": json.dumps(report)},
    )


def _train_and_measure(
    layer: LayerStore, bias: torch.Tensor | None, settings: Settings, data: Activations
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The report of a layer, and its tensors by their full names."""
    mean, covariance = moments(data)
    result, packed = train_layer(
        data, layer.part(layer.unit.deciding), bias, mean, covariance, settings.targets, settings.epochs, settings.seed
    )
    tensors = {f"{layer.prefix}.predictor.{name}": tensor for name, tensor in packed.items()}
    report: dict[str, Any] = {"lowrank": result.to_dict(), "reached": result.extra <= settings.targets.extra}
    for fmt in quantized_formats(settings.store):
        report[fmt.variant], margins = measure_margin(settings.store, layer, fmt, bias, data, mean, covariance)
        tensors |= {f"{layer.prefix}.calibration.{fmt.variant}.{name}": tensor for name, tensor in margins.items()}
    counts = _counts(data)
    tensors |= {f"{layer.prefix}.calibration.{name}": tensor for name, tensor in counts.items()}
    report["active"] = int(counts["frequency"].sum()) / settings.tokens
    predictor = LowRankPredictor(packed)
    report["use"] = _aggregated_use(data.active, settings)
    # Neurons that are predicted but not active tend to be the same from token to token, so this is not `use` times a factor.
    report["lowrank"]["use"] = _aggregated_use(lambda rows: predictor.select(data.x[rows]), settings)
    place = place_neurons(data)
    report["reads"] = count_reads(data, place).to_dict()
    tensors[f"{layer.prefix}.place"] = torch.from_numpy(place)
    return report, tensors


def _counts(data: Activations) -> dict[str, torch.Tensor]:
    """How often each neuron is active (`frequency`), and with which others (`partners`) in how many tokens (`together`)."""
    masks = partial(map, data.active, data.chunks(0, len(data.x)))
    used, ids, together = frequency(masks()), *partners(masks(), data.d_ff)
    return {"frequency": used, "partners": ids, "together": together}


def _aggregated_use(used: Callable[[slice], torch.Tensor], settings: Settings) -> dict[str, list[float]]:
    """Aggregated use over the last windows.

    Args:
        used: returns the neurons in use, bool [tokens, d_ff], for some rows of the recorded tokens.
        settings: says where windows begin and end.
    """
    use, windows, context = AggregatedUse(), len(settings.windows), settings.context
    for window in range(max(0, windows - _USE_WINDOWS), windows):
        use.add(used(slice(window * context, (window + 1) * context)))
    return use.to_dict()
