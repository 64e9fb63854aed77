"""`hf-flash plan` of a mixture of experts: sizes as loading has them, sums, order. Never times: those depend on the machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import hf_flash
from hf_flash import FlashOffloadConfig
from hf_flash.base.sizes import format_bytes
from hf_flash.base.tables import printed
from hf_flash.budget.expert_plan import ExpertPlan
from hf_flash.commands.main import main
from hf_flash.errors import BudgetError, ConfigError
from hf_flash.planning import measuring, mixture, pairing, planner
from hf_flash.planning import mixture_report as report
from hf_flash.planning.measuring import Speeds
from hf_flash.reading.layer_files import PAGE
from hf_flash.runtime.model import runtime_of

TYPES = ("qwen3_moe", "gpt_oss", "nemotron_h", "mixtral")  # gate and up apart; turned, biases; no gate; other names
SPEEDS = Speeds("a disk", 1 << 20, disk_gb_per_s=2.0, dram_gb_per_s=20.0, torch_threads=2)
QWEN3_30B: dict[str, Any] = {
    "hidden_size": 2048, "num_hidden_layers": 48, "num_experts": 128, "moe_intermediate_size": 768, "num_experts_per_tok": 8,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936, "dtype": "bfloat16",
}  # fmt: skip
SMALL: dict[str, Any] = {
    "hidden_size": 256, "num_hidden_layers": 4, "num_experts": 16, "moe_intermediate_size": 512, "num_experts_per_tok": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 512,
}  # fmt: skip


def qwen3(folder: Path, **settings: Any) -> Path:
    """A folder with the config.json of a Qwen3-MoE."""
    Qwen3MoeConfig(**settings).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but config.json: of a model that is larger than the buffers it runs with."""
    return qwen3(tmp_path_factory.mktemp("bare") / "small", **SMALL)


@pytest.fixture(scope="module")
def saved(coverage: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`saved("mixtral")`: the folder of a small random mixture."""
    made: dict[str, Path] = {}

    def get(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = tmp_path_factory.mktemp(model_type) / "model"
            coverage.stock_model(model_type, made[model_type])
        return made[model_type]

    return get


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this machine does is as in `SPEEDS`."""
    monkeypatch.setattr(mixture, "measure_speeds", lambda *args: SPEEDS)


def outlook(folder: Path, **arguments: Any) -> report.ExpertOutlook:
    found = planner.plan(folder, **arguments)
    assert isinstance(found, report.ExpertOutlook)
    return found


def held(folder: Path, *arguments: Any, **options: Any) -> ExpertPlan:
    found = planner.needs(folder, *arguments, **options)
    assert isinstance(found, ExpertPlan)
    return found


# --- sizes


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.usefixtures("unmeasured")
def test_memory_is_divided_as_loading_does(model_type: str, dtype: str | None, saved: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((saved(model_type) / "config.json").read_bytes())
    budget = held(tmp_path, dtype=dtype).minimum_bytes + 200_000
    config = FlashOffloadConfig(memory_budget=budget)
    model = AutoModelForCausalLM.from_pretrained(
        saved(model_type), quantization_config=config, dtype=getattr(torch, dtype or "float32")
    )
    found, real, stats = outlook(tmp_path, memory=budget, dtype=dtype), runtime_of(model).plan, hf_flash.stats(model)
    places = runtime_of(model).engine.reader.places
    assert replace(found.memory, slot_bytes=real.slot_bytes, scratch_bytes=real.scratch_bytes) == real
    pages = [2 * PAGE * len(layer.pieces) for layer in places.layers]
    for mine, theirs, most in zip(found.memory.slot_bytes, real.slot_bytes, pages, strict=True):
        assert theirs <= mine <= theirs + most
    assert 0 <= found.memory.minimum_bytes - stats.minimum_bytes <= 3 * max(pages)
    assert all(mine <= theirs for mine, theirs in zip(found.memory.capacities, real.capacities, strict=True))
    assert found.experts_bytes == places.nbytes
    assert found.memory.dense_bytes == stats.dense_bytes
    assert found.kv_cache_bytes_per_token == stats.kv_cache_bytes_per_token
    assert found.memory.used == stats.experts_per_token


def test_with_the_weights_there_it_is_the_same(saved: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((saved("qwen3_moe") / "config.json").read_bytes())
    assert held(tmp_path) == held(saved("qwen3_moe"))


@pytest.mark.usefixtures("unmeasured")
def test_a_model_that_is_known_by_others_figures(tmp_path: Path) -> None:
    found = outlook(qwen3(tmp_path, **QWEN3_30B), memory="8GiB")
    assert found.expert_bytes == 3 * 768 * 2048 * 2  # 9.4 MB
    assert found.experts_bytes == 48 * 128 * found.expert_bytes == pytest.approx(58.0e9, rel=1e-3)
    assert found.active_bytes == 48 * 8 * found.expert_bytes == pytest.approx(3.62e9, rel=2e-3)
    table = 151936 * 2048 * 2
    assert found.touched_bytes == found.memory.resident_bytes == found.memory.all_resident_bytes - table
    assert found.memory.all_resident_bytes == pytest.approx(2 * table + 48 * 2048 * (2 * 4096 + 2 * 512 + 128) * 2, rel=1e-3)
    assert found.kv_cache_bytes_per_token == 2 * 48 * 4 * 128 * 2
    assert found.point.capacity == found.memory.capacity == 13
    said = printed(found.describe())
    assert "48 layers with 128 experts each, of which a token uses 8; bfloat16, 56.87 GiB of weights" in said
    assert "Assumed: tokens use the same experts again" in said
    assert all(format_bytes(size) in said for _, size in found.memory.parts)


@pytest.mark.usefixtures("unmeasured")
def test_an_embedding_that_is_the_head_too_is_touched(bare: Path, tmp_path: Path) -> None:
    tied, apart = outlook(qwen3(tmp_path, **SMALL, tie_word_embeddings=True)), outlook(bare)
    table = 512 * 256 * 4
    assert apart.memory.resident_bytes - tied.memory.resident_bytes == table
    assert tied.touched_bytes == tied.memory.resident_bytes
    assert apart.touched_bytes == apart.memory.resident_bytes - table


def test_what_a_mixture_holds_where_it_gets_all_it_can_use(bare: Path) -> None:
    found = held(bare, "none")
    assert found.capacities == (16,) * 4
    assert found.minimum_bytes < found.dense_bytes < found.minimum_bytes + found.window_bytes
    least = held(bare, reader="mmap").minimum_bytes
    assert least < found.minimum_bytes, "the page cache needs no bounce buffers"
    assert held(bare, dtype="bfloat16").dense_bytes * 2 == found.dense_bytes


# --- hit rates and times


@pytest.mark.parametrize(("experts", "used"), [(8, 2), (64, 8), (512, 10), (4, 4), (1, 1)])
def test_hit_rates_grow_with_the_slots(experts: int, used: int) -> None:
    typical = [mixture.typical_hits(slots, experts, used) for slots in range(experts + 1)]
    uniform = [mixture.uniform_hits(slots, experts, used) for slots in range(experts + 1)]
    for rates in (typical, uniform):
        assert rates == sorted(rates)
        assert (rates[0], rates[-1]) == (0.0, 1.0)
    assert all(usual >= even for usual, even in zip(typical, uniform, strict=True))
    assert typical[:used] == uniform[:used]


def test_hit_rates_are_those_that_were_reported() -> None:
    assert mixture.typical_hits(8, 64, 8) == pytest.approx(0.28)
    assert mixture.typical_hits(24, 64, 8) == pytest.approx(0.68)


@pytest.mark.usefixtures("unmeasured")
def test_more_memory_is_never_slower(bare: Path) -> None:
    found = outlook(bare, memory="50%")
    sizes = [point.budget_bytes for point in found.points]
    assert sizes == sorted(set(sizes))
    assert (sizes[0], sizes[-1]) == (
        found.memory.minimum_bytes,
        held(bare).all_resident_bytes + held(bare).scratch_bytes + held(bare).window_bytes,
    )
    assert found.point in found.points
    assert found.point.budget_bytes == found.memory.dense_bytes // 2
    for routing in ("typical", "uniform"):
        each = [getattr(point, routing) for point in found.points]
        for less, more in pairwise(each):
            assert more.hit_rate >= less.hit_rate
            assert more.read_bytes <= less.read_bytes
            assert more.token_ms <= less.token_ms + 1e-9
        assert each[0].read_bytes == found.active_bytes
        assert (each[-1].hit_rate, each[-1].read_bytes) == (1.0, 0.0)
    assert all(point.typical.token_ms <= point.uniform.token_ms + 1e-9 for point in found.points)


@pytest.mark.usefixtures("unmeasured")
def test_a_token_is_what_it_touches_over_what_the_machine_does(bare: Path) -> None:
    found = outlook(bare, memory="50%")
    one, expert = found.point.uniform, 3 * 256 * 512 * 4
    missing = sum(2 * (1 - count / 16) for count in found.memory.capacities)
    assert one.hit_rate == pytest.approx(1 - missing / 8)
    assert one.read_bytes == pytest.approx(missing * expert)
    assert one.resident_ms == pytest.approx(found.touched_bytes / 20e6)
    assert one.read_ms == pytest.approx(missing * expert / 2e6)
    assert one.hits_ms == pytest.approx((8 - missing) * expert / 20e6)
    assert one.token_ms == pytest.approx(one.resident_ms + max(one.read_ms, one.hits_ms) + missing * expert / 20e6)


def test_disk_and_memory_are_measured_where_the_checkpoint_lies(bare: Path, tmp_path: Path) -> None:
    found = outlook(bare)
    assert (found.speeds.disk, found.speeds.read_size) == (str(bare), 512 * 256 * 4)
    assert found.speeds.disk_gb_per_s > 0
    assert found.speeds.dram_gb_per_s > 0
    assert [path.name for path in bare.iterdir()] == ["config.json"]
    assert outlook(bare, disk=tmp_path).speeds.disk == str(tmp_path)


def test_weights_that_are_there_are_read(saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "_LEAST_FILE", 1)
    monkeypatch.setattr(measuring, "scratch_file", None)
    assert measuring.measure_speeds(saved("qwen3_moe"), 4096).disk_gb_per_s > 0


@pytest.mark.usefixtures("unmeasured")
def test_a_budget_is_suggested_of_what_is_free(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plenty = outlook(bare)
    assert plenty.dense_fits
    assert "The whole model fits" in printed(plenty.describe())
    assert plenty.point is plenty.points[-1]
    free = plenty.memory.minimum_bytes + 12 * sum(plenty.memory.slot_bytes)
    for place in (mixture, report):
        monkeypatch.setattr(place, "ceiling_bytes", lambda budget: free)
    tight = outlook(bare, memory="40%")
    assert tight.suggested_bytes == max(point.budget_bytes for point in tight.points if point.budget_bytes <= free) == free
    assert "The whole model fits" not in printed(tight.describe())
    for place in (mixture, report):
        monkeypatch.setattr(place, "ceiling_bytes", lambda budget: 1000)
    said = printed(outlook(bare, memory="40%").describe())
    assert "does not fit here" in said
    assert "does not run here" in said


@pytest.mark.usefixtures("unmeasured")
def test_slots_that_do_not_hold_what_a_token_uses_are_told_of(bare: Path) -> None:
    said = printed(outlook(bare, memory=held(bare).minimum_bytes + 1).describe())
    assert "leaves room for 0 experts a layer, and a token uses 2" in said


# --- what is refused


@pytest.mark.parametrize("arguments", [
    {"predictor": "quantized"}, {"active": 0.1}, {"fresh": 0.1}, {"predicted": 2.0}, {"tokens": 8}, {"dtype": "int8"},
    {"memory": "half"}, {"disk": "/nowhere"},
], ids=str)  # fmt: skip
@pytest.mark.usefixtures("unmeasured")
def test_what_means_nothing_for_a_mixture(arguments: dict[str, Any], bare: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        planner.plan(bare, **arguments)
    (name,) = arguments
    assert f"where: {'memory_budget' if name == 'memory' else name}" in str(caught.value)


@pytest.mark.usefixtures("unmeasured")
def test_a_budget_below_the_minimum(bare: Path) -> None:
    with pytest.raises(BudgetError, match="routers") as caught:
        planner.plan(bare, memory="1MB")
    least = held(bare).minimum_bytes
    assert caught.value.minimum_bytes == least
    assert outlook(bare, memory=least).point.capacity == 0


def test_other_ways_to_quantize(bare: Path, tmp_path: Path) -> None:
    config = json.loads((bare / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    with pytest.raises(ConfigError, match="does not read"):
        planner.plan(tmp_path)
    stored = FlashOffloadConfig(memory_budget="1GB").to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": stored}))
    assert planner.needs(tmp_path) == planner.needs(bare)


def test_no_mixture_is_planned_with_an_assistant(bare: Path, plain: Path) -> None:
    for pair in ((bare, plain), (plain, bare)):
        with pytest.raises(ConfigError, match="cannot be planned together with an assistant"):
            pairing.plan_pair(*pair)


# --- the command


@pytest.mark.usefixtures("unmeasured")
def test_the_command(bare: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    assert main(["plan", str(bare), "--memory", "50%", "--json", str(out)]) == 0
    found, said = json.loads(out.read_text()), capsys.readouterr().out
    assert found["experts_per_token"] == 2
    assert found["memory"]["capacity"] == found["point"]["capacity"] == sum(found["memory"]["capacities"]) // 4
    for point in (found["point"], *found["points"]):
        assert point["token_ms"] == point["typical"]["token_ms"] <= point["uniform"]["token_ms"] + 1e-9
    assert "slots for" in said
    assert "a token uses 2; float32" in said
    assert main(["plan", str(bare), "--active", "0.1"]) == 1
    assert "leave it out" in capsys.readouterr().err
