"""Every error that hf_flash raises on purpose, in one tree.

    HfFlashError
    ├── ConfigError              a bad argument of FlashOffloadConfig or of a public function   (also ValueError)
    ├── UnsupportedModelError    architecture, activation or checkpoint that cannot be offloaded (also ValueError)
    ├── BudgetError              the memory budget is too small for this model                  (also ValueError)
    ├── UsageError               a call the loaded model cannot serve: training, device, closed (also RuntimeError)
    ├── CalibrationError         nothing can be learnt from this text or these activations      (also ValueError)
    ├── StoreError               something is wrong with files on flash                         (also OSError)
    │   ├── StoreFormatError     not valid safetensors, or not what the store format says
    │   ├── StoreVersionError    written by a newer hf_flash
    │   ├── StoreMissingError    a layer file, a predictor or a listed shard is missing
    │   └── StoreReadError       the disk did not deliver the bytes
    └── RepackError              repack, restore or save could not finish                       (also OSError)
        ├── TargetExistsError    the target folder is not empty
        ├── DiskSpaceError       not enough room, found before or while writing
        └── InvalidWeightsError  NaN or infinite values in the source

Each message says what is wrong and, if known, where, what was expected, what was found and what to do.
"""

from __future__ import annotations

from typing import Any


class HfFlashError(Exception):
    """Base class; `except HfFlashError` catches everything hf_flash raises on purpose.

    Args:
        what: the problem, in one sentence.
        where: file, tensor or argument concerned.
        expected: what would have been right.
        got: what was found instead.
        hint: what the user can do about it.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        expected: object = None,
        got: object = None,
        hint: str | None = None,
    ) -> None:
        lines = [what]
        lines += [
            f"  {label}: {value}"
            for label, value in (("where", where), ("expected", expected), ("got", got), ("to do", hint))
            if value is not None
        ]
        super().__init__("\n".join(lines))

    def __str__(self) -> str:  # OSError would print its own (errno, text) form
        return str(self.args[0]) if self.args else ""


class ConfigError(HfFlashError, ValueError):
    """An argument is unknown, of the wrong type or out of range."""


class UnsupportedModelError(HfFlashError, ValueError):
    """This architecture, activation function or checkpoint kind cannot run with its FFN on flash."""


class BudgetError(HfFlashError, ValueError):
    """The memory budget cannot hold what must stay in DRAM. `minimum_bytes`: the least budget that can, if it is known."""

    def __init__(self, what: str, *, minimum_bytes: int | None = None, **parts: Any) -> None:
        super().__init__(what, **parts)
        self.minimum_bytes = minimum_bytes


class UsageError(HfFlashError, RuntimeError):
    """The loaded model is used in a way it does not support."""


class CalibrationError(HfFlashError, ValueError):
    """The text is too short or does not fit the model, or the activations are not numbers."""


class StoreError(HfFlashError, OSError):
    """A problem with the files on flash."""


class StoreFormatError(StoreError):
    """A file is damaged, or is not what the store format says."""


class StoreVersionError(StoreError):
    """The store was written by a newer version of hf_flash."""


class StoreMissingError(StoreError):
    """A file or tensor that belongs to the store is missing."""


class StoreReadError(StoreError):
    """Reading neurons from flash failed."""


class RepackError(HfFlashError, OSError):
    """Writing a store, a checkpoint folder or a restored checkpoint failed."""


class TargetExistsError(RepackError):
    """The target folder already holds something."""


class DiskSpaceError(RepackError):
    """The disk is too full."""


class InvalidWeightsError(RepackError):
    """The source weights contain NaN or infinite values."""
