"""Finds the decoder layers of a transformers model, for the whole package.

`get_decoder` is public, but its result is not documented: for most models the part that runs the decoder layers; for a few the
model itself, or its output matrix. It is not documented either that all layers are in one list; a family names that list.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_flash.families.base import Family


def decoder_of(model: Any) -> Any:
    """The part of a causal language model that runs its decoder layers; the model itself if `get_decoder` does not help."""
    found = model.get_decoder() if hasattr(model, "get_decoder") else model
    return found if any(isinstance(module, nn.ModuleList) for module in found.modules()) else model


def decoder_layers(model: Any, family: Family) -> Any:
    """The decoder layers of a causal language model, in order."""
    return decoder_of(model).get_submodule(family.layers)


def replace_module(parent: nn.Module, path: str, new: nn.Module) -> None:
    """Replace the module or function at a path of attributes with a module."""
    holder, _, name = path.rpartition(".")
    setattr(parent.get_submodule(holder), name, new)
