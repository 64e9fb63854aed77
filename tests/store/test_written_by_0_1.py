"""Contract C6: what version 0.1 wrote loads, gives the same answers, and is given back bit for bit.

`written_by_0_1` has a small OPT, two repacked folders of it (one calibrated, with placed neurons and a trained predictor), an
entry of the flash cache, and the tokens that version 0.1 gave. make.py there says how they were made.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hf_flash
from hf_flash import FlashOffloadConfig
from hf_flash.runtime.model import find_runtime
from hf_flash.store.layout import FlashStore

OLD = Path(__file__).parent / "written_by_0_1"
TOKENS: dict[str, list[int]] = json.loads((OLD / "tokens.json").read_text())


@pytest.mark.parametrize("case", sorted(TOKENS))
def test_a_folder_gives_the_tokens_that_it_gave(case: str) -> None:
    name, predictor = case.split()
    more = {} if name == "plain" else {"quantization_config": FlashOffloadConfig(predictor=predictor)}  # type: ignore[arg-type]
    model = AutoModelForCausalLM.from_pretrained(OLD / name, dtype=torch.float32, **more)
    if more:
        find_runtime(model).engine.sequences.predict_always = True  # as 0.1 did
    with torch.no_grad():
        assert model(torch.arange(4, 44).view(2, 20)).logits.argmax(-1).flatten().tolist() == TOKENS[case]


@pytest.mark.parametrize(("name", "version"), [("packed", "1"), ("calibrated", "2")])
def test_a_store_is_whole_and_gives_its_checkpoint_back(tmp_path: Path, name: str, version: str) -> None:
    store = FlashStore.open_folder(OLD / name)
    assert store.check() == []
    assert {layer.unit.text for layer in store.layers} == {"up:row,down:column"}
    assert all((layer.place is not None) == (version == "2") for layer in store.layers)
    restored = load_file(hf_flash.restore(OLD / name, tmp_path / "plain") / "model.safetensors")
    original = load_file(OLD / "plain" / "model.safetensors")
    assert restored.keys() == original.keys()
    assert all(torch.equal(restored[key], original[key]) for key in original)


def test_the_same_files_are_written_today(tmp_path: Path) -> None:
    """Byte for byte, but for where the source lay (the name of its folder and the time are in the fingerprint), and the last
    bit of a predictor's `error`: 0.1 added squares in torch's order, which is not the same on every machine."""
    hf_flash.repack(OLD / "plain", tmp_path / "packed")
    for path in sorted((OLD / "packed").glob("flash-*")):
        before, now = load_file(path), load_file(tmp_path / "packed" / path.name)
        assert before.keys() == now.keys()
        for key in before:
            torch.testing.assert_close(now[key], before[key], rtol=5e-7 if key.endswith(".error") else 0, atol=0)
        assert path.stat().st_size == (tmp_path / "packed" / path.name).stat().st_size


def test_an_entry_of_the_cache_is_found_again_and_not_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--me--opt" / "snapshots" / ("0123456789" * 4)
    shutil.copytree(OLD / "plain", snapshot)
    for path in snapshot.iterdir():
        os.utime(path, (1_700_000_000, 1_700_000_000))
    cache = Path(shutil.copytree(OLD / "cache", tmp_path / "cache"))
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")}
    monkeypatch.setenv("HF_FLASH_CACHE", str(cache))
    config = FlashOffloadConfig(predictor_group_size=8)
    model = AutoModelForCausalLM.from_pretrained(snapshot, dtype=torch.float32, quantization_config=config)
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")} == before
    assert hf_flash.stats(model).predictor == "int4-g8"
    with torch.no_grad():
        found = model(torch.arange(4, 44).view(2, 20)).logits.argmax(-1).flatten().tolist()
    assert found == TOKENS["packed quantized"]
