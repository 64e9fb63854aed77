"""Commands on a mixture of experts: what they show, and that what is only for neurons is refused."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from hf_flash import FlashOffloadConfig
from hf_flash.commands.demo import demo
from hf_flash.commands.main import main
from hf_flash.commands.store_facts import check_experts, expert_facts
from hf_flash.packing.expert_folder import Mixture, open_mixture
from tests.packing.talking import make_mixture
from tests.quantized import fp8, fp8_config, make


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mixture(tmp_path_factory.mktemp("commands") / "mixture", shards="300KB")


def opened(folder: Path) -> Mixture:
    found = open_mixture(folder)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def in_8_bits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("quantized")
    source = make_mixture(place / "source", shards="1GB")
    AutoModelForCausalLM.from_pretrained(source, dtype="bfloat16").save_pretrained(source)  # as those on the Hub are
    return make(source, place, fp8((16, 16)), fp8_config((16, 16)))[0]


def test_what_is_in_8_bits_is_shown_with_its_scales(in_8_bits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(in_8_bits), "--check"]) == 0
    said = capsys.readouterr().out
    for line in (
        "kind         qwen3_moe, a mixture of experts; a plain checkpoint",
        "experts.0.down_proj.weight: 32 x 48 float8_e4m3fn, of down_proj",
        "experts.0.down_proj.weight_scale_inv: 2 x 3 float32, of down_proj, scales",
    ):
        assert line in said
    expert = expert_facts(opened(in_8_bits))
    assert expert["expert_bytes"] == sum(piece["bytes"] for piece in expert["pieces"]) == 3 * 32 * 48 + 3 * 6 * 4


def test_demo_of_what_is_in_8_bits_and_was_saved(in_8_bits: Path, tmp_path: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(in_8_bits, quantization_config=FlashOffloadConfig())
    loaded.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (in_8_bits / name).exists():
            shutil.copyfile(in_8_bits / name, tmp_path / name)
    for folder in (in_8_bits, tmp_path):
        assert demo(str(folder), prompt="a b", tokens=4, tell=lambda text: None)["same_tokens"]


# --- inspect -------------------------------------------------------------------------------------------------------


def test_inspect_shows_what_an_expert_is_and_where_it_lies(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(folder), "--check"]) == 0
    said = capsys.readouterr().out
    for line in (
        "kind         qwen3_moe, a mixture of experts; a plain checkpoint",
        "layers       3 with experts, d_model 32",
        "experts      8 a layer, 48 neurons each; a token uses 2",
        "sizes        18.0 KiB an expert, 108.0 KiB a token, 432.0 KiB all",
        "model.layers.0.mlp.experts.0.down_proj.weight: 32 x 48 float32, of down_proj",
        "A plain checkpoint has no checksums",
    ):
        assert line in said


def test_inspect_as_json_names_the_bytes_of_an_expert(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(folder), "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["files"] == sorted(path.name for path in folder.glob("*.safetensors"))
    assert (found["checked"], found["problems"], found["alike"], found["plain"]) == (False, [], True, True)
    for expert, places in enumerate(found["first_layer_experts"]):
        for piece, place in zip(found["pieces"], places, strict=True):
            name = piece["tensor"].replace("experts.0", f"experts.{expert}")
            with safe_open(folder / place["file"], "pt") as file:
                wanted = file.get_tensor(name)
            data = (folder / place["file"]).read_bytes()[place["begin"] : place["begin"] + place["bytes"]]
            assert data == wanted.numpy().tobytes()
            assert piece["shape"] == list(wanted.shape)


def test_inspect_of_what_was_saved_says_so(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=FlashOffloadConfig())
    model.save_pretrained(tmp_path / "saved")
    assert main(["inspect", str(tmp_path / "saved"), "--check"]) == 0
    said = capsys.readouterr().out
    assert "source       mixture" in said
    assert "saved by hf_flash" in said
    assert main(["restore", str(tmp_path / "saved"), str(tmp_path / "plain")]) == 0
    assert main(["inspect", str(tmp_path / "plain")]) == 0
    assert "experts; a plain checkpoint" in capsys.readouterr().out


def test_files_that_cannot_be_read_are_a_failed_check(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copied = Path(shutil.copytree(folder, tmp_path / "copy"))
    mixture = opened(copied)
    one = mixture.checkpoint.files[-1]
    assert check_experts(mixture, lambda files: files) == []
    one.rename(one.with_suffix(".moved"))
    assert [one.name in problem for problem in check_experts(mixture, lambda files: files)] == [True]
    one.with_suffix(".moved").rename(one)
    os.truncate(one, one.stat().st_size - 8)
    assert main(["inspect", str(copied), "--check"]) == 1
    assert one.name in capsys.readouterr().err


def test_of_fused_experts_each_is_found_in_the_tensor_of_all(coverage: Any, tmp_path: Path) -> None:
    coverage.stock_model("gpt_oss", tmp_path / "model")
    mixture = opened(tmp_path / "model")
    found = expert_facts(mixture)
    assert [piece["turned"] for piece in found["pieces"]] == [True, True]
    first, second = found["first_layer_experts"][:2]
    assert [two["begin"] - one["begin"] for one, two in zip(first, second, strict=True)] == [one["bytes"] for one in first]
    assert check_experts(mixture, lambda files: files) == []


# --- the others ----------------------------------------------------------------------------------------------------


def test_demo_loads_it_as_it_is_and_experts_come_and_go(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_FLASH_CACHE", str(tmp_path / "cache"))
    figures = tmp_path / "out.json"
    assert main(["demo", str(folder), "--watch", "--max-new-tokens", "8", "--json", str(figures)]) == 0
    said, report = capsys.readouterr().out, json.loads(figures.read_text())
    assert "a mixture of experts; a plain checkpoint" in said
    assert "expert hit rate" in said
    assert report["same_tokens"] == {"none": True}
    assert sum(token["read_bytes"] for token in report["watched"]) == report["stats"]["counters"]["read_bytes"]
    assert 0 < report["stats"]["capacity"] < 8
    assert any(0 < token["hit_rate"] < 1 for token in report["watched"])
    assert not (tmp_path / "cache").exists()


def test_the_live_view_shows_experts(folder: Path) -> None:
    console = Console(file=io.StringIO(), width=100, height=30, force_terminal=True, color_system="truecolor", _environ={})
    demo(str(folder), "In the beginning", 4, watch=True, tell=lambda text: None, console=console)
    text = Text.from_ansi(console.file.getvalue()).plain  # type: ignore[attr-defined]
    assert "of 8 experts a layer; a token uses 2" in text
    assert "token 3 of 3" in text


def test_demo_of_a_saved_one_compares_with_the_plain_model(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=FlashOffloadConfig())
    model.save_pretrained(tmp_path / "saved")
    for path in folder.glob("tokenizer*"):
        shutil.copyfile(path, tmp_path / "saved" / path.name)
    report = demo(str(tmp_path / "saved"), "In the beginning", 4, tell=lambda text: None)
    assert report["same_tokens"] == {"none": True}
    assert report["stats"]["experts"] == 8


def test_doctor_says_how_many_experts_fit(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", str(folder)])
    said = " ".join(capsys.readouterr().out.split())
    assert "3 layers of 8 experts" in said
    assert "a mixture of experts, read as it is" in said
    assert "hold 8 of 8 experts a layer" in said


@pytest.mark.parametrize("arguments", [
    ["repack", "MIXTURE", "NEW"], ["verify", "MIXTURE", "NEW"], ["verify", "nowhere/at-all", "MIXTURE"],
])  # fmt: skip
def test_what_is_for_neurons_is_refused(
    arguments: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"MIXTURE": str(folder), "NEW": str(tmp_path / "new")}
    assert main([places.get(item, item) for item in arguments]) == 1
    said = capsys.readouterr().err
    assert f"nothing to {arguments[0]} in a mixture of experts: its router says what a token needs" in said
    assert "load it as it is" in said
    assert list(tmp_path.iterdir()) == []
