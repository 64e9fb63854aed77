"""Rows of a matrix in a plain checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from hf_flash import StoreReadError
from hf_flash.reading.table import TableReader
from hf_flash.store.checkpoint import Checkpoint

ROWS, WIDTH = 300, 7


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    table = torch.randn(ROWS, WIDTH).bfloat16()
    path = tmp_path_factory.mktemp("table") / "model.safetensors"
    save_file({"other": torch.ones(3, dtype=torch.uint8), "table": table}, path)
    return path, table


@given(ids=st.sets(st.integers(0, ROWS - 1), max_size=60) | st.just(set(range(ROWS))))
def test_rows_are_those_of_the_file(ids: set[int], file: tuple[Path, torch.Tensor]) -> None:
    path, table = file
    wanted = np.array(sorted(ids), np.int64)
    assert torch.equal(TableReader(Checkpoint.open([path]), "table").read(wanted), table[torch.from_numpy(wanted)])


@pytest.mark.parametrize("how", ["cut", "written"])
def test_a_file_that_is_not_what_it_was_is_an_error(how: str, file: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(file[0].read_bytes())
    reader = TableReader(Checkpoint.open([path]), "table")
    os.truncate(path, path.stat().st_size - 3 * WIDTH) if how == "cut" else os.utime(path, (1, 1))
    with pytest.raises(StoreReadError, match=r"table in .*model\.safetensors"):
        reader.read(np.array([0, ROWS - 1]))
    reader.close()
