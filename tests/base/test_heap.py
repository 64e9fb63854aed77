"""The heap of glibc: what is freed after a long prompt goes back to the system."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from tests.conftest import ROOT

MIB = 1 << 20
HEAP = """
import sys, torch
from hf_flash.base.heap import Heap

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(row.split()[1]) * 1024 for row in file if row.startswith("RssAnon"))

torch.ones(7 << 20)  # freed: from now on glibc has blocks as large as this on its heap
heap = Heap()
for nbytes in map(int, sys.argv[1:]):
    heap.prepare(nbytes)
before = anonymous()
pairs = [(torch.ones(1 << 20), torch.ones(1 << 15)) for _ in range(32)]
assert anonymous() - before > 64 << 20
kept = [small for large, small in pairs]
del pairs
print(anonymous() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
@pytest.mark.parametrize(
    ("activations", "environment", "goes_back"),
    [
        ([], {}, False),
        ([2 * MIB], {}, True),
        ([2 * MIB, 1000], {}, False),
        # the user's word
        ([2 * MIB], {"MALLOC_MMAP_THRESHOLD_": str(32 * MIB), "MALLOC_TRIM_THRESHOLD_": str(256 * MIB)}, False),
    ],
)
def test_what_a_long_prompt_frees_goes_back_to_the_system(
    activations: list[int], environment: dict[str, str], goes_back: bool
) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", HEAP, *map(str, activations)]
    done = subprocess.run(command, env=clean | environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (int(done.stdout) < 12 * MIB) == goes_back, done.stdout
