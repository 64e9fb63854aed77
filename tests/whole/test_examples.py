"""The scripts in `examples/` run as they are, on what is shipped."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.hub_server import serve

EXAMPLES = ROOT / "examples"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a script with arguments in an empty folder; returns what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_from_pretrained(run: Callable[..., str]) -> None:
    printed = run("from_pretrained.py", "--memory-budget", "9MiB", "--max-new-tokens", "8")
    assert printed.startswith("In the beginning")
    assert "of a budget of 9.0 MiB" in printed


def test_pipeline_repacks_once(run: Callable[..., str], tmp_path: Path) -> None:
    first = run("pipeline.py")
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "tiny-opt-flash").iterdir()}
    assert first.startswith("In the beginning")
    assert "\n\nAnd the king said" in first
    again = run("pipeline.py", str(EXAMPLES / "tiny-opt"), "tiny-opt-flash", "--prompts", "Behold")
    assert again.startswith("Behold")
    assert made == {path: path.stat().st_mtime_ns for path in (tmp_path / "tiny-opt-flash").iterdir()}


def test_calibrate_on_your_text(run: Callable[..., str]) -> None:
    printed = run("calibrate_on_your_text.py", "--samples", "8")
    assert printed.count("neurons active, rank ") == 6
    assert "the folder's predictor is now: " in printed
    assert "lowrank: " in printed


def test_push(plain: Path, tmp_path: Path) -> None:
    with serve() as hub:
        printed = hub.run(tmp_path, str(EXAMPLES / "push.py"), str(plain), "me/opt-flash", "--private")
        assert f"{hub.url}/me/opt-flash" in printed
        assert "weights in DRAM" in printed
        assert hub.repos["me/opt-flash"].private
        assert "config.json" in hub.files("me/opt-flash")


def test_every_script_is_run_in_a_test_and_named_in_the_readme() -> None:
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    tested = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert {name for name in scripts if name not in tested} == set()
    assert {name for name in scripts if f"]({name})" not in readme} == set()
