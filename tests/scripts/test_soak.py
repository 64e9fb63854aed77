"""`scripts/soak` at a tiny scale: every part runs, and finds nothing wrong. docs/reliability.md has a row for each part."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.docs import tables
from tests.preloaded_python import python

QUICK = ("fuzz", "reload", "changing-source")
SLOW = ("kill", "interrupt", "decode", "threads", "fork")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, forks")


@pytest.mark.parametrize("parts", [QUICK, pytest.param(SLOW, marks=pytest.mark.slow)], ids=["quick", "slow"])
def test_every_part_finds_nothing_wrong_and_leaves_nothing(parts: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    command = [*python(), str(ROOT / "scripts" / "soak"), *parts, "--scale", "0.001", "--jobs", "1"]
    command += ["--workdir", str(tmp_path / "work"), "--json", str(tmp_path / "figures.json"), "--markdown"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr)
    assert list((tmp_path / "work").iterdir()) == []
    found = {part["part"]: part for part in json.loads((tmp_path / "figures.json").read_text())["parts"]}
    assert done.returncode == int(any(part["faults"] for part in found.values()))
    assert [line.split("`")[1] for line in done.stdout.splitlines() if line.startswith("| `")] == list(parts)
    for part in parts:
        assert found[part]["faults"] == []
        assert sum(found[part]["outcomes"].values()) > 0


def test_the_page_has_figures_of_every_part() -> None:
    (rows,) = [rows for head, rows in tables(ROOT / "docs" / "reliability.md") if head[:2] == ["part", "figures"]]
    assert sorted(row[0].strip("`") for row in rows) == sorted([*QUICK, *SLOW])
