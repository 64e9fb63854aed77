"""Families: how kinds of models name and shape their feed-forward layers. Each has a file, and a row in one table.

`family_of` finds the family of a model by its `model_type`; `register_family` adds one. Models that are not in the table are
recognised by the structure of their modules (recognise.py), and their arithmetic is tried (arithmetic_check.py).
"""

from __future__ import annotations

from typing import Any, Final

from hf_flash.families.base import Family, check_family, get
from hf_flash.families.opt import OPT

_FAMILIES: Final[dict[str, Family]] = {family.model_type: family for family in (OPT,)}


def register_family(family: Family) -> None:
    """Add a kind of model, or replace the description of a known one.

    Raises:
        UnsupportedModelError: the description is not valid; the message says why.
    """
    check_family(family)
    _FAMILIES[family.model_type] = family


def family_of(config: Any, model: Any = None) -> Family:
    """The family of a model.

    Args:
        config: a config object, or the dictionary in config.json.
        model: the model if it exists already, possibly on the meta device. If it is `None`, and the table has no such family,
            a model without memory is built from the config.

    Raises:
        UnsupportedModelError: its feed-forward layers are not recognised, or compute something else.
    """
    known = _FAMILIES.get(str(get(config, "model_type")))
    if known is not None:
        return known
    from hf_flash.families.recognise import recognise, skeleton

    return recognise(skeleton(config) if model is None else model)
