"""The predictors that an evaluation compares, and how a loaded model is given one after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from hf_flash.base.sizes import format_bytes
from hf_flash.budget.plan import ceiling_bytes
from hf_flash.config import FlashOffloadConfig
from hf_flash.errors import BudgetError
from hf_flash.families import family_of
from hf_flash.packing.checkpoint_folder import repacked_config
from hf_flash.predictors.base import NoPredictor, PredictorFormat, find_predictor
from hf_flash.predictors.choice import formats_in
from hf_flash.runtime.model import find_runtime
from hf_flash.store.layer_file import LayerStore
from hf_flash.store.layout import FlashStore


@dataclass(frozen=True)
class Candidate:
    """One predictor to evaluate.

    Attributes:
        name: as reports have it.
        fmt: `None` for no predictor.
        measured: whether what calibration measured about it is used.
    """

    name: str
    fmt: PredictorFormat | None
    measured: bool = True

    def load(self, store: FlashStore, layer: LayerStore, bias: torch.Tensor | None) -> Any:
        """The predictor of one layer."""
        if self.fmt is None:
            return NoPredictor()
        return self.fmt.load(self.visible(store), layer, bias)

    def visible(self, store: FlashStore) -> FlashStore:
        """The store as this candidate may see it."""
        return store if self.measured else replace(store, calibration=None)


def candidates(store: FlashStore) -> list[Candidate]:
    """No predictor, and every one in a store; a calibrated quantized one twice, with its assumed and its measured margin."""
    found = [Candidate("none", None)]
    for fmt in formats_in(store):
        find_predictor(store, fmt)
        if fmt.assumed_margin is None:
            found.append(Candidate(fmt.variant, fmt))
            continue
        found.append(Candidate(f"{fmt.variant}, margin {fmt.assumed_margin}", fmt, measured=False))
        if store.calibration is not None:
            found.append(Candidate(f"{fmt.variant}, measured margin", fmt))
    return found


def load_for(
    every: Sequence[Candidate],
    folder: Path,
    store: FlashStore,
    memory_budget: int | str | None,
    dtype: str | torch.dtype,
) -> Any:
    """Load the model without a predictor, with room left in the budget for all candidates at once.

    Raises:
        BudgetError: the budget is too small for that. Others as in `from_pretrained`.
    """
    shape = family_of(config := repacked_config(folder)).shape(config)
    formats = {c.fmt.variant: c.fmt for c in every if c.fmt is not None}
    room = sum(fmt.dram_bytes(shape) for fmt in formats.values())
    budget = ceiling_bytes(memory_budget)
    quantization = FlashOffloadConfig(predictor="none", memory_budget=max(1, budget - room))
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=dtype).eval()
    except BudgetError as error:
        least = (error.minimum_bytes or 0) + room
        raise BudgetError(
            "the memory budget is too small to compare the predictors",
            minimum_bytes=least,
            where="memory_budget",
            expected=f"at least {format_bytes(least)} ({least} bytes): the model, and {format_bytes(room)} for all of them",
            got=f"{format_bytes(budget)} ({budget} bytes)",
            hint="raise memory_budget",
        ) from None
    find_runtime(model).engine.sequences.predict_always = True  # every token of a text stands for one that is decoded
    return model


def install(candidate: Candidate, model: Any, store: FlashStore) -> int:
    """Give a loaded model another predictor and empty windows. Returns the predictor's bytes."""
    ffns = find_runtime(model).ffns
    for ffn, layer in zip(ffns, store.layers, strict=True):
        ffn.window.forget()
        ffn.predictor = candidate.load(store, layer, ffn.projections[layer.unit.deciding].bias)
    return sum(ffn.predictor.nbytes for ffn in ffns)
