"""The transformers seam: an `HfQuantizer` that says when things happen; what happens is in loading.py.

This module is imported together with transformers' quantizers (registration.py). So it imports only what the class needs; the
rest is imported when a model is loaded. The methods that transformers calls are in tests/contract/test_transformers_seam.py.
"""

from __future__ import annotations

from typing import Any, Final

from transformers.quantizers import HfQuantizer

from hf_flash.config import FlashOffloadConfig
from hf_flash.errors import ConfigError, UsageError

_AUTOMATIC: Final = ("auto", "balanced", "balanced_low_0", "sequential")  # device maps that transformers works out


class FlashHfQuantizer(HfQuantizer):
    """Loads a model with its FFN weights on flash. Registered as quantization method `"flash"`."""

    quantization_config: FlashOffloadConfig

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse device maps that make no sense here."""
        places = {str(place) for place in (device_map.values() if isinstance(device_map, dict) else [device_map])}
        if "disk" in places:
            raise ConfigError(
                "hf_flash already keeps the FFN weights on disk",
                where="device_map",
                got=device_map,
                hint='remove "disk" from device_map; memory_budget says how much may stay in DRAM',
            )
        if places - {"None", "cpu", *_AUTOMATIC}:
            raise ConfigError(
                "the FFN computes on the CPU",
                where="device_map",
                expected='"cpu", "auto" or None',
                got=device_map,
                hint="lm-eval, which passes its --device on: --device cpu",
            )

    def update_device_map(self, device_map: Any) -> Any:
        """`"auto"` means the CPU, where the FFN computes."""
        return {"": "cpu"} if isinstance(device_map, str) and device_map in _AUTOMATIC else device_map

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        from hf_flash import loading

        repacked = self.pre_quantized and self.quantization_config.checkpoint_quantization is None
        self._loading = loading.prepare(model, self.quantization_config, checkpoint_files, repacked=repacked)

    def update_weight_conversions(self, weight_conversions: Any, model: Any) -> Any:
        """What is not on flash becomes plain numbers, by transformers' own quantizer for such a checkpoint."""
        from hf_flash.families.quantized import dequantizer, quantization_of

        quantization = quantization_of({"quantization_config": self.quantization_config})
        stock: Any = super() if quantization is None else dequantizer(quantization)
        return stock.update_weight_conversions(weight_conversions, model)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from hf_flash import loading

        loading.finish(model, self.quantization_config, self._loading)
        del self._loading
        return model

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        raise UsageError(
            "the FFN weights are on flash", where="dequantize", hint="hf_flash.restore(folder, target), then load that"
        )

    def __deepcopy__(self, memo: Any) -> FlashHfQuantizer:
        """It has done its work: a copied model needs no other."""
        return self

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return False
