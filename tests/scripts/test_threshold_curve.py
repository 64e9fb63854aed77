"""`scripts/threshold_curve.py` on the shipped gated model: nothing is lost where what is left out is zero, and more beyond."""

from __future__ import annotations

import re
import subprocess
import sys

from tests.conftest import ROOT

TEXTS = ROOT / "examples" / "text"


def test_a_threshold_that_only_zeros_fail_changes_nothing() -> None:
    command = [
        sys.executable,
        str(ROOT / "scripts" / "threshold_curve.py"),
        str(ROOT / "examples" / "tiny-llama"),
        "--windows",
        "1",
    ]
    command += ["--calibrate", str(TEXTS / "bible.valid.txt"), "--text", str(TEXTS / "sotu.valid.txt")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = [(int(s), float(r)) for s, r in re.findall(r"sparsity (\d+)%: .*\(([\d.]+)\)", done.stdout)]
    assert [sparsity for sparsity, _ in found] == [10, 20, 30, 40, 50, 60, 70, 80]
    assert all(ratio == 1.0 for sparsity, ratio in found if sparsity <= 70)
    assert found[-1][1] >= 1.0
