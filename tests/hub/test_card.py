"""The model card that a push writes: what it says, what of the source's card it keeps, and how it goes away again."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, snapshot_download
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import hf_flash
from hf_flash import FlashOffloadConfig
from hf_flash.base.sizes import format_bytes
from hf_flash.bench.run import bench
from hf_flash.packing.readme import body, merged, without_ours
from hf_flash.store.layout import FlashStore
from tests.conftest import ROOT
from tests.hub_server import UPLOAD_WARNING, Hub

pytestmark = pytest.mark.filterwarnings(UPLOAD_WARNING)
Make = Callable[..., Path]
SOURCE = """---
license: other
license_name: opt-175b
language: en
tags:
- opt
- hf_flash-like
inference: false
---

# OPT : Open Pre-trained

Of *somebody*. Not for <!-- anything -->.
"""


@pytest.fixture(scope="module")
def small(opt: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf_flash.repack(opt(), tmp_path_factory.mktemp("card") / "small-flash")


@pytest.fixture
def plain(opt: Make, tmp_path: Path, here: Hub) -> str:
    """The commit of `them/opt` on the Hub, a plain checkpoint with a card."""
    folder = Path(shutil.copytree(opt(), tmp_path / "plain"))
    (folder / "README.md").write_text(SOURCE)
    return here.publish("them/opt", folder)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """`from_pretrained`; the models are closed at the end of the test."""
    models = []

    def load(source: str | Path, **kwargs: Any) -> Any:
        models.append(AutoModelForCausalLM.from_pretrained(source, **kwargs))
        return models[-1]

    yield load
    for model in models:
        hf_flash.close(model)


def card(hub: Hub, name: str) -> ModelCard:
    return ModelCard(text(hub, name))


def text(hub: Hub, name: str) -> str:
    return hub.blobs[hub.files(name)["README.md"]].decode()


def test_the_card_says_where_it_comes_from_and_carries_the_licence(
    here: Hub, plain: str, tmp_path: Path, loaded: Callable[..., Any]
) -> None:
    """Of a folder that was repacked from the Hub, and of a model that was loaded from there, whose card is not at hand."""
    target = hf_flash.repack("them/opt", tmp_path / "opt-flash", cache_dir=str(tmp_path / "hub"))
    hf_flash.push(target, "me/opt-flash")
    config = FlashOffloadConfig(cache_dir=tmp_path / "cache")
    loaded("them/opt", cache_dir=tmp_path / "other", quantization_config=config).push_to_hub("me/other")
    assert (target / "README.md").read_text() == SOURCE
    for name in ("me/opt-flash", "me/other"):
        found = card(here, name)
        assert found.data.to_dict() == {
            "base_model": "them/opt",
            "library_name": "transformers",
            "pipeline_tag": "text-generation",
            "license": "other",
            "license_name": "opt-175b",
            "language": "en",
            "tags": ["opt", "hf_flash-like", "hf_flash", "flash-offload"],
            "inference": False,
        }
        assert f"revision `{plain}`" in found.text
        assert found.text.endswith(SOURCE.rpartition("---\n")[2])
        assert "It needs the package hf_flash" in found.text
        assert "Not measured for this card" in found.text


def test_the_lines_for_loading_work_elsewhere(here: Hub, tiny_opt: Path, tmp_path: Path) -> None:
    folder = hf_flash.repack(tiny_opt, tmp_path / "flash")
    hf_flash.push(folder, "me/tiny-opt-flash")
    assert f"`{FlashStore.open_folder(folder).layers[0].names[0]}`" in text(here, "me/tiny-opt-flash")
    match = re.search("```python\n(.*?)```", text(here, "me/tiny-opt-flash"), re.DOTALL)
    assert match
    assert len(match[1].splitlines()) == 3
    assert "NeuronStats" in here.run(tmp_path, "-c", match[1] + "print(repr(hf_flash.stats(model)))")


def test_the_memory_it_says_is_what_loading_asks_for(
    here: Hub, small: Path, tmp_path: Path, loaded: Callable[..., Any]
) -> None:
    model = loaded(small)
    model.push_to_hub("me/x")
    found = hf_flash.stats(model)
    assert f"| **the least `memory_budget`** | **{format_bytes(found.minimum_bytes)}** |" in text(here, "me/x")
    assert f"| predictor | {format_bytes(found.predictor_bytes)} |" in text(here, "me/x")
    assert f"stock transformers holds it | {format_bytes(found.dense_bytes)} |" in text(here, "me/x")


def test_a_calibrated_model_says_what_was_measured_and_on_what(here: Hub, tiny_opt: Path, tmp_path: Path) -> None:
    folder = hf_flash.repack(tiny_opt, tmp_path / "flash")
    hf_flash.push(folder, "me/x")
    assert "not measured | not measured" in text(here, "me/x")
    source = ROOT / "examples" / "text" / "sotu.valid.txt"
    report = hf_flash.calibrate(folder, source, samples=16, context=32, rank=8, epochs=1)
    hf_flash.push(folder, "me/x")
    active = [layer["active"] for layer in report["layers"]]
    for kind in ("lowrank", "int4-g64"):
        recall, named = (
            sum(a * layer[kind][key] for a, layer in zip(active, report["layers"], strict=True)) / sum(active)
            for key in ("recall", "selected")
        )
        assert f"| {recall:.2%} | {named:.2f} |" in text(here, "me/x")
    assert f"Calibrated on {16 * 32} tokens of `sotu.valid.txt`" in text(here, "me/x")
    assert str(tmp_path) not in text(here, "me/x")
    assert str(ROOT) not in text(here, "me/x")


def test_what_others_wrote_into_it_is_kept_by_the_next_push(here: Hub, small: Path, loaded: Callable[..., Any]) -> None:
    """A model has no card of its own, so that the repository's is taken; a folder's own wins."""
    model = loaded(small)
    model.push_to_hub("me/x")
    edited = text(here, "me/x").replace("library_name", "license: mit\nlibrary_name") + "Mind the gap.\n"
    repo = here.repos["me/x"]
    here.commit(repo, "main", here.files("me/x") | {"README.md": here.keep(edited.encode())})
    model.push_to_hub("me/x")
    assert card(here, "me/x").data.license == "mit"
    assert text(here, "me/x").endswith("Mind the gap.\n")
    assert text(here, "me/x").count("## Load it") == 1
    before = len(repo.commits)
    model.push_to_hub("me/x")
    assert len(repo.commits) == before


def test_the_plain_model_gets_its_own_card_back(here: Hub, plain: str, small: Path, tmp_path: Path) -> None:
    hf_flash.push(hf_flash.repack("them/opt", tmp_path / "flash", cache_dir=str(tmp_path / "hub")), "me/x")
    hf_flash.push(small, "me/bare")
    for name, wanted in (("me/x", SOURCE), ("me/bare", None)):
        there = snapshot_download(name, cache_dir=tmp_path / "hub")
        found = hf_flash.restore(there, tmp_path / name) / "README.md"
        assert (found.read_text() if found.exists() else None) == wanted


def test_a_card_that_cannot_be_read_is_an_error_before_the_hub_is_asked(here: Hub, small: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(small, tmp_path / "model"))
    for wrong in (b"---\nlicense: [\n---\n", b"---\n- a list\n---\n", b"\xff\xfe"):
        (folder / "README.md").write_bytes(wrong)
        with pytest.raises(hf_flash.ConfigError, match=r"card"):
            hf_flash.push(folder, "me/x")
    assert here.requests == []


def test_speed_is_told_from_a_report_on_this_model_only(here: Hub, small: Path, tiny_opt: Path, tmp_path: Path) -> None:
    report = bench(small, systems=["flash"], tokens=2, prompt_tokens=4, memory="2MB", cap=False, disk_seconds=0.01)
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(report))
    hf_flash.push(small, "me/x", bench=path)
    assert "tokens/s" in text(here, "me/x")
    assert report["machine"]["cpu"] in text(here, "me/x")
    other = hf_flash.repack(tiny_opt, tmp_path / "other")
    here.requests.clear()
    for wrong in (json.dumps({}), json.dumps(report)):
        path.write_text(wrong)
        with pytest.raises(hf_flash.ConfigError, match="bench"):
            hf_flash.push(other, "me/y", bench=path)
    assert here.requests == []


FRONT = st.sampled_from(["", "---\nlicense: mit\ntags: [a]\n---\n", "---\r\nx: 'y -->'\r\n---\r\n", "---\n\n---\n"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(front=FRONT, rest=st.text(), parts=st.lists(st.text(), min_size=1, max_size=2))
@example(front="", rest="\n\n--- # <!-- hf_flash: end -->", parts=["x"])
def test_our_part_comes_and_goes_without_a_trace(front: str, rest: str, parts: list[str]) -> None:
    before = front + rest
    if not front and rest.lstrip().startswith("---"):
        return
    written = before
    for part in parts:
        written = merged(written, {"tags": ["b"], "library_name": "transformers"}, part.replace("<!--", ""))
        assert ModelCard(written).data.tags == [*(["a"] if "license" in front else []), "b"]
    assert body(written) == rest
    assert without_ours(written) == before
