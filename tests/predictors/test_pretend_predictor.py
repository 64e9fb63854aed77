"""A predictor is a row of a table: one that no library has is made, stored, loaded, planned, judged, and given a card."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_flash
from hf_flash import ConfigError, FlashOffloadConfig, StoreFormatError
from hf_flash.budget.demand import PREDICTED
from hf_flash.commands.main import main
from hf_flash.config_arguments import ARGUMENTS
from hf_flash.evaluation.candidates import candidates
from hf_flash.evaluation.judging import judging
from hf_flash.hub.card import model_card
from hf_flash.planning.planner import needs, plan
from hf_flash.predictors.choice import PREDICTORS
from hf_flash.runtime.model import find_runtime
from hf_flash.store.layout import FlashStore
from tests.predictors.pretend import MIRROR

IDS = torch.arange(4, 44).view(2, 20)


@pytest.fixture(scope="module", autouse=True)
def known() -> Iterator[pytest.MonkeyPatch]:
    """The three steps of CONTRIBUTING.md that are not the predictor itself."""
    check = ARGUMENTS["predictor"].check
    admits: Callable[[Any], str | None] = lambda value: None if value == "mirror" else check(value)  # noqa: E731
    with pytest.MonkeyPatch.context() as change:
        change.setitem(PREDICTORS, "mirror", MIRROR)  # type: ignore[misc]
        change.setitem(ARGUMENTS, "predictor", replace(ARGUMENTS["predictor"], check=admits))  # type: ignore[misc]
        change.setitem(PREDICTED, "mirror", 1.2)
        yield change


@pytest.fixture(scope="module")
def mirrored(plain: Path, known: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Repacked with it. Do not write to it."""
    return hf_flash.repack(plain, tmp_path_factory.mktemp("mirrored") / "flash", predictor="mirror")  # type: ignore[arg-type]


def check_answers(model: Any, plain: Path) -> None:
    """It gives the stock model's answers, and does not use every neuron."""
    stock = AutoModelForCausalLM.from_pretrained(plain)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, stock(IDS).logits, rtol=1e-3, atol=1e-3)
        before = hf_flash.stats(model).counters.selected
        model(IDS[:1, :1])
    found = hf_flash.stats(model)
    assert found.predictor == "mirror-16"
    assert 0 < found.counters.selected - before < 3 * 128


def test_it_is_made_from_a_plain_checkpoint(plain: Path) -> None:
    config = FlashOffloadConfig(predictor="mirror")  # type: ignore[arg-type]
    check_answers(AutoModelForCausalLM.from_pretrained(plain, quantization_config=config), plain)


def test_on_a_device_that_it_does_not_know_it_is_refused(mirrored: Path) -> None:
    with pytest.raises(ConfigError, match=r"does not compute on a device[\s\S]*units_on"):
        AutoModelForCausalLM.from_pretrained(mirrored, device_map="cpu:0")
    here = FlashOffloadConfig(units_on="cpu")
    assert hf_flash.stats(
        AutoModelForCausalLM.from_pretrained(mirrored, device_map="cpu:0", quantization_config=here)
    ).beside_bytes


def test_a_store_has_it_and_gives_it_back(mirrored: Path, plain: Path, tmp_path: Path) -> None:
    store = FlashStore.open_folder(mirrored)
    assert list(store.predictors) == ["mirror-16"]
    assert store.check() == []
    model = AutoModelForCausalLM.from_pretrained(mirrored)
    check_answers(model, plain)
    model.save_pretrained(tmp_path / "saved")
    check_answers(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), plain)
    hf_flash.restore(mirrored, tmp_path / "restored")
    assert main(["inspect", str(mirrored)]) == 0


def test_plan_card_and_evaluation_know_it(mirrored: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(mirrored)
    real = hf_flash.stats(model)
    assert needs(mirrored).predictor_bytes == real.predictor_bytes == 3 * 2 * 128 * 32
    assert plan(mirrored, disk=tmp_path).predictor == "mirror"
    assert "`mirror`, 16 bits, the default" in model_card(mirrored, "somebody/model")
    store = FlashStore.open_folder(mirrored)
    assert [candidate.name for candidate in candidates(store)] == ["none", "mirror-16"]
    dense = AutoModelForCausalLM.from_pretrained(mirrored, quantization_config=FlashOffloadConfig(predictor="none"))
    with torch.no_grad(), judging(find_runtime(dense).ffns, store, candidates(store), IDS.shape[1]) as judges:
        dense(IDS)
    rates = [judge.tallies["mirror-16"].rates() for judge in judges]
    assert all(found["missed"] == 0.0 and found["selected"] < 2 for found in rates)


def test_it_is_the_default_again_where_a_second_calibration_falls_short(mirrored: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(mirrored).save_pretrained(tmp_path / "flash")
    tokens = torch.randint(4, 96, (2000,), generator=torch.Generator().manual_seed(0))
    quick: dict[str, Any] = {"samples": 16, "context": 32, "rank": 8, "epochs": 1}
    assert hf_flash.calibrate(tmp_path / "flash", tokens, extra=1.0, **quick)["default"] == "lowrank"
    assert hf_flash.calibrate(tmp_path / "flash", tokens, extra=0.0, **quick)["default"] == "mirror"
    assert hf_flash.stats(AutoModelForCausalLM.from_pretrained(tmp_path / "flash")).predictor == "mirror-16"


def test_without_its_row_the_store_is_refused_by_name(
    mirrored: Path, known: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: AutoModelForCausalLM.from_pretrained(mirrored, quantization_config=FlashOffloadConfig(predictor="none")),
        lambda: hf_flash.restore(mirrored, tmp_path / "restored"),
        lambda: hf_flash.calibrate(mirrored, IDS),
        lambda: candidates(FlashStore.open_folder(mirrored)),
        lambda: model_card(mirrored, "somebody/model"),
    ]
    with known.context() as change:
        change.delitem(PREDICTORS, "mirror")  # type: ignore[misc]
        for call in calls:
            with pytest.raises(StoreFormatError, match=r"(?s)no such predictor.*int4-gN, int8, lowrank\n.*'mirror-16'"):
                call()
        assert main(["inspect", str(mirrored)]) == 1
    assert "no such predictor" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
