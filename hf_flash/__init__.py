"""hf_flash: run language models larger than memory, with their FFN weights on flash.

Importing this package registers quantization method `"flash"` with transformers; nothing else happens.
The method is that of "LLM in a flash" (arXiv 2312.11514).
"""

from typing import TYPE_CHECKING, Any

from ._version import __version__
from .config import FlashOffloadConfig, configure
from .counters import FlashStats
from .errors import (
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
from .packing import repack, restore
from .quantizer import register as _register
from .runtime import close, stats
from .saving import push

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
    from .calibration import calibrate


def __getattr__(name: str) -> Any:
    if name == "calibrate":  # brings transformers' model classes: not needed to load a model
        from .calibration import calibrate

        return calibrate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_register()
