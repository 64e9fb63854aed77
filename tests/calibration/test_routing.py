"""What `calibrate` measures of a mixture's routers: it is what the slots do, and `plan` goes by it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Qwen3MoeForCausalLM, Qwen3VLMoeConfig

import hf_flash
from hf_flash import BudgetError, CalibrationError, ConfigError, FlashOffloadConfig, RepackError, StoreFormatError
from hf_flash.base.tables import printed
from hf_flash.budget.routing import routing_in
from hf_flash.calibration import job
from hf_flash.calibration.routing import LayerHits
from hf_flash.commands.main import main
from hf_flash.planning import mixture as mixture_plan
from hf_flash.planning import planner
from hf_flash.planning.measuring import Speeds
from hf_flash.planning.mixture_report import ExpertOutlook
from hf_flash.runtime.expert_slots import ExpertSlots
from hf_flash.runtime.model import runtime_of
from hf_flash.store.names import ROUTING_FILE
from tests.conftest import ROOT
from tests.packing.talking import make_mixture

EXPERTS, USED = 8, 2
TINY_MOE = ROOT / "examples" / "tiny-moe"
TEXT = ROOT / "examples" / "text" / "sotu.valid.txt"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mixture(tmp_path_factory.mktemp("routing") / "mixture")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def some_tokens(count: int, vocabulary: int = 4096) -> torch.Tensor:
    return torch.randint(3, vocabulary, (count,), generator=torch.Generator().manual_seed(3))


# --- what is counted


@pytest.mark.parametrize("tokens", [2, 3, 9, 40])
@pytest.mark.parametrize("slots", range(EXPERTS + 1))
def test_hits_are_those_of_the_slots(slots: int, tokens: int) -> None:
    """Prompts and decoding in turn, some tokens naming an expert twice, or one that is elsewhere."""
    rng = np.random.default_rng(tokens)
    windows = rng.choice(EXPERTS + 1, size=(5, tokens, 3), p=np.arange(1, EXPERTS + 2) / np.arange(1, EXPERTS + 2).sum())
    count, real, hits, uses = LayerHits(EXPERTS), ExpertSlots(EXPERTS, np.empty((slots, 4), np.uint8)), 0, 0
    for window in windows:
        count.add(window)
        for number, named in enumerate(window):
            used = np.unique(named[named < EXPERTS])
            room = real.make_room(used, np.zeros_like(used), 1)
            for expert in room.leaving:
                real.drop(expert)
            for expert in room.kept:
                real.put(expert, real.take())
            if 2 * number >= tokens:
                hits, uses = hits + len(room.hits), uses + len(used)
    found = count.found()
    assert count.uses == uses
    assert found.hits[slots] == pytest.approx(hits / uses)
    assert len(found.hits) == EXPERTS + 1
    assert found.hits[0] == 0


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "deepseek_v3", "nemotron_h"])
def test_decoding_hits_as_often_as_was_measured(model_type: str, coverage: ModuleType, tmp_path: Path) -> None:
    """After a prompt of half a window, with the tokens of the other half, in memory for some experts only."""
    _, ids = coverage.stock_model(model_type, tmp_path / "model")
    tokens = some_tokens(64, int(ids.max()) + 1)
    report = hf_flash.calibrate(tmp_path / "model", tokens, samples=1, context=64)
    minimum = hf_flash.stats(load(tmp_path / "model")).minimum_bytes
    seen = set()
    for extra in (0, 30_000, 90_000, 200_000):
        model = load(tmp_path / "model", memory_budget=minimum + extra, lookahead=0)
        with torch.no_grad():
            cache = model(tokens[None, :32]).past_key_values
            hf_flash.stats(model, reset=True)
            for token in tokens[32:]:
                cache = model(token.view(1, 1), past_key_values=cache).past_key_values
        counters, slots = hf_flash.stats(model).counters, runtime_of(model).plan.capacities
        wanted = sum(layer["hits"][have] for layer, have in zip(report["layers"], slots, strict=True)) / len(slots)
        assert counters.hits / counters.selected == pytest.approx(wanted, abs=1e-9)
        seen.add(wanted)
    assert len(seen) > 2


def load(folder: Path, **arguments: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=FlashOffloadConfig(**arguments)).eval()


def test_the_report_is_stored_and_the_same_each_time_in_any_memory(copy: Path) -> None:
    tokens = some_tokens(2048)
    found = hf_flash.calibrate(copy, tokens, context=64)
    assert json.loads((copy / ROUTING_FILE).read_text()) == json.loads(json.dumps(found))
    stored = routing_in(copy, [EXPERTS] * 3)
    assert stored is not None
    assert (stored.text, stored.tokens, stored.counted) == (None, 1024, 512)
    assert stored.hit_rate([USED] * 3) == pytest.approx(stored.reuse)  # slots for what one token uses
    assert stored.hit_rate([EXPERTS] * 3) > 0.98
    least = hf_flash.stats(load(copy)).minimum_bytes
    assert hf_flash.calibrate(copy, tokens, context=64, memory_budget=least) == found
    assert hf_flash.calibrate(copy, tokens, context=64, seed=1) != found
    with pytest.raises(BudgetError):
        hf_flash.calibrate(copy, tokens, memory_budget=least - 1)


# --- who uses it


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = Speeds("a disk", 1 << 20, disk_gb_per_s=2.0, dram_gb_per_s=20.0, torch_threads=2)
    monkeypatch.setattr(mixture_plan, "measure_speeds", lambda *args: speeds)


def outlook(source: Path | str, **arguments: Any) -> ExpertOutlook:
    found = planner.plan(source, **arguments)
    assert isinstance(found, ExpertOutlook)
    return found


@pytest.mark.usefixtures("unmeasured")
def test_plan_goes_by_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(TINY_MOE, tmp_path / "moe"))
    before = outlook(folder, memory="4MiB")
    assert main(["calibrate", str(folder), "--text", str(TEXT), "--samples", "4"]) == 0
    said = capsys.readouterr().out
    assert len(said.splitlines()) == 9
    assert "Counted on 512 of 1024 tokens" in said
    found = outlook(folder, memory="4MiB")
    routing = routing_in(folder, found.memory.experts)
    assert routing is not None
    assert found.measured_on == routing.text == TEXT.name
    for point in found.points:
        slots = [min(point.capacity, 16)] * 4
        assert routing.hit_rate(slots) <= point.typical.hit_rate + 1e-9  # some layers have one slot more
    assert found.point.typical.hit_rate == pytest.approx(routing.hit_rate(found.memory.capacities))
    assert found.point.typical.hit_rate != before.point.typical.hit_rate
    assert found.point.uniform == before.point.uniform
    assert f"was measured by `hf-flash calibrate`, on {TEXT.name}" in printed(found.describe())
    assert "Assumed: tokens use the same experts again" in printed(before.describe())
    assert main(["inspect", str(folder)]) == 0
    assert f"the token before used {routing.reuse:.1%}; 512 tokens of {TEXT.name}" in capsys.readouterr().out


@pytest.mark.usefixtures("unmeasured")
def test_it_goes_along_where_the_model_is_saved(copy: Path, tmp_path: Path) -> None:
    hf_flash.calibrate(copy, some_tokens(512), samples=2)
    load(copy).save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / ROUTING_FILE).read_bytes() == (copy / ROUTING_FILE).read_bytes()
    assert outlook(tmp_path / "saved").measured_on == "token ids"
    restored = hf_flash.restore(tmp_path / "saved", tmp_path / "plain")
    assert (restored / ROUTING_FILE).read_bytes() == (copy / ROUTING_FILE).read_bytes()


def test_what_was_measured_of_another_model_does_not_stay(folder: Path, copy: Path, tmp_path: Path) -> None:
    hf_flash.calibrate(copy, some_tokens(512), samples=1)
    load(copy).save_pretrained(tmp_path / "saved")
    load(folder).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / ROUTING_FILE).exists()
    again = load(tmp_path / "saved")
    hf_flash.calibrate(tmp_path / "saved", some_tokens(512), samples=1)
    again.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / ROUTING_FILE).exists()


def test_a_mixture_that_looks_at_images(coverage: ModuleType, tmp_path: Path) -> None:
    config = Qwen3VLMoeConfig(
        text_config={
            "hidden_size": 32, "num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 99, "intermediate_size": 32,
            "rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]},
        },
        vision_config={"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32,
                       "deepstack_visual_indexes": []},
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    found = hf_flash.calibrate(tmp_path, some_tokens(64, 90), samples=2, context=16)
    assert [len(layer["hits"]) for layer in found["layers"]] == [5, 5]


# --- what is refused


@pytest.mark.parametrize(("name", "value"), [
    ("recall", 0.9), ("extra", 0.1), ("rank", 8), ("max_rank", 8), ("epochs", 1), ("placement", False),
])  # fmt: skip
def test_what_only_a_predictor_has_is_refused_by_name(folder: Path, name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"nothing is trained(.|\n)*{name}={value}"):
        hf_flash.calibrate(folder, some_tokens(512), **{name: value})


@pytest.mark.parametrize(("name", "value"), [
    ("samples", 0), ("samples", True), ("samples", 2.0), ("context", 1), ("context", 257), ("seed", -1), ("seed", "a"),
])  # fmt: skip
def test_a_bad_argument_is_refused_by_name(folder: Path, name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name} is not valid"):
        hf_flash.calibrate(folder, some_tokens(512), **{name: value})


def test_bad_text_is_refused_and_nothing_is_written(folder: Path) -> None:
    for text, error in (([], "empty"), ([5] * 255, "too short"), ([4096] * 600, "not the model's"), ([0.5] * 600, "whole")):
        with pytest.raises(CalibrationError, match=error):
            hf_flash.calibrate(folder, text)
    assert not (folder / ROUTING_FILE).exists()


def test_several_processes_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job.Processes, "of_environment", lambda: SimpleNamespace(count=2))
    with pytest.raises(ConfigError, match=r"by one process(.|\n)*processes=2"):
        hf_flash.calibrate(folder, some_tokens(512))


def test_where_nothing_can_be_written_nothing_is_measured(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copy / ROUTING_FILE).mkdir()
    monkeypatch.setattr(Qwen3MoeForCausalLM, "from_pretrained", None)
    with pytest.raises(RepackError, match=ROUTING_FILE):
        hf_flash.calibrate(copy, some_tokens(512))


@pytest.mark.usefixtures("unmeasured")
def test_a_link_to_elsewhere_is_neither_read_nor_saved(copy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = load(copy)
    hf_flash.calibrate(copy, some_tokens(512), samples=1)
    (copy / ROUTING_FILE).rename(tmp_path / "elsewhere.json")
    (copy / ROUTING_FILE).symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(StoreFormatError, match="outside its folder"):
        outlook(copy)
    model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / ROUTING_FILE).exists()
    assert "is not saved with the model" in caplog.text


@pytest.mark.usefixtures("unmeasured")
def test_names_of_texts_cannot_write_to_the_terminal(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf_flash.calibrate(copy, some_tokens(512), samples=1)
    damaged(lambda found: found.update(text="a\x1b[31mb\nc"))(copy / ROUTING_FILE)
    assert main(["inspect", str(copy)]) == 0
    said = capsys.readouterr().out + printed(outlook(copy).describe())
    assert said.count("a\N{REPLACEMENT CHARACTER}[31mb\N{REPLACEMENT CHARACTER}c") == 2


def damaged(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        found = json.loads(path.read_text())
        change(found)
        path.write_text(json.dumps(found))

    return damage


@pytest.mark.parametrize("damage", [
    lambda path: path.write_text("{"), lambda path: path.write_text("[]"), lambda path: path.write_bytes(b"\xff\xfe"),
    damaged(lambda found: found.pop("layers")), damaged(lambda found: found["layers"].pop()),
    damaged(lambda found: found.update(layers={})), damaged(lambda found: found["layers"].__setitem__(1, None)),
    damaged(lambda found: found["layers"][0]["hits"].pop()), damaged(lambda found: found["layers"][0].pop("hits")),
    damaged(lambda found: found["layers"][2]["hits"].__setitem__(3, 1.5)),
    damaged(lambda found: found["layers"][2]["hits"].__setitem__(3, float("nan"))),
    damaged(lambda found: found["layers"][2]["hits"].__setitem__(8, 0.0)),
    damaged(lambda found: found["layers"][0].update(reuse="much")), damaged(lambda found: found["layers"][0].pop("reuse")),
    damaged(lambda found: found.update(tokens=-1)), damaged(lambda found: found.update(counted=True)),
    damaged(lambda found: found.update(text=7)), damaged(lambda found: found.pop("sha256")),
])  # fmt: skip
@pytest.mark.usefixtures("unmeasured")
def test_a_file_that_is_something_else_is_named_and_disturbs_no_loading(copy: Path, damage: Callable[[Path], None]) -> None:
    hf_flash.calibrate(copy, some_tokens(512), samples=1)
    damage(copy / ROUTING_FILE)
    with pytest.raises(StoreFormatError, match=ROUTING_FILE):
        outlook(copy)
    assert main(["inspect", str(copy)]) == 1
    assert load(copy)(some_tokens(4)[None]).logits.isfinite().all()
