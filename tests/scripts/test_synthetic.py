"""The synthetic models that measurements are taken on: they are as sparse as they say, and hf_flash runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hf_flash
from hf_flash import FlashOffloadConfig
from hf_flash.errors import TargetExistsError
from tests.conftest import ROOT, load_script

SCRIPTS = ROOT / "scripts"
PROMPT = torch.tensor([[11, 7, 30, 45, 7]])


def quiet(text: str) -> None:
    """Takes what the script would print."""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("make_synthetic_opt")


@pytest.fixture(scope="module", params=["paper", "paper-predicted"])
def made(request: pytest.FixtureRequest, script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder with `plain` and `packed`, and the report."""
    folder = tmp_path_factory.mktemp(request.param)
    arguments = {"dtype": "float32", "packed": folder / "packed", "say": quiet}
    return folder, script.make(folder / "plain", "test", request.param, **arguments)


def test_it_meets_its_profile_and_is_labelled(made: tuple[Path, Any]) -> None:
    folder, report = made
    assert report["faults"] == []
    assert len(report["measured"]["layers"]) == 4
    assert all(1.0 <= row["selected_per_active"] < 1.3 and row["missed"] < 0.01 for row in report["measured"]["layers"])
    for part in ("plain", "packed"):
        assert json.loads((folder / part / "synthetic.json").read_text())["synthetic"] is True
        assert json.loads((folder / part / "config.json").read_text())["synthetic"] == report["label"]
        assert "SYNTHETIC" in (folder / part / "README.md").read_text()


def test_another_profile_is_noticed(script: ModuleType, made: tuple[Path, Any]) -> None:
    rows = made[1]["measured"]["layers"]
    (other,) = [profile for name, profile in script.PROFILES.items() if name != made[1]["label"]["profile"]]
    wrong = script.faults(rows, other)
    assert len([fault for fault in wrong if fault.startswith("active")]) == len(rows) + 1
    assert any(fault.startswith("union_of_4") for fault in wrong)


def test_stock_transformers_sees_what_was_measured(made: tuple[Path, Any]) -> None:
    """The measurement goes layer by layer; here the whole model runs."""
    folder, report = made
    model = AutoModelForCausalLM.from_pretrained(folder / "plain").eval()
    shares: list[float] = []
    for layer in model.get_decoder().layers:
        layer.fc1.register_forward_hook(lambda _, x, y: shares.append(float((y > 0).float().mean())))
    tokens = torch.randint(4, 512, (1, 256), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model(tokens)
    assert shares == pytest.approx([row["active"] for row in report["measured"]["layers"]], abs=1e-4)


def test_up_projections_have_the_rank_of_their_factors(made: tuple[Path, Any]) -> None:
    folder, report = made
    up = load_file(folder / "plain" / "model.safetensors")["model.decoder.layers.3.fc1.weight"]
    factors = load_file(folder / "plain" / "synthetic-factors.safetensors")
    torch.testing.assert_close(up, factors["layers.3.a"].float() @ factors["layers.3.b"].float())
    assert int(torch.linalg.matrix_rank(up, rtol=1e-4)) == report["label"]["rank"] == 64


def test_packed_it_runs_low_rank_within_any_budget(made: tuple[Path, Any]) -> None:
    folder, report = made
    assert report["loaded"]["predictor"] == "lowrank"

    def run(**arguments: Any) -> tuple[list[int], Any]:
        quantization = FlashOffloadConfig(reader="direct", **arguments)
        model = AutoModelForCausalLM.from_pretrained(folder / "packed", quantization_config=quantization)
        model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=24, do_sample=False)
        ids = model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=24, do_sample=False)
        stats = hf_flash.stats(model)
        hf_flash.close(model)
        return ids[0].tolist(), stats

    tokens, plenty = run()
    same, little = run(memory_budget=plenty.minimum_bytes)
    assert tokens == same
    assert len(set(tokens[len(PROMPT[0]) :])) > 2  # not one token for ever
    assert plenty.predictor == little.predictor == "lowrank"
    assert little.dram_bytes <= plenty.minimum_bytes
    assert little.counters.read_bytes > plenty.counters.read_bytes


def test_large_ones_are_sharded(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "SHARD_BYTES", 700_000)
    report = script.make(tmp_path / "model", "test", "paper", dtype="float16", layers=2, seed=5, say=quiet)
    assert report["faults"] == []
    assert len(list((tmp_path / "model").glob("model-*-of-*.safetensors"))) > 2
    model, told = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto", output_loading_info=True)
    assert model.dtype == torch.float16
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    with pytest.raises(TargetExistsError):
        script.make(tmp_path / "model", "test", "paper", say=quiet)


def test_the_same_seed_gives_the_same_bytes(script: ModuleType, tmp_path: Path) -> None:
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        script.make(tmp_path / name, "test", "paper", layers=1, seed=seed, say=quiet)
    one, two, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two", "other"))
    assert one == two
    assert one != other


@pytest.mark.parametrize("arguments", [[], ["up"], ["sideways", "x"], ["throttle", "x"], ["up", "x", "--size"]])
def test_the_stand_in_ssd_explains_itself(arguments: list[str], tmp_path: Path) -> None:
    done = subprocess.run([SCRIPTS / "standin_ssd", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "standin_ssd up DIR" in done.stderr
    assert not list(tmp_path.iterdir())


# --- the Llama ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "relu2", "silu"])
def test_the_llama_is_as_sparse_as_it_says(activation: str, script: ModuleType, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        patch.setitem(sys.modules, "make_synthetic_opt", script)
        llama = load_script("make_synthetic_llama")
        assert llama.make(tmp_path / "plain", "test", tmp_path / "packed", activation=activation, dtype="float32") == []
    stock, flash = (AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32) for name in ("plain", "packed"))
    assert hf_flash.stats(flash).predictor == ("none" if activation == "silu" else "int4-g64")
    wanted = stock.generate(PROMPT, max_new_tokens=6, do_sample=False)
    assert flash.generate(PROMPT, max_new_tokens=6, do_sample=False).tolist() == wanted.tolist()
    if activation != "silu":
        assert json.loads((tmp_path / "packed" / "synthetic.json").read_text())["synthetic"] is True
