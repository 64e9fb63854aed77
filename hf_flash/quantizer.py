"""The seam to transformers: an `HfQuantizer` that decides when things happen; loading.py decides what happens.

This module is imported together with transformers' quantizers (registration.py). So it imports only what the class needs; the
rest is imported when a model is loaded. tests/contract/test_transformers_seam.py has the methods that transformers calls.
"""

from __future__ import annotations

from typing import Any

from transformers.quantizers import HfQuantizer

from hf_flash.config import FlashOffloadConfig
from hf_flash.errors import UsageError


class FlashHfQuantizer(HfQuantizer):
    """Loads a model with its FFN weights on flash. Registered as quantization method `"flash"`."""

    quantization_config: FlashOffloadConfig

    _device: Any = None  # where the model computes, if that is not this machine's processor

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse device maps that make no sense for a flash model."""
        if device_map is None or isinstance(device_map, str):
            return
        from hf_flash.runtime.devices import check_places

        check_places(device_map)

    def update_device_map(self, device_map: Any) -> Any:
        """Resolve `"auto"` to the accelerator, if there is one."""
        from hf_flash.runtime.devices import placed

        device_map, self._device = placed(device_map)
        return device_map

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        from hf_flash import loading

        repacked = self.pre_quantized and self.quantization_config.checkpoint_quantization is None
        self._loading = loading.prepare(
            model, self.quantization_config, checkpoint_files, repacked=repacked, device=self._device
        )

    def update_weight_conversions(self, weight_conversions: Any, model: Any) -> Any:
        """Let transformers' own quantizer for such a checkpoint turn everything that is not on flash into plain numbers."""
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
        """Return itself: its work is done, and a copied model needs no quantizer of its own."""
        return self

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return False
