"""`PlannedModel`: what is known of a model from its config.json, before its weights are there."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from hf_flash.base.dtypes import DTYPES
from hf_flash.base.files import read_json
from hf_flash.config import FlashOffloadConfig
from hf_flash.config_arguments import METHOD
from hf_flash.errors import ConfigError
from hf_flash.families import family_of
from hf_flash.families.base import Family, Shape
from hf_flash.families.recognise import config_object
from hf_flash.predictors.base import PredictorFormat
from hf_flash.predictors.choice import planned_format
from hf_flash.runtime.layer import FlashFFN
from hf_flash.runtime.swap import replace_feed_forwards
from hf_flash.store.checkpoint import resolve_folder
from hf_flash.store.layout import FlashStore
from hf_flash.store.unit import UnitLayout


@dataclass(frozen=True)
class PlannedModel:
    """A model as its config.json describes it, and as its store does if it is repacked.

    Attributes:
        fmt: the predictor that is meant; `None` for none.
        dtype: of compute.
        unit: a neuron on flash.
    """

    folder: Path
    config: Any
    family: Family
    store: FlashStore | None
    fmt: PredictorFormat | None
    dtype: torch.dtype
    unit: UnitLayout

    @property
    def shape(self) -> Shape:
        return self.family.shape(self.config)

    @property
    def predictor(self) -> str:
        return "none" if self.fmt is None else self.fmt.kind

    def skeleton(self, cut: tuple[int, int] | None = None) -> tuple[Any, list[FlashFFN]]:
        """The model without memory, and its FFNs.

        Args:
            cut: to so many layers, of so many neurons each.
        """
        config = type(self.config).from_dict(self.config.to_dict())
        config.dtype = self.dtype
        if cut is not None:
            config.num_hidden_layers, d_ff = cut
            setattr(config, self.family.d_ff_key, d_ff)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=self.dtype)
            ffns = replace_feed_forwards(model, self.family)
        return model.to(self.dtype), ffns  # the new biases too


def open_model(source: str | os.PathLike[str], predictor: str | None, dtype: str | None, **hub: Any) -> PlannedModel:
    """Find a model; of a Hub repository config.json alone is downloaded.

    Args:
        source: a repacked folder, a plain checkpoint, a folder with config.json alone, or the name of a Hub repository.
        predictor: `"quantized"`, `"lowrank"` or `"none"`. Default: the stored one, else as `FlashOffloadConfig` chooses.
        dtype: of compute, such as `"bfloat16"`. Default: the checkpoint's.
        hub: as in `from_pretrained`.
    """
    folder = resolve_folder(source, config_only=True, **hub)
    plain = read_json(folder / "config.json")
    family = family_of(plain)
    stored = take_stored(plain, folder)
    config = config_object(plain)
    wish = FlashOffloadConfig.from_dict(stored)
    if predictor is not None:
        wish.predictor = predictor
    store = FlashStore.open_folder(folder) if stored and any(folder.glob("*.safetensors")) else None
    d_model = family.shape(config).d_model
    unit = store.unit if store else UnitLayout.of(family.parts, d_model, config.dtype or torch.float32)
    fmt = planned_format(wish, family, config, store)
    return PlannedModel(folder, config, family, store, fmt, compute_dtype(dtype) or config.dtype or unit.dtype, unit)


def take_stored(plain: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Take what config.json says of hf_flash out of it.

    Raises:
        ConfigError: the model is quantized in another way.
    """
    stored: dict[str, Any] = plain.pop("quantization_config", None) or {}
    if stored and stored.get("quant_method") != METHOD:
        raise ConfigError("the model is quantized in another way", where=folder, got=stored.get("quant_method"))
    return stored


def compute_dtype(name: str | None) -> torch.dtype | None:
    """The dtype of compute that somebody named. Raises `ConfigError`: there is no such one."""
    if name is not None and name not in DTYPES:
        raise ConfigError("no such dtype of compute", where="dtype", expected=" or ".join(DTYPES), got=repr(name))
    found: torch.dtype | None = getattr(torch, name) if name else None
    return found
