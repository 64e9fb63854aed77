"""Where a model of transformers has its decoder layers. Nothing else in the package knows.

`get_decoder` is public. What it returns is not said anywhere: the part that runs the decoder layers, for most models; the model
itself, or its output matrix, for a few. That the layers are all in one list is not said either; a family names that list.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_flash.families.base import Family


def decoder_of(model: Any) -> Any:
    """The part of a causal language model that runs its decoder layers; the model, if it does not say."""
    found = model.get_decoder() if hasattr(model, "get_decoder") else model
    return found if any(isinstance(module, nn.ModuleList) for module in found.modules()) else model


def decoder_layers(model: Any, family: Family) -> Any:
    """The decoder layers of a causal language model, in order."""
    return decoder_of(model).get_submodule(family.layers)


def replace_module(parent: nn.Module, path: str, new: nn.Module) -> None:
    """Put a module in place of what is at a path of attributes, a module or a function."""
    holder, _, name = path.rpartition(".")
    setattr(parent.get_submodule(holder), name, new)
