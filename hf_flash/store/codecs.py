"""Codecs: how the numbers of a unit are stored.

One table. A codec of today is a floating-point dtype, and the numbers of the checkpoint are stored as they are. A codec with
fewer bits is another row here, with functions that make numbers of its bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch


@dataclass(frozen=True)
class Codec:
    """How numbers are stored.

    Attributes:
        name: in a file's metadata; that of the dtype in safetensors.
        dtype: of the tensor in the file.
    """

    name: str
    dtype: torch.dtype

    def nbytes(self, count: int) -> int:
        """Bytes of `count` numbers."""
        return count * self.dtype.itemsize


CODECS: Final[Mapping[str, Codec]] = {
    codec.name: codec for codec in (Codec("F32", torch.float32), Codec("F16", torch.float16), Codec("BF16", torch.bfloat16))
}


def codec_of(dtype: torch.dtype) -> Codec | None:
    """The codec that stores numbers of this dtype as they are, if there is one."""
    return next((codec for codec in CODECS.values() if codec.dtype == dtype), None)
