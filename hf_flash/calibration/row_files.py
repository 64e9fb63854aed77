"""Large tables on disk, one row per token: several processes write them, and they are read as mapped tensors."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from hf_flash.base.files import writing


class RowFile:
    """A file of rows that several processes write at different places.

    It is a context manager: when it exits, the rows are on disk.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with writing(path):
            path.touch()
            self._file = open(path, "r+b")

    def write(self, row: int, rows: torch.Tensor) -> None:
        """Write `rows` [n, columns] to the file, from row number `row` on."""
        data = rows.contiguous().view(torch.uint8).numpy()
        with writing(self.path):
            self._file.seek(row * data.shape[1])
            self._file.write(data.data)

    def __enter__(self) -> RowFile:
        return self

    def __exit__(self, *error: object) -> None:
        with writing(self.path), self._file:
            self._file.flush()
            os.fsync(self._file.fileno())


def map_rows(path: Path, dtype: torch.dtype, shape: tuple[int, int]) -> torch.Tensor:
    """Map a file as a tensor. It takes no memory of its own: the kernel may drop its pages and read them again."""
    raw = np.memmap(path, dtype=np.uint8, mode="c")
    return torch.from_numpy(raw).view(dtype).view(shape)
