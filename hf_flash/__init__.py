"""hf_flash: run language models larger than memory, with their FFN weights on flash.

Importing this package registers quantization method `"flash"` with transformers; nothing else happens.
The method is that of "LLM in a flash" (arXiv 2312.11514).
"""

from ._version import __version__
from .config import FlashOffloadConfig, configure
from .errors import (
    BudgetError,
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
from .quantizer import register as _register
from .repack import repack, restore
from .runtime import close, stats
from .saving import push
from .stats import FlashStats

__all__ = [
    "BudgetError",
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
    "close",
    "configure",
    "push",
    "repack",
    "restore",
    "stats",
]

_register()
