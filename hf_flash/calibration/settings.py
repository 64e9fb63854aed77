"""`Settings`: everything that decides the result of a calibration, checked before anything is written."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch

from hf_flash.calibration.training import Targets, training_bytes
from hf_flash.errors import ConfigError
from hf_flash.predictors.quantized import quantized_formats
from hf_flash.store.layout import FlashStore

LEAST_WINDOWS: Final = 8
SAMPLES: Final = 256  # windows
_HELD_OUT: Final = 8  # one window in eight is held out of the training
_RESULTS: Final = 2  # format version of a layer's result file


@dataclass(frozen=True)
class Settings:
    """What is calibrated, on which text, and how.

    Attributes:
        folder: the repacked checkpoint.
        store: its store.
        windows: the text, int64 token ids [windows, context].
        text_name: the text's name, only for the report: the same text may have several names.
        samples: the number of windows that was asked for; a short text has fewer.
        targets, epochs, seed, placement: as in [`calibrate`].
    """

    folder: Path
    store: FlashStore
    windows: torch.Tensor
    text_name: str | None
    samples: int
    targets: Targets
    epochs: int
    seed: int
    placement: bool

    @property
    def context(self) -> int:
        """Tokens in a window."""
        return self.windows.shape[1]

    @property
    def tokens(self) -> int:
        return self.windows.numel()

    @property
    def held_out(self) -> int:
        """How many tokens at the end are never trained on."""
        return max(1, len(self.windows) // _HELD_OUT) * self.context

    @property
    def training_bytes(self) -> int:
        """The most memory that training one layer takes."""
        d_model = self.store.unit.width
        return training_bytes(self.targets.limit(d_model), max(self.store.widths), d_model)

    @property
    def text_sha256(self) -> str:
        """SHA-256 of the token ids."""
        return hashlib.sha256(self.windows.numpy().tobytes()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Everything that a layer's result depends on: a calibration is only resumed if all of it is the same."""
        return asdict(self.targets) | {
            "samples": self.samples,
            "context": self.context,
            "epochs": self.epochs,
            "seed": self.seed,
            "text": self.text_sha256,
            "fingerprint": self.store.metadata["fingerprint"],
            "quantized": sorted(fmt.variant for fmt in quantized_formats(self.store)),
            "results": _RESULTS,
        }


def check_arguments(
    targets: Targets, samples: int, context: int, epochs: int, seed: int, placement: bool, *, d_model: int, longest: int
) -> None:
    """Check that the arguments of [`calibrate`] are in range.

    Args:
        targets, samples, context, epochs, seed, placement: as in [`calibrate`].
        d_model: the model's width, which is the largest possible rank.
        longest: the most tokens that the model takes.

    Raises:
        ConfigError: an argument is out of range.
    """
    ranges: dict[str, tuple[Any, float, float]] = {
        "recall": (targets.recall, 1e-9, 1.0),
        "extra": (targets.extra, 0.0, 1.0),
        "rank": (1 if targets.rank is None else targets.rank, 1, d_model),
        "max_rank": (1 if targets.max_rank is None else targets.max_rank, 1, d_model),
        "samples": (samples, LEAST_WINDOWS, 1 << 31),
        "context": (context, 2, longest),
        "epochs": (epochs, 0, 1 << 31),
        "seed": (seed, 0, (1 << 63) - 1),
    }
    check_ranges(ranges)
    if not isinstance(placement, bool):
        raise ConfigError("placement is not valid", where="calibrate", expected="True or False", got=repr(placement))


def check_ranges(ranges: Mapping[str, tuple[Any, float, float]]) -> None:
    """Check that arguments of [`calibrate`] are in range.

    Args:
        ranges: by argument name: its value, the smallest and the largest value allowed.

    Raises:
        ConfigError: with the name of the first argument that is out of range, or not a number.
    """
    for name, (value, low, high) in ranges.items():
        numbers = float | int if name in ("recall", "extra") else int
        if isinstance(value, bool) or not isinstance(value, numbers) or not low <= value <= high:
            raise ConfigError(f"{name} is not valid", where="calibrate", expected=f"{low} to {high}", got=repr(value))
