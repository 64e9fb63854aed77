"""A kind of model that no library has, described by data alone: three matrices under names of their own, another activation."""

from __future__ import annotations

from hf_flash.families.base import Family

PRETEND = Family(
    model_type="pretend",
    matrices={"gate": "wicket", "up": "climb", "down": "descend"},
    block="thinking",
    layers="floors",
    activation_key="bend",
    d_ff_key="breadth",
    heads_key="heads",
    norm="",
)
