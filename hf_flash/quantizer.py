"""The transformers seam: an `HfQuantizer` that says when things happen; what happens is in the other modules.

before weights are loaded   open or make the store, divide the budget, replace the FFNs (still on the meta device)
after                       put the other weights into memory, load predictors, allocate windows, open the reader
"""

from __future__ import annotations

import logging
from typing import Any, Final

import torch
import transformers.quantizers.auto as auto
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer

from hf_flash.base.sizes import format_bytes
from hf_flash.budget.divide import divide_memory, expected_demand
from hf_flash.budget.plan import MemoryPlan
from hf_flash.config import AUTO, FlashOffloadConfig
from hf_flash.errors import BudgetError, ConfigError, UnsupportedModelError, UsageError
from hf_flash.families.adapters import Adapter, adapter_for
from hf_flash.hub.saving import bind
from hf_flash.machine.about import usable_cores
from hf_flash.packing.flash_cache import cached_store
from hf_flash.predictors.base import PredictorForm, find_predictor
from hf_flash.predictors.choice import fresh_form, stored_choice, stored_form
from hf_flash.predictors.quantized import QuantizedFormat
from hf_flash.runtime.attach import attach
from hf_flash.runtime.devices import stay_on_cpu
from hf_flash.store.checkpoint import Checkpoint, given_files
from hf_flash.store.layout import FlashStore

logger = logging.getLogger("hf_flash")

_AUTOMATIC: Final = ("auto", "balanced", "balanced_low_0", "sequential")  # device maps that transformers works out
_DTYPES: Final = (torch.float32, torch.float16, torch.bfloat16)


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
        config, dtype = self.quantization_config, model.config.dtype
        adapter = adapter_for(model.config)
        if dtype not in _DTYPES:
            raise UnsupportedModelError("no such dtype of compute", where="dtype", expected=_DTYPES, got=dtype)
        if not checkpoint_files:
            raise ConfigError(
                "hf_flash needs checkpoint files: there is nothing on disk to read neurons from",
                where="from_pretrained",
                got="a state_dict",
                hint="save the checkpoint and load the folder",
            )
        files = given_files(str(model.config.name_or_path), checkpoint_files)
        self._checkpoint = Checkpoint.open(files)
        store = FlashStore.open(files) if self.pre_quantized else None
        if store is not None:
            store.check_others()
            self._check_dims(adapter, model, store)
        self._ffns = adapter.swap(model, dtype)
        self._plan, self._form = self._divide(model, adapter, dtype, store)
        if store is None:
            form = self._form if isinstance(self._form, QuantizedFormat) else None
            store = cached_store(self._checkpoint, adapter, form, config.cache_dir)
            self._check_dims(adapter, model, store)
        if self._form is not None:
            find_predictor(store, self._form)
        self._store, self._dtype = store, dtype
        config.remember(**stored_choice(self._form))
        model._keys_to_ignore_on_load_unexpected = {
            *(model._keys_to_ignore_on_load_unexpected or ()),
            *adapter.store_keys,
        }

    def _divide(
        self,
        model: Any,
        adapter: Adapter,
        dtype: torch.dtype,
        store: FlashStore | None,
    ) -> tuple[MemoryPlan, PredictorForm | None]:
        """Divide the memory budget. On a plain checkpoint whose predictor nobody named, one that does not fit is left out."""
        config = self.quantization_config
        dims, budget = adapter.dims(model.config), None if config.memory_budget == AUTO else config.memory_budget
        stored = store.layers[0].dtype if store else self._checkpoint.specs[adapter.names(self._checkpoint.specs)[0].up][0]
        tied = set(getattr(model, "all_tied_weights_keys", None) or ())
        weights = {id(p): p for name, p in [*model.named_parameters(), *model.named_buffers()] if name not in tied}
        resident = sum(p.numel() * (dtype if p.is_floating_point() else p.dtype).itemsize for p in weights.values())
        reading: Any = {"reader": config.reader, "io_threads": config.io_threads}

        def plan(form: PredictorForm | None) -> MemoryPlan:
            demand = expected_demand(form, dims, store)
            return divide_memory(budget, resident, form, dims, dtype, stored, demand=demand, **reading)

        form = stored_form(config, adapter, model.config, store) if store else fresh_form(config, adapter, model.config)
        try:
            return plan(form), form
        except BudgetError:
            if form is None or config.predictor is not None:
                raise
            without = plan(None)
            logger.warning(
                "hf_flash: the memory budget is too small for the quantized predictor, which needs %s in all; loading with "
                "predictor='none': every neuron is read for every token, which is much slower",
                format_bytes(without.minimum_bytes + form.dram_bytes(*dims)),
            )
            return without, None

    @staticmethod
    def _check_dims(adapter: Adapter, model: Any, store: FlashStore) -> None:
        wanted = adapter.dims(model.config)
        found = len(store.layers), store.layers[0].d_ff, store.layers[0].d_model
        if wanted != found:  # the store's layers are all alike
            raise UnsupportedModelError(
                "the store does not fit the model's config",
                where=store.layers[0].path.parent,
                expected=f"layers, d_ff, d_model = {wanted}",
                got=found,
                hint="repack the checkpoint",
            )

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        plan = self._plan
        attach(
            model,
            self.quantization_config,
            plan,
            self._store,
            self._checkpoint,
            self._form,
            self._ffns,
            self._dtype,
        )
        ahead = self.quantization_config.lookahead
        if ahead is None:
            ahead = int(usable_cores() > torch.get_num_threads())  # both cores busy: it costs what it hides
        if ahead and self._form is not None:
            adapter_for(model.config).watch(model, self._ffns)
        bind(model)
        stay_on_cpu(model)
        logger.info(
            "hf_flash: memory budget %s%s\n%s",
            format_bytes(plan.budget_bytes),
            " (most of what is free)" if self.quantization_config.memory_budget in (None, AUTO) else "",
            plan.describe(),
        )
        if shortage := plan.shortage(self.quantization_config.window):
            logger.warning("hf_flash: %s", shortage)
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


def register() -> None:
    """Make transformers know `quant_method: flash`. Called once, by `import hf_flash`."""
    for registry in (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING):
        if "flash" in registry and registry["flash"].__module__.startswith("hf_flash."):
            del registry["flash"]  # the module is being imported again
    register_quantization_config("flash")(FlashOffloadConfig)
    register_quantizer("flash")(FlashHfQuantizer)
    # Only classes in this tuple may bring arguments for a model that has a quantization_config already; there is no
    # registration for it, so it is bound again with ours in it. A contract test watches this.
    others = [kind for kind in auto.LOADING_ATTRIBUTES_CONFIG_TYPES if kind is not FlashOffloadConfig]
    auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*others, FlashOffloadConfig)
