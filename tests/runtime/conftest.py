"""What the tests of layers on flash share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def mixture(coverage: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any, torch.Tensor]]:
    """`mixture("mixtral")`: the folder of a small random mixture, the stock model, and some token ids."""
    made: dict[str, tuple[Path, Any, torch.Tensor]] = {}

    def get(model_type: str) -> tuple[Path, Any, torch.Tensor]:
        if model_type not in made:
            folder = tmp_path_factory.mktemp(model_type) / "model"
            made[model_type] = (folder, *coverage.stock_model(model_type, folder))
        return made[model_type]

    return get
