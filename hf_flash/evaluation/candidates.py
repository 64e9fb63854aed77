"""The predictors that an evaluation compares, and how a loaded model is given one after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from hf_flash.budget.plan import ceiling_bytes
from hf_flash.config import FlashOffloadConfig
from hf_flash.families import family_of
from hf_flash.packing.checkpoint_folder import repacked_config
from hf_flash.predictors.base import NoPredictor, PredictorForm, find_predictor
from hf_flash.predictors.choice import forms_in
from hf_flash.runtime.model import find_runtime
from hf_flash.store.layer_file import LayerStore
from hf_flash.store.layout import FlashStore


@dataclass(frozen=True)
class Candidate:
    """One predictor to evaluate.

    Attributes:
        name: as reports have it.
        form: `None` for no predictor.
        measured: whether what calibration measured about it is used.
    """

    name: str
    form: PredictorForm | None
    measured: bool = True

    def load(self, store: FlashStore, layer: LayerStore, bias: torch.Tensor | None) -> Any:
        """The predictor of one layer."""
        if self.form is None:
            return NoPredictor()
        return self.form.load(self.visible(store), layer, bias)

    def visible(self, store: FlashStore) -> FlashStore:
        """The store as this candidate may see it."""
        return store if self.measured else replace(store, calibration=None)


def candidates(store: FlashStore) -> list[Candidate]:
    """None, and every predictor in a store; a quantized one that was calibrated with its assumed and its measured margin."""
    found = [Candidate("none", None)]
    for form in forms_in(store):
        find_predictor(store, form)
        if form.assumed_margin is None:
            found.append(Candidate(form.variant, form))
            continue
        found.append(Candidate(f"{form.variant}, margin {form.assumed_margin}", form, measured=False))
        if store.calibration is not None:
            found.append(Candidate(f"{form.variant}, measured margin", form))
    return found


def load_for(
    every: Sequence[Candidate],
    folder: Path,
    store: FlashStore,
    memory_budget: int | str | None,
    dtype: str | torch.dtype,
) -> Any:
    """The model without a predictor, with room left in the budget for all candidates at once."""
    shape = family_of(config := repacked_config(folder)).shape(config)
    forms = {c.form.variant: c.form for c in every if c.form is not None}
    room = sum(form.dram_bytes(shape) for form in forms.values())
    quantization = FlashOffloadConfig(predictor="none", memory_budget=max(1, ceiling_bytes(memory_budget) - room))
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=dtype).eval()


def install(candidate: Candidate, model: Any, store: FlashStore) -> int:
    """Give a loaded model another predictor and empty windows. Returns the predictor's bytes."""
    ffns = find_runtime(model).ffns
    for ffn, layer in zip(ffns, store.layers, strict=True):
        ffn.window.forget()
        ffn.predictor = candidate.load(store, layer, ffn.projections[layer.unit.deciding].bias)
    return sum(ffn.predictor.nbytes for ffn in ffns)
