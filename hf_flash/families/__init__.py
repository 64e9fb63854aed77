"""Families: how kinds of models name and shape their feed-forward layers. One file a family, one table by `model_type`.

`family_of` finds the family of a model; `register_family` adds one.
"""

from __future__ import annotations

from typing import Any, Final

from hf_flash.errors import UnsupportedModelError
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


def family_of(config: Any) -> Family:
    """The family of a model, from its config (an object or the dictionary in config.json).

    Raises:
        UnsupportedModelError: no family is known for this architecture.
    """
    model_type = get(config, "model_type")
    if model_type not in _FAMILIES:
        raise UnsupportedModelError(
            "this architecture is not supported",
            where="model_type in config.json",
            expected=f"one of {', '.join(sorted(_FAMILIES))}",
            got=repr(model_type),
        )
    return _FAMILIES[model_type]
