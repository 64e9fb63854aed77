"""The real gated model that the repository ships (examples/tiny-llama): ReLU on the gate, 10 % of the neurons active."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import hf_flash
from hf_flash import FlashOffloadConfig
from hf_flash.evaluation.compare import evaluate
from tests.conftest import ROOT, torch_threads

TINY_LLAMA = ROOT / "examples" / "tiny-llama"
TEXT = ROOT / "examples" / "text" / "sotu.valid.txt"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf_flash.repack(TINY_LLAMA, tmp_path_factory.mktemp("llama") / "flash")


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    found: torch.Tensor = AutoTokenizer.from_pretrained(TINY_LLAMA)(TEXT.read_text()[2000:4000], return_tensors="pt").input_ids
    return found[:, :200]


def load(folder: Path, **arguments: Any) -> Any:
    wanted = FlashOffloadConfig(**arguments)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=wanted, dtype=torch.float32)


@torch.no_grad()
def test_without_a_predictor_it_is_the_stock_model(packed: Path, ids: torch.Tensor) -> None:
    stock, flash = AutoModelForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32), load(packed, predictor="none")
    for tokens in (1, 5, 200):
        torch.testing.assert_close(flash(ids[:, :tokens]).logits, stock(ids[:, :tokens]).logits, rtol=1e-3, atol=1e-3)
    wanted = stock.generate(ids[:, :20], max_new_tokens=60, do_sample=False)
    assert flash.generate(ids[:, :20], max_new_tokens=60, do_sample=False).tolist() == wanted.tolist()


@torch.no_grad()
@pytest.mark.parametrize("arguments", [{}, {"predictor": "quantized", "predictor_bits": 8}])
def test_what_is_predicted_depends_on_nothing_but_the_token(
    packed: Path, ids: torch.Tensor, arguments: dict[str, Any], tmp_path: Path
) -> None:
    """Contract C3: not on what is in memory, on who is beside it, or on the number of threads."""
    folder = packed if not arguments else hf_flash.repack(TINY_LLAMA, tmp_path / "flash", **arguments)
    roomy = load(folder, memory_budget="1GB")
    tight = load(folder, memory_budget=hf_flash.stats(roomy).minimum_bytes + 400_000)
    assert 0 < hf_flash.stats(tight).capacity < 768
    rows = ids[0, :96].view(8, 12)
    wanted = roomy(rows).logits
    for model in (roomy, tight):
        for threads in (1, 2):
            with torch_threads(threads):
                assert torch.equal(model(rows).logits, wanted)
    before = hf_flash.stats(roomy).counters.selected
    roomy(rows[:1, :1])
    assert 0 < hf_flash.stats(roomy).counters.selected - before < 0.3 * 4 * 768
    for row in range(3):
        torch.testing.assert_close(tight(rows[row : row + 1]).logits, wanted[row : row + 1], rtol=1e-4, atol=1e-4)


def test_the_default_predictor_misses_little_and_changes_little(packed: Path) -> None:
    report = evaluate(packed, TEXT, tokens=4096, dtype=torch.float32, new_tokens=4)
    (found,) = [row for name, row in report["predictors"].items() if name != "none"]
    assert report["perplexity"] < 45
    assert found["missed"] < 0.03
    assert found["lost"] < 0.002
    assert abs(found["change"]) < 0.003
    assert 1.0 < found["selected"] < 2.0


def test_pipeline_and_restore(packed: Path, tmp_path: Path) -> None:
    pipe = pipeline("text-generation", model=str(packed))
    assert pipe("In the beginning", max_new_tokens=8)[0]["generated_text"].startswith("In the beginning")
    hf_flash.restore(packed, tmp_path / "plain")
    one, other = (load_file(folder / "model.safetensors") for folder in (TINY_LLAMA, tmp_path / "plain"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_it_is_calibrated_on_text(packed: Path) -> None:
    report = hf_flash.calibrate(packed, TEXT, samples=64, epochs=2)
    assert len(report["layers"]) == 4
    model = load(packed, predictor="lowrank")
    model.generate(torch.tensor([[2, 30, 40]]), max_new_tokens=4)
    assert hf_flash.stats(model).predictor == "lowrank"
