"""`scripts/soak` at a tiny scale: every part runs, and finds nothing wrong. docs/reliability.md has a row for each part."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.docs import tables

PARTS = ("kill", "fuzz", "interrupt", "decode", "reload", "threads", "changing-source", "fork")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, forks")


@pytest.fixture(scope="module")
def soaked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one run of all parts found, by part. It leaves nothing in its working folder."""
    folder: Path = tmp_path_factory.mktemp("soak")
    (folder / "work").mkdir()
    command = [str(ROOT / "scripts" / "soak"), "--scale", "0.001", "--jobs", "1", "--json", str(folder / "figures.json")]
    done = subprocess.run(
        [sys.executable, *command, "--workdir", str(folder / "work"), "--markdown"], capture_output=True, text=True, check=False
    )
    print(done.stdout, done.stderr)
    assert list((folder / "work").iterdir()) == []
    parts = {part["part"]: part for part in json.loads((folder / "figures.json").read_text())["parts"]}
    assert done.returncode == int(any(part["faults"] for part in parts.values()))
    assert [line.split("`")[1] for line in done.stdout.splitlines() if line.startswith("| `")] == list(PARTS)
    return parts


@pytest.mark.parametrize("part", PARTS)
def test_a_part_finds_nothing_wrong(soaked: dict[str, Any], part: str) -> None:
    assert soaked[part]["faults"] == []
    assert sum(soaked[part]["outcomes"].values()) > 0


def test_the_page_has_figures_of_every_part() -> None:
    (rows,) = [rows for head, rows in tables(ROOT / "docs" / "reliability.md") if head[:2] == ["part", "figures"]]
    assert [row[0].strip("`") for row in rows] == list(PARTS)
