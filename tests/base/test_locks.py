"""base/locks.py: whether some process uses a file."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_flash.base.locks import has_locks, hold, hold_folder, is_held
from tests.conftest import ROOT

HOLD = """
import os, sys
from hf_flash.base.locks import hold
hold(os.open(sys.argv[1], os.O_RDONLY))
print(flush=True)
input()
"""
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no such locks")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "file").write_bytes(bytes(4096))
    if not has_locks(tmp_path / "file"):
        pytest.skip("this file system has no locks")
    return tmp_path / "file"


def test_a_file_is_held_until_the_last_holder_closes_it(file: Path) -> None:
    assert not is_held([file, file.parent, file / "missing"])
    fds = [os.open(file, os.O_RDONLY) for _ in range(3)]
    for fd in fds:
        hold(fd)
    for fd in fds:
        assert is_held([file.parent, file])
        os.close(fd)
    assert not is_held([file])


def test_a_mapping_holds_a_file_that_is_closed(file: Path) -> None:
    fd = os.open(file, os.O_RDONLY)
    hold(fd)
    memory = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
    os.close(fd)
    assert is_held([file])
    memory.close()
    assert not is_held([file])


def test_a_folder_is_held_inside_the_block(file: Path) -> None:
    with hold_folder(file.parent):
        assert is_held([file.parent])
        assert not is_held([file])
    assert not is_held([file.parent])


def test_another_process_counts_and_its_end_frees_the_file(file: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(file)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout
        other.stdout.readline()
        assert is_held([file])
        other.kill()
    assert not is_held([file])
