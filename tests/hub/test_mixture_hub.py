"""A mixture of experts on the Hub: its card, what others load, and what of its origin is known later."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, snapshot_download
from transformers import AutoModelForCausalLM

import hf_flash
from hf_flash import ConfigError, FlashOffloadConfig, StoreError
from hf_flash.base.sizes import format_bytes
from hf_flash.bench.run import bench
from hf_flash.packing.expert_folder import SOURCE
from hf_flash.planning import mixture as planning
from hf_flash.planning import planner
from hf_flash.planning.measuring import Speeds
from hf_flash.runtime.model import runtime_of
from tests.hub_server import UPLOAD_WARNING, Hub
from tests.packing.talking import make_mixture

pytestmark = pytest.mark.filterwarnings(UPLOAD_WARNING)
PROMPT = torch.tensor([[2, 44, 81, 63, 10]])
CARD = "---\nlicense: mit\ntags:\n- moe\n---\n\n# A mixture\n\nOf *somebody*.\n"


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mixture(tmp_path_factory.mktemp("hub") / "mixture", shards="300KB")


@pytest.fixture
def commit(mixture: Path, here: Hub, tmp_path: Path) -> str:
    """The commit of `them/moe` on the Hub, with a card."""
    folder = Path(shutil.copytree(mixture, tmp_path / "theirs"))
    (folder / "README.md").write_text(CARD)
    return here.publish("them/moe", folder)


def load(source: str | Path, **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(source, quantization_config=FlashOffloadConfig(), **kwargs)


def said(model: Any) -> list[int]:
    tokens: list[int] = model.generate(PROMPT, max_new_tokens=8, do_sample=False)[0].tolist()
    return tokens


def card(hub: Hub, name: str) -> str:
    return hub.blobs[hub.files(name)["README.md"]].decode()


def test_the_card_says_where_it_comes_from_what_it_needs_and_how_to_load_it(here: Hub, commit: str, tmp_path: Path) -> None:
    """Of a model that was loaded from the Hub, and of the folder that it was saved to."""
    model = load("them/moe", cache_dir=tmp_path / "hub")
    model.push_to_hub("me/moe-flash")
    model.save_pretrained(tmp_path / "saved")
    hf_flash.push(tmp_path / "saved", "me/saved")
    found = hf_flash.stats(model)
    for name in ("me/moe-flash", "me/saved"):
        text = card(here, name)
        assert ModelCard(text).data.to_dict() == {
            "base_model": "them/moe", "library_name": "transformers", "pipeline_tag": "text-generation", "license": "mit",
            "tags": ["moe", "hf_flash", "flash-offload"],
        }  # fmt: skip
        assert f"revision `{commit}`" in text
        assert text.endswith("Of *somebody*.\n")
        plan = runtime_of(model).plan
        always = plan.all_resident_bytes - plan.table_bytes
        assert f"| attention, routers, norms | {format_bytes(always)} |" in text
        assert f"the table of embeddings, {format_bytes(plan.table_bytes)}." in text
        assert plan.minimum_bytes == always + plan.scratch_bytes
        assert f"stock transformers holds it | {format_bytes(found.dense_bytes)} |" in text
        assert "An expert is 18.0 KiB; 3 layers have 8 of them, of which a token uses 2 in each: 108.0 KiB a token" in text
        assert "Answers are exact" in text
        assert "## Predictors" not in text
        assert "Not measured for this card" in text


def test_the_least_budget_it_says_is_enough(here: Hub, mixture: Path, tmp_path: Path) -> None:
    load(mixture).push_to_hub("me/x")
    (least,) = re.findall(r"\*\*the least `memory_budget`\*\* \| \*\*([\d.]+) MiB", card(here, "me/x"))
    config = FlashOffloadConfig(memory_budget=int((float(least) + 0.05) * 2**20))
    found = hf_flash.stats(AutoModelForCausalLM.from_pretrained(mixture, quantization_config=config))
    assert found.minimum_bytes <= found.budget_bytes < 1.2 * found.minimum_bytes


def test_others_load_it_with_and_without_hf_flash(here: Hub, mixture: Path, tmp_path: Path) -> None:
    model = load(mixture)
    model.push_to_hub("me/moe-flash")
    match = re.search("```python\n(.*?)```", card(here, "me/moe-flash"), re.DOTALL)
    assert match
    say = (
        "import torch\n"
        f"ids = model.generate(torch.tensor({PROMPT.tolist()}), max_new_tokens=8, do_sample=False)[0].tolist()\n"
        "print(type(model.get_submodule('model.layers.0.mlp.experts')).__mro__[1].__name__, ids)\n"
    )
    flash = here.run(tmp_path, "-c", match[1] + say).splitlines()[-1]
    stock = here.run(tmp_path, "-c", match[1].replace("import hf_flash\n", "") + say).splitlines()[-1]
    assert flash == f"FlashExperts {said(model)}"
    assert stock == f"Module {said(model)}"


def test_the_files_are_those_of_the_checkpoint_and_come_back(here: Hub, commit: str, mixture: Path, tmp_path: Path) -> None:
    load("them/moe", cache_dir=tmp_path / "hub").push_to_hub("me/moe-flash")
    weights = {path.name for path in mixture.glob("*.safetensors")}
    assert len(weights) > 2
    assert {here.files("me/moe-flash")[name] for name in weights} == {here.files("them/moe")[name] for name in weights}
    there = snapshot_download("me/moe-flash", cache_dir=tmp_path / "hub")
    restored = hf_flash.restore(there, tmp_path / "restored")
    found = {path.name: path.read_bytes() for path in restored.iterdir()}
    assert SOURCE not in found
    assert found["README.md"].decode() == CARD
    assert {name: found[name] for name in weights} == {name: (mixture / name).read_bytes() for name in weights}
    assert "quantization_config" not in json.loads(found["config.json"])
    assert said(AutoModelForCausalLM.from_pretrained(restored)) == said(load(mixture))


def test_pushed_again_as_it_is_nothing_changes(here: Hub, commit: str, tmp_path: Path) -> None:
    load("them/moe", cache_dir=tmp_path / "hub").push_to_hub("me/x")
    before = len(here.repos["me/x"].commits)
    there = snapshot_download("me/x", cache_dir=tmp_path / "hub")
    hf_flash.push(there, "me/x")
    assert len(here.repos["me/x"].commits) == before


def test_a_plain_folder_is_not_pushed(here: Hub, mixture: Path) -> None:
    with pytest.raises(StoreError, match="save_pretrained"):
        hf_flash.push(mixture, "me/x")
    assert here.requests == []


def test_speed_is_told_from_a_report_on_this_model_only(here: Hub, mixture: Path, tmp_path: Path) -> None:
    load(mixture).save_pretrained(tmp_path / "saved")
    report = bench(mixture, systems=["flash"], tokens=2, prompt_tokens=4, memory="4MB", cap=False, disk_seconds=0.01)
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(report))
    hf_flash.push(tmp_path / "saved", "me/x", bench=path)
    assert "tokens/s" in card(here, "me/x")
    report["model"]["experts"] = 9
    path.write_text(json.dumps(report))
    with pytest.raises(ConfigError, match="bench"):
        hf_flash.push(tmp_path / "saved", "me/x", bench=path)


def test_what_was_measured_of_its_routers_is_pushed_and_planned_with(
    here: Hub, mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds = Speeds("a disk", 1 << 20, disk_gb_per_s=2.0, dram_gb_per_s=20.0, torch_threads=2)
    monkeypatch.setattr(planning, "measure_speeds", lambda *args: speeds)
    folder = Path(shutil.copytree(mixture, tmp_path / "copy"))
    hf_flash.calibrate(folder, torch.arange(512) % 4096, samples=2)
    load(folder).push_to_hub("me/x")
    found = planner.plan("me/x", cache_dir=str(tmp_path / "hub"))
    assert isinstance(found, planner.ExpertOutlook)
    assert found.measured_on == "token ids"
    assert [path.suffix for path in (tmp_path / "hub").rglob("snapshots/*/*")] == [".json"] * 2


@pytest.mark.usefixtures("commit")
def test_a_mixture_is_calibrated_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = Speeds("a disk", 1 << 20, disk_gb_per_s=2.0, dram_gb_per_s=20.0, torch_threads=2)
    monkeypatch.setattr(planning, "measure_speeds", lambda *args: speeds)
    found = hf_flash.calibrate("them/moe", torch.arange(512) % 4096, samples=2)
    assert len(found["layers"]) == 3
    planned = planner.plan("them/moe")
    assert isinstance(planned, planner.ExpertOutlook)
    assert planned.measured_on == "token ids"
    with pytest.raises(StoreError, match="no such repository"):
        hf_flash.calibrate("them/nothing", torch.arange(512))
