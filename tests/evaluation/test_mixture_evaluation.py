"""The evaluation of a mixture of experts: stock's perplexity, the time of a token, and tasks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_flash import ConfigError
from hf_flash.base.tables import printed
from hf_flash.calibration.text import token_windows
from hf_flash.commands.main import main
from hf_flash.evaluation.compare import describe, evaluate
from hf_flash.planner import needs
from tests.conftest import ROOT
from tests.packing.talking import make_mixture

TEXT = ROOT / "examples" / "text" / "bible.valid.txt"
TASKS = ROOT / "examples" / "tasks"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mixture(tmp_path_factory.mktemp("evaluation") / "mixture")


def test_its_perplexity_is_that_of_the_stock_model(folder: Path) -> None:
    least = needs(folder, dtype="float32").minimum_bytes
    report = evaluate(folder, TEXT, tokens=512, new_tokens=2, memory_budget=least, dtype=torch.float32)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        loss = (
            sum(stock(ids[None], labels=ids[None]).loss.double() for ids in token_windows(folder, TEXT, 256, 4096, most=2)) / 2
        )
    assert report["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-4)
    assert report["text"] == {"tokens": 512, "context": 256}
    assert report["read_bytes_per_token"] > 0
    assert "predictors" not in report
    assert "no predictor to judge" in printed(describe(report))


@pytest.mark.parametrize("context", [1, 10**6])
def test_windows_that_the_model_does_not_have_are_refused(folder: Path, context: int) -> None:
    with pytest.raises(ConfigError, match="no such window"):
        evaluate(folder, TEXT, context=context)


@pytest.mark.filterwarnings("ignore")  # of lm-eval and what it brings
def test_the_command_runs_tasks_too_and_draws_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)  # where the task's questions are
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    arguments = ["eval", str(folder), "--text", str(TEXT), "--tokens", "256"]
    tasks = ["--tasks", "next_words", "--include-path", str(TASKS), "--limit", "2", "--stock", str(folder)]
    assert main([*arguments, *tasks, "--json", str(tmp_path / "figures.json")]) == 0
    report = json.loads((tmp_path / "figures.json").read_text())
    assert set(report["tasks"]) == {"stock", "none"}
    assert report["tasks"]["stock"] == report["tasks"]["none"]
    assert "perplexity" in capsys.readouterr().out
    assert main([*arguments, "--plots", str(tmp_path / "plots")]) == 1
    assert "no predictors to draw" in capsys.readouterr().err
    assert not (tmp_path / "plots").exists()
