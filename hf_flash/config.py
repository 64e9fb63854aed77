"""`FlashOffloadConfig`: what a user may choose, and where each choice comes from.

An argument takes its value from the first of these that names it:

    1. the `FlashOffloadConfig(...)` passed to `from_pretrained`
    2. `hf_flash.configure(...)`, defaults for the whole process
    3. `quantization_config` in the config.json of a repacked model
    4. the built-in default

What nobody named is not written to config.json, so that a better default can reach old models; but for the predictor, whose
files have to be found again.
"""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Mapping
from typing import Any, Final, Literal

from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_flash.base.sizes import parse_bytes
from hf_flash.errors import ConfigError, StoreVersionError

FORMAT_VERSION: Final = 1
UNSET: Final[Any] = None  # every argument left out
AUTO: Final = "auto"  # a memory budget that is worked out when the model is loaded

PredictorName = Literal["quantized", "lowrank", "none"]
ReaderName = Literal["auto", "mmap", "direct"]

_DEFAULTS: Final[dict[str, Any]] = {
    "predictor": None,  # decided at load time: "quantized" where the activation gives exact zeros, else "none"
    "predictor_bits": 4,
    "predictor_group_size": 64,
    "predictor_margin": None,  # as calibrated, else decided by predictor_bits
    "window": 5,
    "lookahead": None,  # 1 where a core is free
    "memory_budget": None,  # what is really free
    "reader": "auto",
    "io_threads": 16,
    "cache_dir": None,
}
ARGUMENTS: Final = tuple(_DEFAULTS)
"""Names of all arguments of `FlashOffloadConfig`."""
_THIS_MACHINE_ONLY: Final = ("cache_dir",)  # never serialised
_LOADING_KEY: Final = "flash_arguments"
_process_defaults: dict[str, Any] = {}


class FlashOffloadConfig(QuantizationConfigMixin):
    """Run a model with its FFN weights on flash. Every argument is optional; left out means unset, not "default".

    Args:
        predictor (`"quantized"`, `"lowrank"` or `"none"`): names the neurons each token needs. `"quantized"`, a low-bit copy
            of the up projection in DRAM, and `"lowrank"`, the paper's, which `hf_flash.calibrate` trains, need exact zeros
            (ReLU). `"none"` computes every neuron and equals the stock model. Unset: the stored one, else `"quantized"` for
            ReLU models and `"none"` for others. Paper: section 3.1.
        predictor_bits (`4` or `8`): width of the quantized predictor. Default 4.
        predictor_group_size (`int`): weights that share a scale in 4 bits. Default 64; 8 bits use one scale a neuron.
        predictor_margin (`float`): how many standard deviations of its own rounding error the quantized predictor adds
            before it calls a neuron inactive. More reads, fewer misses. Default: as measured by `hf_flash.calibrate`, else
            1.5 in 4 bits, 3.0 in 8 bits.
        window (`int`): neurons used in this many recent tokens stay in DRAM; older ones as long as there is room, the most
            used longest. Default 5. Paper: section 3.1.
        lookahead (`int`): layers that reading starts ahead, on a guess that never decides what is computed: 0 for not at all,
            1 for before the layer's own attention runs. It hides reads, and costs some more of them and some computing.
            Unset: 1 where torch leaves a core free; elsewhere only where a call used most of the layer before, as prompts do.
        memory_budget (`int` or `str`): ceiling on all weight bytes in DRAM, as bytes or text such as `"6GiB"`. Unset or
            `"auto"`: what is free on this machine or in its cgroup; `"auto"` also where the model stores a budget.
        reader (`"auto"`, `"mmap"` or `"direct"`): how chunks get into memory: through the page cache, or past it with
            O_DIRECT. Default `"auto"`.
        io_threads (`int`): parallel reads of the direct reader. Default 16.
        cache_dir (`str` or path): where plain checkpoints are repacked to. Default `$HF_FLASH_CACHE`, else `flash` in the
            Hugging Face cache. Not serialised.

    Raises:
        ConfigError: an unknown argument (the message names the nearest valid one), a wrong type or value.
        StoreVersionError: the dictionary was written by a newer hf_flash.
    """

    def __init__(
        self,
        *,
        predictor: PredictorName | None = UNSET,
        predictor_bits: Literal[4, 8] | None = UNSET,
        predictor_group_size: int | None = UNSET,
        predictor_margin: float | None = UNSET,
        window: int | None = UNSET,
        lookahead: int | None = UNSET,
        memory_budget: int | str | None = UNSET,
        reader: ReaderName | None = UNSET,
        io_threads: int | None = UNSET,
        cache_dir: Any = UNSET,
        quant_method: str = "flash",
        format_version: int = FORMAT_VERSION,
        **unknown: Any,
    ) -> None:
        if quant_method != "flash":
            raise ConfigError("not a flash config", where="quant_method", expected="'flash'", got=repr(quant_method))
        if not isinstance(format_version, int):
            raise ConfigError("not a version", where="format_version", expected="a number", got=repr(format_version))
        if format_version > FORMAT_VERSION:
            raise StoreVersionError(
                "this model was written by a newer hf_flash",
                where="quantization_config",
                expected=f"format_version up to {FORMAT_VERSION}",
                got=format_version,
                hint="pip install -U hf-flash",
            )
        self.quant_method = quant_method
        self.format_version = format_version
        given = {
            "predictor": predictor,
            "predictor_bits": predictor_bits,
            "predictor_group_size": predictor_group_size,
            "predictor_margin": predictor_margin,
            "window": window,
            "lookahead": lookahead,
            "memory_budget": memory_budget,
            "reader": reader,
            "io_threads": io_threads,
            "cache_dir": cache_dir,
        }
        self._passed = checked({k: v for k, v in given.items() if v is not None} | unknown)
        self._stored: dict[str, Any] = {}

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From `quantization_config` of a config.json; what it holds counts as stored, not as passed."""
        config = cls(**config_dict)
        config._stored, config._passed = config._passed, {}
        return (config, kwargs) if return_unused_kwargs else config

    def __getattr__(self, name: str) -> Any:
        """The effective value of an argument: passed, then process default, then stored, then built-in."""
        if name not in _DEFAULTS:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        for source in (self._passed, _process_defaults, self._stored):
            if name in source:
                return source[name]
        return _DEFAULTS[name]

    def get(self, key: str, default: Any = None) -> Any:
        """Dictionary-style access, which transformers uses on quantization configs."""
        return getattr(self, key, default)

    def update(self, **kwargs: Any) -> dict[str, Any]:
        """Take known arguments, return the others (as `QuantizationConfigMixin.update`)."""
        self._passed |= checked({k: v for k, v in kwargs.items() if k in _DEFAULTS and v is not None})
        return {k: v for k, v in kwargs.items() if k not in _DEFAULTS}

    def to_dict(self) -> dict[str, Any]:
        """What goes into config.json: the method, the format, and what somebody named for this model."""
        named = self._stored | self._passed
        return {"quant_method": self.quant_method, "format_version": self.format_version} | {
            k: named[k] for k in _DEFAULTS if k in named and k not in _THIS_MACHINE_ONLY
        }

    def __iter__(self) -> Any:
        yield from self.to_dict().items()

    def remember(self, **values: Any) -> None:
        """Record what loading decided, so that saving the model stores it. What the user named is not touched."""
        self._stored |= checked({k: v for k, v in values.items() if v is not None})

    def get_loading_attributes(self) -> dict[str, Any]:
        """Called by transformers when this config meets the stored one; only what the user named comes along.

        transformers then warns that the passed config is ignored except for these attributes. Here nothing is ignored,
        so that one message, recognisable by our attribute, is silenced.
        """
        warnings.filterwarnings("ignore", message=rf".*loading attributes \(e\.g\. \['{_LOADING_KEY}'\]\)")
        return {_LOADING_KEY: dict(self._passed)}

    def __setattr__(self, name: str, value: Any) -> None:
        if name == _LOADING_KEY:
            self._passed |= value
        elif name in _DEFAULTS:
            self._passed |= checked({name: value})
        else:
            super().__setattr__(name, value)


def configure(**defaults: Any) -> None:
    """Set defaults for every flash model this process loads from now on; `None` takes one back.

    They rank below what is passed to `from_pretrained` and above what a model stores: what a server's command line needs.

    Raises:
        ConfigError: as [`FlashOffloadConfig`].
    """
    values = checked({k: v for k, v in defaults.items() if v is not None or k not in _DEFAULTS})
    for name in defaults:
        _process_defaults.pop(name, None)
    _process_defaults.update(values)


def checked(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments, paths as text, if every name, type and value is valid."""
    if isinstance(arguments.get("cache_dir"), os.PathLike):
        arguments = arguments | {"cache_dir": os.fspath(arguments["cache_dir"])}
    for name, value in arguments.items():
        if name not in _DEFAULTS:
            near = difflib.get_close_matches(name, _DEFAULTS, n=1)
            raise ConfigError(
                f"FlashOffloadConfig has no argument {name!r}",
                expected=f"one of {', '.join(_DEFAULTS)}",
                hint=f"did you mean {near[0]!r}?" if near else None,
            )
        expected = _complaint(name, value)
        if expected:
            raise ConfigError(f"{name} is not valid", where="FlashOffloadConfig", expected=expected, got=repr(value))
    return arguments


def _complaint(name: str, value: Any) -> str | None:
    """What `value` should have been, or `None` if it is fine."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    choices = {"predictor": ("quantized", "lowrank", "none"), "predictor_bits": (4, 8), "reader": ("auto", "mmap", "direct")}
    if name in choices:
        fine = type(value) is type(choices[name][0]) and value in choices[name]
        return None if fine else "one of " + ", ".join(map(repr, choices[name]))
    if name == "predictor_margin":
        fine = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 100
        return None if fine else "a number of standard deviations, 0 to 100"
    if name == "memory_budget":
        if value != AUTO:
            parse_bytes(value)
        return None
    if name == "cache_dir":
        return None if isinstance(value, str) else "a path"
    limits = {"predictor_group_size": (2, 1 << 16), "io_threads": (1, 256), "lookahead": (0, 1)}
    low, high = limits.get(name, (1, 1 << 31))
    return None if whole and low <= value <= high else f"a whole number, {low} to {high}"
