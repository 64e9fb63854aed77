"""Codecs: how the numbers of a unit are stored.

A codec is a floating-point dtype: numbers are stored as they are in the checkpoint, and torch reads them without decoding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch


@dataclass(frozen=True)
class Codec:
    """How numbers are stored.

    Attributes:
        dtype: the dtype of the tensor in the file.
    """

    dtype: torch.dtype

    def nbytes(self, count: int) -> int:
        """Return the bytes that `count` numbers take."""
        return count * self.dtype.itemsize


CODECS: Final = (Codec(torch.float32), Codec(torch.float16), Codec(torch.bfloat16))


def codec_of(dtype: torch.dtype) -> Codec | None:
    """Return the codec that stores numbers of this dtype as they are, if there is one."""
    return next((codec for codec in CODECS if codec.dtype == dtype), None)
