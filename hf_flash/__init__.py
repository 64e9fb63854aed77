"""hf_flash: run language models larger than memory, with their FFN weights on flash.

Importing this package registers quantization method `"flash"` with transformers; nothing else happens.
The method is that of "LLM in a flash" (arXiv 2312.11514).
"""

from typing import TYPE_CHECKING, Any

from hf_flash._version import __version__
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
from hf_flash.hub.saving import push
from hf_flash.packing.repacking import repack, restore
from hf_flash.quantizer import register as _register
from hf_flash.runtime.counters import FlashStats
from hf_flash.runtime.model import close, stats

__all__ = [
    "BudgetError",
    "CalibrationError",
    "ConfigError",
    "DiskSpaceError",
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
    "repack",
    "restore",
    "stats",
]

if TYPE_CHECKING:
    from hf_flash.calibration.job import calibrate


def __getattr__(name: str) -> Any:
    if name == "calibrate":  # brings transformers' model classes: not needed to load a model
        from hf_flash.calibration.job import calibrate

        return calibrate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_register()
