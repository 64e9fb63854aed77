"""Which predictor a model gets."""

from __future__ import annotations

from typing import Any

from hf_flash.config import FlashOffloadConfig
from hf_flash.errors import (
    StoreMissingError,
    UnsupportedModelError,
)
from hf_flash.families.adapters import Adapter
from hf_flash.predictors.base import PredictorForm
from hf_flash.predictors.lowrank import LowRankFormat
from hf_flash.predictors.quantized import QuantizedFormat
from hf_flash.store.layout import FlashStore


def stored_form(wish: FlashOffloadConfig, adapter: Adapter, config: Any, store: FlashStore) -> PredictorForm | None:
    """The predictor of a store that a wish means; `None` for none."""
    if wish.predictor != "lowrank":
        return fresh_form(wish, adapter, config)
    form = LowRankFormat.of(store)
    if form is None:
        raise _uncalibrated()
    return form


def _uncalibrated() -> StoreMissingError:
    return StoreMissingError(
        "the low-rank predictor is trained on text, and that has not been done for this model",
        where="predictor='lowrank'",
        hint="repack the model into a folder, run `hf-flash calibrate FOLDER --text FILE`, then load that folder",
    )


def fresh_form(wish: FlashOffloadConfig, adapter: Adapter, config: Any) -> QuantizedFormat | None:
    """The predictor to make from a plain checkpoint; `None` for none.

    Raises:
        UnsupportedModelError: a predictor was asked for and the activation leaves no exact zeros.
        StoreMissingError: a predictor that has to be trained was asked for.
    """
    if wish.predictor == "lowrank":
        raise _uncalibrated()
    name, sparse = adapter.activation_name(config), adapter.sparse(config)
    if wish.predictor == "none" or (wish.predictor is None and not sparse):
        return None
    if not sparse:
        raise UnsupportedModelError(
            "a predictor needs an activation that leaves exact zeros",
            where=adapter.activation_key,
            expected="relu",
            got=name,
            hint='use predictor="none"',
        )
    return QuantizedFormat(wish.predictor_bits, wish.predictor_group_size, wish.predictor_margin)


def stored_choice(form: PredictorForm | None) -> dict[str, Any]:
    """The arguments of `FlashOffloadConfig` that find a predictor again."""
    if isinstance(form, QuantizedFormat):
        return {"predictor": "quantized", "predictor_bits": form.bits, "predictor_group_size": form.group_size}
    return {"predictor": "none" if form is None else form.variant}
