"""A mixture of experts as a folder: never repacked, restored by copying, and its origin remembered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_flash
from hf_flash import FlashOffloadConfig, StoreError, TargetExistsError, UsageError
from hf_flash.packing.expert_folder import SOURCE, mixture_in, open_mixture
from tests.packing.talking import make_mixture

IDS = torch.tensor([[2, 44, 81, 63, 10]])


@pytest.fixture(scope="module", params=["1GB", "300KB"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mixture(tmp_path_factory.mktemp("mixture") / "model", shards=request.param)


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=FlashOffloadConfig())


def test_what_is_a_mixture(folder: Path, plain: Path, packed: Path, tmp_path: Path) -> None:
    assert mixture_in(folder) is not None
    (tmp_path / "config.json").write_text('{"model_type": "nobody-knows"}')
    for other in (plain, packed, tmp_path, tmp_path / "nowhere"):
        assert mixture_in(other) is None
        assert open_mixture(other) is None


def test_it_is_not_repacked(folder: Path, tmp_path: Path) -> None:
    load(folder).save_pretrained(tmp_path / "saved")
    for source in (folder, tmp_path / "saved"):
        with pytest.raises(UsageError, match="nothing to repack in a mixture of experts"):
            hf_flash.repack(source, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_restored_it_is_the_plain_checkpoint(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    model.save_pretrained(tmp_path / "saved")
    restored = hf_flash.restore(tmp_path / "saved", tmp_path / "restored")
    found = {path.name for path in restored.iterdir()}
    assert found == {path.name for path in folder.iterdir() if "token" not in path.name}  # as transformers saves a model
    for path in folder.glob("*.safetensors"):
        assert (restored / path.name).read_bytes() == path.read_bytes()
    assert "quantization_config" not in json.loads((restored / "config.json").read_text())
    stock = AutoModelForCausalLM.from_pretrained(restored)
    assert not hasattr(stock, "flash_runtime")
    torch.testing.assert_close(stock(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(TargetExistsError):
        hf_flash.restore(tmp_path / "saved", restored)


def test_what_was_changed_in_memory_is_restored_too(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    model.get_parameter("model.layers.1.mlp.gate.weight").data.mul_(0.5)
    model.save_pretrained(tmp_path / "saved")
    stock = AutoModelForCausalLM.from_pretrained(hf_flash.restore(tmp_path / "saved", tmp_path / "restored"))
    torch.testing.assert_close(stock(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


def test_a_plain_folder_has_nothing_to_restore(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="not a repacked checkpoint"):
        hf_flash.restore(folder, tmp_path / "target")
    assert list(tmp_path.iterdir()) == []


def test_where_it_came_from_is_known_however_often_it_is_saved(folder: Path, tmp_path: Path) -> None:
    load(folder).save_pretrained(tmp_path / "one")
    load(tmp_path / "one").save_pretrained(tmp_path / "two")
    for name in ("one", "two"):
        mixture = open_mixture(tmp_path / name)
        assert mixture is not None
        assert mixture.source == {"source": "model", "revision": ""}
    (tmp_path / "two" / SOURCE).write_text('{"source": 3, "revision": ""}')
    mixture = open_mixture(tmp_path / "two")
    assert mixture is not None
    with pytest.raises(StoreError, match="where a checkpoint came from"):
        _ = mixture.source
