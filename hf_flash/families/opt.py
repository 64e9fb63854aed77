"""OPT: two matrices with ReLU, as attributes of the decoder layer."""

from __future__ import annotations

from hf_flash.families.base import Family

OPT = Family(
    model_type="opt",
    matrices={"up": "fc1", "down": "fc2"},
    block="",
    activation="activation_fn",
    activation_key="activation_function",
    d_ff_key="ffn_dim",
    norm="final_layer_norm",
    norm_first_key="do_layer_norm_before",
)
