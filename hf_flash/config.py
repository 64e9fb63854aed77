"""`FlashOffloadConfig`: what a user may choose, and where each choice comes from.

An argument takes its value from the first of these that sets it:

    1. the `FlashOffloadConfig(...)` passed to `from_pretrained`
    2. `hf_flash.configure(...)`, defaults for the whole process
    3. `quantization_config` in the config.json of a repacked model
    4. the built-in default

An argument that nobody set is not written to config.json, so that a better default can reach old models. The predictor is
always written, because its files have to be found again.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Final

from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_flash.base.installing import UPDATE
from hf_flash.config_arguments import ARGUMENTS, METHOD, PredictorBits, checked_arguments, checked_if_set, document_arguments
from hf_flash.config_arguments import AUTO as AUTO
from hf_flash.config_arguments import PredictorName as PredictorName
from hf_flash.config_arguments import ReaderName as ReaderName
from hf_flash.config_arguments import UnitsOn as UnitsOn
from hf_flash.errors import ConfigError, StoreVersionError

CONFIG_VERSION: Final = 1
UNSET: Final[Any] = None  # an argument that is left out
_LOADING_KEY: Final = "flash_arguments"
_process_defaults: dict[str, Any] = {}


@document_arguments
class FlashOffloadConfig(QuantizationConfigMixin):
    """Run a model with its FFN weights on flash. Every argument is optional; one that is left out is unset, not "default".

    Args:
        {arguments}
        checkpoint_quantization (`dict`): how another method has quantized the checkpoint. Loading takes it from transformers'
            own `quantization_config` in config.json, so there is no need to pass it.

    Raises:
        ConfigError: an unknown argument (the message names the nearest valid one), a wrong type or value.
        StoreVersionError: the dictionary was written by a newer hf_flash.
    """

    def __init__(
        self,
        *,
        predictor: PredictorName | None = UNSET,
        predictor_bits: PredictorBits | None = UNSET,
        predictor_group_size: int | None = UNSET,
        predictor_margin: float | None = UNSET,
        window: int | None = UNSET,
        lookahead: int | None = UNSET,
        memory_budget: int | str | Mapping[str | int, int | str] | None = UNSET,
        units_on: UnitsOn | None = UNSET,
        reader: ReaderName | None = UNSET,
        io_threads: int | None = UNSET,
        cache_dir: Any = UNSET,
        quant_method: str = METHOD,
        format_version: int = CONFIG_VERSION,
        checkpoint_quantization: Mapping[str, Any] | None = None,
        **unknown: Any,
    ) -> None:
        _check_format(quant_method, format_version)
        self.quant_method = quant_method
        self.format_version = format_version
        if not isinstance(checkpoint_quantization, Mapping | None):
            raise ConfigError(
                "not how a checkpoint is quantized",
                where="checkpoint_quantization",
                expected="an object, as config.json has it",
                got=repr(checkpoint_quantization),
            )
        self.checkpoint_quantization = checkpoint_quantization
        given = {
            "predictor": predictor,
            "predictor_bits": predictor_bits,
            "predictor_group_size": predictor_group_size,
            "predictor_margin": predictor_margin,
            "window": window,
            "lookahead": lookahead,
            "memory_budget": memory_budget,
            "units_on": units_on,
            "reader": reader,
            "io_threads": io_threads,
            "cache_dir": cache_dir,
        }
        self._passed = checked_if_set(given | unknown)
        self._stored: dict[str, Any] = {}

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Make a config from `quantization_config` of a config.json; its values count as stored, not as passed."""
        config = cls(**config_dict)
        config._stored, config._passed = config._passed, {}
        return (config, kwargs) if return_unused_kwargs else config

    def __getattr__(self, name: str) -> Any:
        """Return the effective value of an argument: passed, then process default, then stored, then built-in."""
        if name not in ARGUMENTS:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        for source in (self._passed, _process_defaults, self._stored):
            if name in source:
                return source[name]
        return ARGUMENTS[name].default

    def get(self, key: str, default: Any = None) -> Any:
        """Dictionary-style access, which transformers uses on quantization configs."""
        return getattr(self, key, default)

    def update(self, **kwargs: Any) -> dict[str, Any]:
        """Set known arguments and return the others (as `QuantizationConfigMixin.update` does)."""
        self._passed |= checked_if_set({k: v for k, v in kwargs.items() if k in ARGUMENTS})
        return {k: v for k, v in kwargs.items() if k not in ARGUMENTS}

    def to_dict(self) -> dict[str, Any]:
        """Return what goes into config.json: the method, the format version, and the arguments set for this model."""
        named = self._stored | self._passed
        beside = {} if self.checkpoint_quantization is None else {"checkpoint_quantization": dict(self.checkpoint_quantization)}
        return (
            {"quant_method": self.quant_method, "format_version": self.format_version}
            | beside
            | {name: named[name] for name, argument in ARGUMENTS.items() if name in named and argument.is_stored(named[name])}
        )

    def __iter__(self) -> Any:
        yield from self.to_dict().items()

    def remember(self, **values: Any) -> None:
        """Record what loading decided, so that saving the model stores it. Values that the user passed stay in force."""
        self._stored |= checked_arguments({k: v for k, v in values.items() if v is not None})

    def for_checkpoint(self, quantization: Mapping[str, Any]) -> FlashOffloadConfig:
        """Return the same choices for a checkpoint that another method has quantized.

        Args:
            quantization: `quantization_config` of its config.json.
        """
        found = type(self)(checkpoint_quantization=quantization)
        found._passed, found._stored = dict(self._passed), dict(self._stored)
        return found

    def get_loading_attributes(self) -> dict[str, Any]:
        """Return what the user passed, and only that. transformers calls this when a checkpoint has a config of its own.

        transformers then warns that the passed config is ignored except for these attributes. Here nothing is ignored,
        so this one warning, which names our attribute, is silenced.
        """
        warnings.filterwarnings("ignore", message=rf".*loading attributes \(e\.g\. \['{_LOADING_KEY}'\]\)")
        return {_LOADING_KEY: dict(self._passed)}

    def __setattr__(self, name: str, value: Any) -> None:
        if name == _LOADING_KEY:
            self._passed |= value
        elif name in ARGUMENTS:
            self._passed |= checked_arguments({name: value})
        else:
            super().__setattr__(name, value)


def configure(**defaults: Any) -> None:
    """Set defaults for every flash model this process loads from now on; `None` removes a default.

    They rank below what is passed to `from_pretrained` and above what a model stores, as a server's command line needs.

    Raises:
        ConfigError: as [`FlashOffloadConfig`].
    """
    values = checked_if_set(defaults)
    for name in defaults:
        _process_defaults.pop(name, None)
    _process_defaults.update(values)


def _check_format(quant_method: str, format_version: int) -> None:
    if quant_method != METHOD:
        raise ConfigError("not a flash config", where="quant_method", expected=repr(METHOD), got=repr(quant_method))
    if not isinstance(format_version, int):
        raise ConfigError("not a version", where="format_version", expected="a number", got=repr(format_version))
    if format_version > CONFIG_VERSION:
        raise StoreVersionError(
            "this model was written by a newer hf_flash",
            where="quantization_config",
            expected=f"format_version up to {CONFIG_VERSION}",
            got=format_version,
            hint=UPDATE,
        )
