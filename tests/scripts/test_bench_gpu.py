"""`scripts/bench_gpu.py` and `hf-flash bench --device`: the same systems on a device, and what crossed the bus."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hf_flash.base.tables import printed
from hf_flash.bench.page import page
from hf_flash.bench.report import describe
from tests.conftest import load_script


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("bench_gpu")


def test_it_measures_a_mixture_with_one_tier_and_with_two(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "MIXTURE_PEERS", ())
    models, found = tmp_path / "models", tmp_path / "found.json"
    options = ["--only", "mixture", "--mixture", "test", "--device", "cpu:0", "--memory", "80%", "--tight", "0.6"]
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py", str(models), *options, "--tokens", "3", "--json", str(found)])
    assert script.main() == 0
    (report,) = json.loads(found.read_text())
    rows: dict[str, Any] = {row["system"]: row for row in report["rows"]}
    assert list(rows) == ["flash", "flash, host"]
    assert not list(models.iterdir()), "the model is removed"
    for name in ("flash", "flash, host"):
        row, stats = rows[name], rows[name]["stats"]
        assert row["bus_bytes"] > 0
        assert row["bus_ms"] > 0
        assert stats["device"] == "cpu:0"
        assert stats["dram_bytes"] <= stats["budget_bytes"]
    assert rows["flash, host"]["stats"]["host_bytes"] > rows["flash"]["stats"]["host_bytes"]
    assert report["machine"]["device"]["to_gb_per_s"] > 0
    text = printed(describe(report))
    assert "bus MB" in text
    assert "GB/s there" in text
    assert "<th>over the bus, MB</th>" in page(report)
    said = capsys.readouterr().out
    assert "no peer to compare with" in said
    assert "of weights in a budget of" in said
