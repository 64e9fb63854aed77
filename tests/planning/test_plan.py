"""`hf-flash plan`: sizes, sums and order. Never times: those depend on the machine."""

from __future__ import annotations

import errno
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import hf_flash
from hf_flash import FlashOffloadConfig
from hf_flash.base import folders
from hf_flash.base.sizes import parse_bytes
from hf_flash.base.tables import printed
from hf_flash.budget import divide
from hf_flash.commands.main import main
from hf_flash.errors import BudgetError, ConfigError, DiskSpaceError, RepackError, StoreMissingError, UnsupportedModelError
from hf_flash.planning import budgets, measuring, pairing, planner
from hf_flash.planning import report as planner_report
from hf_flash.planning.sentences import at_least
from hf_flash.runtime.model import find_runtime
from hf_flash.store.layout import FlashStore

PARTS = ("io_ms", "manage_ms", "predict_ms", "compute_ms", "rest_ms")


@pytest.fixture(scope="module")
def bare(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but config.json: of a model that is larger than the buffers it runs with."""
    folder = tmp_path_factory.mktemp("bare") / "small"
    folder.mkdir()
    config = json.loads((plain / "config.json").read_text())
    config |= {"hidden_size": 512, "word_embed_proj_dim": 512, "ffn_dim": 2048}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def made(bare: Path, tmp_path_factory: pytest.TempPathFactory) -> planner.Plan:
    """A plan that several tests look at."""
    return planner.plan(bare, memory="80%", disk=tmp_path_factory.mktemp("disk"), active=0.1)


@pytest.fixture
def unmeasured(made: planner.Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """What this machine does is as in `made`."""
    monkeypatch.setattr(planner, "measure", lambda *args: made.measured)


def test_config_json_is_enough(made: planner.Plan, bare: Path) -> None:
    assert (made.model, made.model_type, made.dtype, made.predictor) == ("small", "opt", "float32", "quantized")
    assert (made.activity.source, made.activity.active) == ("given", 0.1)
    assert made.activity.selected == pytest.approx(0.1 * 1.5 * 2048)
    assert made.measured.misses[:2] == (0, 1)
    assert made.measured.io_ms[0] == 0.0
    assert [path.name for path in bare.iterdir()] == ["config.json"]


@pytest.mark.parametrize(("named", "free", "reader"), [("auto", 1 << 40, "mmap"), ("auto", 1, "direct"), ("mmap", 1, "mmap")])
def test_reading_is_measured_as_loading_would_read(
    named: Any, free: int, reader: str, made: planner.Plan, bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def measure(*args: Any) -> Any:
        asked.append(args[-1])
        return measuring.measure(*args)

    monkeypatch.setattr(planner, "available_memory", lambda: free)
    monkeypatch.setattr(planner, "measure", measure)
    found = planner.plan(bare, memory="80%", disk=tmp_path, reader=named)
    assert asked == [reader]
    assert ("page cache" in found.measured.disk) == (reader == "mmap")


@pytest.mark.parametrize("reader", ["auto", "mmap", "direct"])
@pytest.mark.usefixtures("unmeasured")
def test_buffers_are_those_that_loading_gives_the_reader(opt: Callable[..., Path], reader: Any) -> None:
    folder, budget = opt("odd"), "1.4MB"  # neurons that direct reads need bounce buffers for
    config = FlashOffloadConfig(memory_budget=budget, predictor="none", reader=reader)
    real = hf_flash.stats(AutoModelForCausalLM.from_pretrained(folder, quantization_config=config))
    found = planner.plan(folder, memory=budget, predictor="none", reader=reader)
    assert found.memory.minimum_bytes == planner.needs(folder, "none", reader=reader).minimum_bytes == real.minimum_bytes


@pytest.mark.parametrize("reader", ["mmap", "direct"])
@pytest.mark.usefixtures("unmeasured")
def test_a_pair_counts_the_buffers_of_its_reader(bare: Path, reader: Any) -> None:
    least = 2 * planner.needs(bare, reader=reader).minimum_bytes
    with pytest.raises(BudgetError, match="both models") as caught:
        pairing.plan_pair(bare, bare, memory=least - 1, reader=reader)
    assert caught.value.minimum_bytes == least


def test_nothing_is_left_on_the_disk(bare: Path, tmp_path: Path) -> None:
    planner.plan(bare, disk=tmp_path, predictor="none")
    assert list(tmp_path.iterdir()) == []


def test_parts_add_up_and_reads_never_grow_with_the_budget(made: planner.Plan) -> None:
    assert made.point in made.points
    sizes = [point.budget_bytes for point in made.points]
    assert sizes == sorted(set(sizes))
    assert sizes[0] >= made.memory.minimum_bytes
    for point in made.points:
        assert point.token_ms == pytest.approx(sum(getattr(point, part) for part in PARTS))
        assert 0.0 <= point.hit_rate <= 1.0
    reads = [point.read_bytes for point in made.points]
    assert reads == sorted(reads, reverse=True)
    assert made.suggested_bytes is None or made.suggested_bytes in sizes


@pytest.mark.parametrize("shape", ["pre_ln", "post_ln", "no_bias", "odd"])
@pytest.mark.parametrize("predictor", ["quantized", "none"])
@pytest.mark.usefixtures("unmeasured")
def test_memory_is_divided_as_loading_does(opt: Callable[..., Path], shape: str, predictor: Any) -> None:
    folder, budget = opt(shape), "1.4MB"
    config = FlashOffloadConfig(memory_budget=budget, predictor=predictor)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)
    found, real = planner.plan(folder, memory=budget, predictor=predictor, dtype="bfloat16"), hf_flash.stats(model)
    assert found.memory.resident_bytes == real.resident_bytes
    assert found.memory.predictor_bytes == real.predictor_bytes
    assert (found.memory.capacity, found.memory.dense_bytes) == (real.capacity, real.dense_bytes)
    assert found.kv_cache_bytes_per_token == real.kv_cache_bytes_per_token


@pytest.mark.parametrize("shape", ["post_ln", "no_bias", "odd"])
def test_every_shape_can_be_measured(opt: Callable[..., Path], shape: str, tmp_path: Path) -> None:
    found = planner.plan(opt(shape), disk=tmp_path, dtype="bfloat16", predictor="lowrank" if shape == "odd" else None)
    assert found.point.token_ms > 0


def test_a_repacked_model_is_read_where_it_lies(packed: Path) -> None:
    found = planner.plan(packed, tokens=8)
    assert str(packed) in found.measured.disk
    assert (found.predictor, found.activity.source) == ("quantized", "assumed")


@pytest.mark.usefixtures("unmeasured")
def test_a_calibration_is_believed(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use = {"mean": [10 * k**0.5 for k in range(1, 17)]}
    report = {"layers": [{"active": 10.0, "use": use, "int4-g64": {"selected": 1.2}}] * 3}
    monkeypatch.setattr(planner, "stored_report", lambda store: report)
    found = planner.plan(packed)
    assert found.activity.source == "measured"
    assert (found.activity.active, found.activity.selected) == pytest.approx((10 / 128, 12.0))
    assert planner.plan(packed, active=0.5).activity.source == "given"


@pytest.mark.usefixtures("unmeasured")
def test_windows_are_divided_as_calibrated_in_a_plan_and_in_a_model(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [{"active": a, "use": {"mean": [a * k**0.5 for k in range(1, 17)]}} for a in (3.0, 9.0, 12.0)]
    for place in (planner, divide):
        monkeypatch.setattr(place, "stored_report", lambda store: {"layers": layers})
    found = planner.plan(packed, memory=planner.plan(packed).memory.minimum_bytes + 30 * 1024)
    config = FlashOffloadConfig(memory_budget=found.memory.budget_bytes)
    model = AutoModelForCausalLM.from_pretrained(packed, quantization_config=config)
    real = [ffn.window.capacity for ffn in find_runtime(model).ffns]
    assert tuple(real) == found.memory.capacities
    assert real == sorted(set(real))
    stats = hf_flash.stats(model)
    assert (stats.capacity, stats.window_bytes) == (sum(real) // 3, sum(real) * 2 * 32 * 4)
    model.generate(torch.tensor([[5, 9, 11]]), attention_mask=torch.ones(1, 3, dtype=torch.long), max_new_tokens=40)
    assert hf_flash.stats(model).dram_bytes <= found.memory.budget_bytes


def test_a_budget_that_makes_windows_useless_is_told_of(
    packed: Path, caplog: pytest.LogCaptureFixture, made: planner.Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner, "measure", lambda *args: made.measured)
    minimum = planner.plan(packed).memory.minimum_bytes
    with caplog.at_level(logging.WARNING, logger="hf_flash"):
        AutoModelForCausalLM.from_pretrained(packed, quantization_config=FlashOffloadConfig(memory_budget=minimum + 1024))
    (said,) = [record.getMessage() for record in caplog.records if record.name == "hf_flash"]
    assert "leaves room for 1 neurons a layer, and a token uses 6 (assumed)" in said
    assert "would hold what 5 tokens use" in said
    assert said.removeprefix("hf_flash: ") in printed(planner.plan(packed, memory=minimum + 1024).describe())
    caplog.clear()
    for arguments in ({"memory_budget": minimum + 64 * 1024}, {"predictor": "none", "memory_budget": minimum + 1024}, {}):
        AutoModelForCausalLM.from_pretrained(packed, quantization_config=FlashOffloadConfig(**arguments))
    assert "leaves room" not in caplog.text


# --- the suggestion ------------------------------------------------------------------------------------------------------


def test_the_least_budget_that_is_nearly_as_fast() -> None:
    points = [planner.Point(size, 1, 0.5, 1.0, io, 1.0, 1.0, 1.0, 6.0) for size, io in ((1, 9.0), (2, 1.5), (3, 1.0), (4, 0.1))]
    assert budgets.suggestion(points, 4) == 3
    assert budgets.suggestion(points, 3) == 2
    assert budgets.suggestion(points, 0) is None


@pytest.mark.usefixtures("unmeasured")
def test_the_dense_model_is_named_when_it_fits(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "The whole model fits into what is free" in printed(planner.plan(bare, memory="80%").describe())
    for place in (planner, planner_report):
        monkeypatch.setattr(place, "ceiling_bytes", lambda budget: 1000)
    said = printed(planner.plan(bare, memory="80%").describe())
    assert "The whole model fits" not in said
    assert "does not fit here" in said
    assert "does not run here" in said


# --- the command ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unmeasured")
def test_json(bare: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(bare), "--memory", "80%", "--json", "-"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert main(["plan", str(bare), "--memory", "80%", "--json", str(tmp_path / "out.json")]) == 0
    written = json.loads((tmp_path / "out.json").read_text())
    for found in (shown, written):
        assert found["activity"] == {
            "source": "assumed",
            "active": 0.03,
            "predicted": 1.5,
            "selected": pytest.approx(0.045 * 2048),
        }
        assert found["memory"]["capacity"] == found["point"]["capacity"]
        assert found["point"]["token_ms"] == pytest.approx(sum(found["point"][part] for part in PARTS))
    table = capsys.readouterr().out
    assert "Assumed, as the paper has it" in table
    assert "3.0% of the neurons are active for a token, and the predictor chooses 4.5%" in table
    assert "windows, " in table


@pytest.mark.parametrize(("arguments", "kind"), [
    ({"memory": "1kB"}, BudgetError), ({"memory": "half"}, ConfigError), ({"dtype": "int8"}, ConfigError),
    ({"active": 0.0}, ConfigError), ({"fresh": 2.0}, ConfigError), ({"predicted": -1.0}, ConfigError),
    ({"tokens": 0}, ConfigError), ({"disk": "/nowhere"}, ConfigError), ({"predictor": "magic"}, ConfigError),
])  # fmt: skip
def test_what_cannot_be_planned(arguments: dict[str, Any], kind: type[Exception], bare: Path) -> None:
    with pytest.raises(kind):
        planner.plan(bare, **arguments)


def test_models_that_are_none(tmp_path: Path, bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(StoreMissingError, match=r"config\.json"):
        planner.plan(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(UnsupportedModelError, match="not recognised"):
        planner.plan(tmp_path)
    config = json.loads((bare / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"activation_function": "gelu"}))
    with pytest.raises(UnsupportedModelError, match="exact zeros"):
        planner.plan(tmp_path, predictor="lowrank")
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ConfigError, match="quantized in another way"):
        planner.plan(tmp_path)
    assert main(["plan", "/no/where"]) == 1
    assert "no such folder" in capsys.readouterr().err


def test_no_room_for_a_scratch_file(bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(folders.os, "fsync", full)
        with pytest.raises((RepackError, DiskSpaceError)):
            planner.plan(bare, disk=tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 0}))
    with pytest.raises(DiskSpaceError):
        planner.plan(bare, disk=tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- memory_budget="auto" ------------------------------------------------------------------------------------------------


def test_an_automatic_budget_is_the_default_spelt_out(packed: Path, tmp_path: Path) -> None:
    config = FlashOffloadConfig(memory_budget="auto")
    assert config.to_dict()["memory_budget"] == "auto"
    assert FlashOffloadConfig.from_dict(config.to_dict()).memory_budget == "auto"
    model = AutoModelForCausalLM.from_pretrained(packed, quantization_config=config)
    assert hf_flash.stats(model).capacity == FlashStore.open_folder(packed).layers[0].d_ff
    with pytest.raises(ConfigError):
        FlashOffloadConfig(memory_budget="automatic")


# --- two models, one budget ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def draft(bare: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model half as deep, with the same tokens."""
    folder = tmp_path_factory.mktemp("draft") / "draft"
    folder.mkdir()
    config = json.loads((bare / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"num_hidden_layers": 1, "hidden_size": 256, "word_embed_proj_dim": 256})
    )
    return folder


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("memory", ["70%", "90%", "130%", None])
def test_two_models_share_a_budget_so_that_a_round_is_short(bare: Path, draft: Path, memory: str | None) -> None:
    pair = pairing.plan_pair(bare, draft, memory=memory, active=0.1)
    total, least = pair.target_bytes + pair.assistant_bytes, pair.assistant.memory.minimum_bytes
    whole = sum(planner.needs(each).dense_bytes for each in (bare, draft))
    assert total == (int(whole * float(memory[:-1]) / 100) if memory else pytest.approx(total))
    assert least <= pair.assistant_bytes <= total - pair.target.memory.minimum_bytes
    assert pair.round_ms == pytest.approx(pair.draft_tokens * pair.draft_token_ms + pair.call_ms)
    most = min(total - pair.target.memory.minimum_bytes, max(least, planner.needs(draft).dense_bytes))
    for step in range(9):
        share = least + (most - least) * step // 8
        other = pair.draft_tokens * pair.assistant.token_ms(share) + pair.target.token_ms(total - share)
        assert pair.round_ms <= 1.011 * other


@pytest.mark.usefixtures("unmeasured")
def test_two_models_that_do_not_fit_together_are_an_error(bare: Path, draft: Path) -> None:
    least = sum(planner.needs(each).minimum_bytes for each in (bare, draft))
    with pytest.raises(BudgetError, match="both models") as caught:
        pairing.plan_pair(bare, draft, memory=least - 1)
    assert caught.value.minimum_bytes == least
    assert pairing.plan_pair(bare, draft, memory=least).assistant_bytes == planner.needs(draft).minimum_bytes
    with pytest.raises(ConfigError, match="no drafts"):
        pairing.plan_pair(bare, draft, draft_tokens=0)


def test_the_command_divides_a_budget(bare: Path, draft: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "pair.json"
    arguments = ["--assistant", str(draft), "--draft-tokens", "3", "--memory", "80%", "--disk", str(tmp_path)]
    assert main(["plan", str(bare), *arguments, "--json", str(out)]) == 0
    said, found = capsys.readouterr().out, json.loads(out.read_text())
    assert found["draft_tokens"] == 3
    assert found["round_ms"] == pytest.approx(3 * found["draft_token_ms"] + found["call_ms"])
    budgets = [parse_bytes(size) for size in re.findall(r'"(\d+[KM]?B)"', said.partition("Together in")[2])]
    for size, exact in zip(budgets, (found["target_bytes"], found["assistant_bytes"]), strict=True):
        assert exact - 10**6 < size <= exact


@given(st.integers(1000, 1 << 40))
def test_a_suggested_size_can_be_typed_back(nbytes: int) -> None:
    assert nbytes <= parse_bytes(at_least(nbytes)) <= 1.01 * nbytes + 10
    assert parse_bytes(pairing.format_size(nbytes, nbytes)) == nbytes
    assert 0 <= nbytes - parse_bytes(pairing.format_size(nbytes, nbytes // 2)) < max(1000, nbytes / 100)
