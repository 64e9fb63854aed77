"""Files of rows."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from hf_flash.base.files import writing


class _Rows:
    """A file of rows that several processes write at different places."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with writing(path):
            path.touch()
            self._file = open(path, "r+b")

    def write(self, row: int, rows: torch.Tensor) -> None:
        """Write `rows` [n, columns], the first of which is row number `row` of the file."""
        data = rows.contiguous().view(torch.uint8).numpy()
        with writing(self.path):
            self._file.seek(row * data.shape[1])
            self._file.write(data.data)

    def __enter__(self) -> _Rows:
        return self

    def __exit__(self, *error: object) -> None:
        with writing(self.path), self._file:
            self._file.flush()
            os.fsync(self._file.fileno())


def _mapped(path: Path, dtype: torch.dtype, shape: tuple[int, int]) -> torch.Tensor:
    """A file as a tensor whose pages the kernel may drop."""
    raw = np.memmap(path, dtype=np.uint8, mode="c")
    return torch.from_numpy(raw).view(dtype).view(shape)
