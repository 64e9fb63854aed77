"""The end of a calibration: the results of all layers become part of the repacked folder.

The index is written after all files that it lists. Until then the folder works as before, and the next run goes on where a
killed one stopped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils import tqdm

from hf_flash.base.files import parse_json, write_json
from hf_flash.base.folders import check_room
from hf_flash.base.heap import trim_heap
from hf_flash.budget.calibration_report import check_layer
from hf_flash.calibration.margin import MEASURED_RECALL
from hf_flash.calibration.processes import Processes
from hf_flash.calibration.settings import Settings
from hf_flash.calibration.text import quotations
from hf_flash.calibration.work_folder import WorkFolder
from hf_flash.packing.checkpoint_folder import list_store
from hf_flash.predictors.base import PredictorFormat, read_tensors
from hf_flash.predictors.choice import copies_in, stored_choice
from hf_flash.predictors.lowrank import VARIANT, LowRankFormat
from hf_flash.store.names import CALIBRATION_FILE, PREDICTOR_FILE
from hf_flash.store.safetensors_files import TensorSpec, read_header
from hf_flash.store.writer import calibration_metadata, place_layer, predictor_metadata, write_safetensors


def publish(settings: Settings, work: WorkFolder, processes: Processes, config: dict[str, Any]) -> dict[str, Any]:
    """Put the results into the model's folder and remove the work folder.

    Args:
        settings: what was calibrated.
        work: the folder with the results of all layers.
        processes: the processes that share the calibration.
        config: the folder's config.json. It is written again, with the new default predictor.

    Returns:
        The report, as stored in the folder.
    """
    report = _report(settings, work, config["quantization_config"].get("predictor"))
    processes.wait()  # all have read the results before the first process removes them
    if processes.first:
        _place_layers(settings, work, [layer["reads"]["worth"] and settings.placement for layer in report["layers"]])
        _gather(
            settings, work, PREDICTOR_FILE.format(VARIANT), "predictor", predictor_metadata(VARIANT, settings.store.metadata)
        )
        described = calibration_metadata(json.dumps(report), settings.store.metadata)
        _gather(settings, work, CALIBRATION_FILE, "calibration", described, quotations(settings.windows))
        list_store(settings.folder)
        config["quantization_config"]["predictor"] = report["default"]
        write_json(settings.folder / "config.json", config)
        work.remove()
    processes.wait()
    return report


def _report(settings: Settings, work: WorkFolder, predictor_before: str | None) -> dict[str, Any]:
    """The report for the calibration file.

    Raises:
        StoreFormatError: a layer's result is damaged.
    """
    layers = []
    for layer in settings.store.layers:
        path = work.result(layer.index)
        layers.append(parse_json(read_header(path)[1].get("report", ""), path))
        check_layer(layers[-1], path)
    reached = all(layer["reached"] for layer in layers)
    lowrank_bytes = sum(layer["lowrank"]["nbytes"] for layer in layers)
    targets = asdict(settings.targets) | {"epochs": settings.epochs, "seed": settings.seed}
    return {
        "text": {"tokens": settings.tokens, "held_out": settings.held_out, "context": settings.context}
        | {"sha256": settings.text_sha256, "name": settings.text_name},
        "targets": targets | {"quantized_recall": MEASURED_RECALL},
        "reached": reached,
        "default": _default_predictor(settings, predictor_before, reached, lowrank_bytes),
        "placement": settings.placement,
        "layers": layers,
    }


def _default_predictor(settings: Settings, before: str | None, reached: bool, lowrank_bytes: int) -> str | None:
    """The new default: the low-rank predictor if it reached its targets and is smaller than every copy, else the one before."""

    def size(fmt: PredictorFormat) -> int:
        return settings.store.predictors[fmt.variant].stat().st_size

    smallest = min(copies_in(settings.store), key=size, default=None)
    if reached and (smallest is None or lowrank_bytes < size(smallest)):
        return LowRankFormat.kind
    if before == LowRankFormat.kind:  # the default is from an earlier calibration, whose predictor is replaced
        return str(stored_choice(smallest)["predictor"])
    return before


def _place_layers(settings: Settings, work: WorkFolder, chosen: Sequence[bool]) -> None:
    """Rewrite the chosen layers with their neurons placed. A killed run may have finished some, which are skipped."""
    todo = []
    for layer in settings.store.layers:
        place = read_tensors(work.result(layer.index), layer.prefix)["place"].numpy()
        if chosen[layer.index] and not np.array_equal(place, layer.place if layer.place is not None else []):
            todo.append((layer, place))
    for layer, place in tqdm(todo, desc="Placing neurons", unit="layer", delay=1):
        check_room(settings.folder, layer.nbytes)
        place_layer(layer, place)
        trim_heap()


def _gather(
    settings: Settings, work: WorkFolder, name: str, part: str, metadata: dict[str, str], text: torch.Tensor | None = None
) -> None:
    """Write one file of the store, from the tensors of all results.

    Args:
        settings: what was calibrated.
        work: the folder with the results of all layers.
        name: the file's name.
        part: which tensors to take, `"predictor"` or `"calibration"`.
        metadata: the file's metadata.
        text: [`quotations`] of the text that was trained on, to be added.
    """
    specs: dict[str, TensorSpec] = {}
    sources: list[tuple[Path, str]] = []
    for layer in settings.store.layers:
        path = work.result(layer.index)
        for full, (spec, _) in read_header(path)[0].items():
            if full.startswith(f"{layer.prefix}.{part}."):
                specs[full] = spec
                sources.append((path, full))
    if text is not None:
        specs["calibration.text"] = (text.dtype, tuple(text.shape))

    def tensors() -> Iterator[torch.Tensor]:
        for path, full in sources:
            prefix, _, last = full.rpartition(".")
            yield read_tensors(path, prefix)[last]
        if text is not None:
            yield text

    write_safetensors(settings.folder / name, specs, tensors(), metadata)
