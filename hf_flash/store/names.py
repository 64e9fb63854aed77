"""Names and numbers of the store format (docs/store-format.md)."""

from __future__ import annotations

from typing import Final

FORMAT_VERSION: Final = 1
PLACED_VERSION: Final = 2  # of layer files with a `place`
PARTS_VERSION: Final = 3  # of layer files with a list of parts
HALVES_VERSION: Final = 4  # of layer files whose list has halves of a matrix
NEWEST_VERSION: Final = HALVES_VERSION
ALIGNMENT: Final = 4096
INDEX_NAME: Final = "model.safetensors.index.json"
LAYER_FILE: Final = "flash-layer-{:05d}.safetensors"
PREDICTOR_FILE: Final = "flash-predictor-{}.safetensors"
CALIBRATION_FILE: Final = "flash-calibration.safetensors"
ROUTING_FILE: Final = "flash-routing.json"  # beside a mixture's checkpoint
META: Final = "hf_flash."
HEADERS: Final = "hf_flash_headers"  # in the index's metadata: a digest of each file of other weights, by name
NOTICES: Final = (  # names of an empty tensor, which transformers shows where hf_flash is not imported: now, and before
    "this model needs the package hf_flash: install it, then import hf_flash before loading the model",
    "this model needs hf_flash: pip install hf-flash, then import hf_flash before loading it",
)
