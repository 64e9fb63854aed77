"""hf_flash: run language models larger than memory, with their FFN weights on flash.

Importing this package registers quantization method `"flash"` with transformers, at once or when transformers is imported
(see `registration.py`). It imports neither torch nor transformers: a public name is imported when it is first used.
The method is that of "LLM in a flash" (arXiv 2312.11514).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_flash._version import __version__
from hf_flash.registration import register_when_imported

if TYPE_CHECKING:
    from hf_flash.calibration.job import calibrate
    from hf_flash.config import FlashOffloadConfig, configure
    from hf_flash.errors import (
        BudgetError,
        CalibrationError,
        ConfigError,
        DiskSpaceError,
        HfFlashError,
        InvalidWeightsError,
        RepackError,
        StoreError,
        StoreFormatError,
        StoreMissingError,
        StoreReadError,
        StoreVersionError,
        TargetExistsError,
        UnsupportedModelError,
        UsageError,
    )
    from hf_flash.families import register_family
    from hf_flash.families.base import Family
    from hf_flash.hub.saving import push
    from hf_flash.packing.repacking import repack, restore
    from hf_flash.runtime.counters import FlashStats
    from hf_flash.runtime.model import close, stats

__all__ = [
    "BudgetError",
    "CalibrationError",
    "ConfigError",
    "DiskSpaceError",
    "Family",
    "FlashOffloadConfig",
    "FlashStats",
    "HfFlashError",
    "InvalidWeightsError",
    "RepackError",
    "StoreError",
    "StoreFormatError",
    "StoreMissingError",
    "StoreReadError",
    "StoreVersionError",
    "TargetExistsError",
    "UnsupportedModelError",
    "UsageError",
    "__version__",
    "calibrate",
    "close",
    "configure",
    "push",
    "register_family",
    "repack",
    "restore",
    "stats",
]

_MODULE_OF = {
    "Family": "hf_flash.families.base",
    "FlashOffloadConfig": "hf_flash.config",
    "FlashStats": "hf_flash.runtime.counters",
    "calibrate": "hf_flash.calibration.job",
    "close": "hf_flash.runtime.model",
    "configure": "hf_flash.config",
    "push": "hf_flash.hub.saving",
    "register_family": "hf_flash.families",
    "repack": "hf_flash.packing.repacking",
    "restore": "hf_flash.packing.repacking",
    "stats": "hf_flash.runtime.model",
} | {name: "hf_flash.errors" for name in __all__ if name.endswith("Error")}
_SUBMODULES = ("config", "errors")  # `hf_flash.errors` needs no import of its own


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        value = getattr(import_module(_MODULE_OF[name]), name)
    elif name in _SUBMODULES:
        value = import_module(f"hf_flash.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value  # so that the next access does not get here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_when_imported()
