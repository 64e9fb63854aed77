"""Families: how kinds of models name and shape their feed-forward layers. One file a family, one table by `model_type`.

`family_of` finds the family of a model; `register_family` adds one. What is not in the table is recognised by the structure of
the model's modules (recognise.py), and its arithmetic is tried (arithmetic_check.py).
"""

from __future__ import annotations

from typing import Any, Final

from hf_flash.families.base import Family, check_family, get
from hf_flash.families.opt import OPT

_FAMILIES: Final[dict[str, Family]] = {family.model_type: family for family in (OPT,)}


def register_family(family: Family) -> None:
    """Make another kind of model known, or describe one anew.

    Raises:
        UnsupportedModelError: the description is not valid; the message says why.
    """
    check_family(family)
    _FAMILIES[family.model_type] = family


def family_of(config: Any, model: Any = None) -> Family:
    """The family of a model.

    Args:
        config: an object, or the dictionary in config.json.
        model: the model, where there is one already, on the meta device perhaps. Otherwise one is made of the config, without
            memory, if no family of the table describes it.

    Raises:
        UnsupportedModelError: its feed-forward layers are not recognised, or compute something else.
    """
    known = _FAMILIES.get(str(get(config, "model_type")))
    if known is not None:
        return known
    from hf_flash.families.recognise import recognise, skeleton

    return recognise(skeleton(config) if model is None else model)
