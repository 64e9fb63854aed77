"""`scripts/bench_decode.py`: which model it makes, and that a slowed disk is slow for all it starts, and no longer.

The cgroups are folders here: a real stand-in needs root and RAM.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.conftest import ROOT, load_script


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("bench_decode")


@pytest.fixture
def ran(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The command lines that it would run, the last one the benchmark's."""
    lines: list[list[str]] = []

    def run(command: list[str], **kwargs: Any) -> SimpleNamespace:
        lines.append(command)
        return SimpleNamespace(returncode=0, stdout="loop0 (7:0) is now slow: 530 bytes/s, 90 reads/s\n", stderr="")

    def bench(command: list[str]) -> int:
        lines.append(command)
        return 7

    monkeypatch.setattr(script.subprocess, "run", run)
    monkeypatch.setattr(script, "hf_flash_main", bench)
    return lines


def call(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["bench_decode.py", *map(str, arguments)])
    code: int = script.main()
    return code


@pytest.mark.parametrize(("dtype", "predictor", "name"), [
    ([], [], "opt-125m-paper"), (["--dtype", "bfloat16"], [], "opt-125m-paper"),
    (["--dtype", "float16"], ["--predictor", "lowrank"], "opt-125m-paper-float16"),
])  # fmt: skip
def test_every_dtype_and_predictor_has_a_folder_of_its_own(
    dtype: list[str],
    predictor: list[str],
    name: str,
    script: ModuleType,
    ran: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    assert call(script, monkeypatch, "--preset", "125m", "--workdir", tmp_path, *dtype, *predictor, "--tokens", 9) == 7
    making, measuring = ran
    packed = tmp_path / f"{name}-{(predictor or ['quantized'])[-1]}"
    assert measuring == ["bench", str(packed), "--plain", str(tmp_path / name), "--tokens", "9"]
    assert making[making.index("--dtype") + 1] == (dtype or ["bfloat16"])[-1]
    assert making[-1] == (predictor or ["quantized"])[-1]
    assert making[2] == str(tmp_path / name)
    packed.mkdir()
    (packed / "config.json").write_text("{}")
    call(script, monkeypatch, "--preset", "125m", "--workdir", tmp_path, *dtype, *predictor)
    assert len(ran) == 3  # made once


@pytest.mark.parametrize(("arguments", "message"), [
    (["--preset", "125m"], "needs --workdir"),
    (["--class", "sata"], "go together"),
    (["folder", "--standin", "DIR"], "go together"),
    (["--preset", "tiny", "--standin", "DIR", "--class", "sata"], "not on the stand-in"),
    (["--preset", "125m", "--workdir", "DIR/other", "--standin", "DIR", "--class", "sata"], "--workdir is not on the stand-in"),
    (["folder", "--standin", "DIR", "--class", "floppy"], "invalid choice"),
])  # fmt: skip
def test_wrong_usage(
    arguments: list[str], message: str, script: ModuleType, ran: list[list[str]], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with pytest.raises(SystemExit, match="2"):
        call(script, monkeypatch, *arguments)
    assert message in capsys.readouterr().err
    assert ran == []


# --- a slower disk -------------------------------------------------------------------------------------------------------


@pytest.fixture
def proc(tmp_path: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A /proc that tells of cgroups in `tmp_path`; `own` is the group that we are in."""
    (tmp_path / "self").mkdir()
    (tmp_path / "groups" / "own").mkdir(parents=True)
    monkeypatch.setattr(Path, "rmdir", shutil.rmtree)  # of a real cgroup its files go with it
    return tmp_path


def of_version(proc: Path, version: int) -> Path:
    kind, options = ("cgroup", "rw,blkio") if version == 1 else ("cgroup2", "rw")
    (proc / "mounts").write_text(f"proc /proc proc rw 0 0\n{kind} {proc}/groups {kind} {options} 0 0\n")
    (proc / "self" / "cgroup").write_text("3:cpuset:/\n7:blkio:/own\n" if version == 1 else "0::/own\n")
    return proc / "groups"


@pytest.mark.parametrize("version", [1, 2])
def test_the_disk_is_slow_for_a_while(version: int, script: ModuleType, ran: list[list[str]], proc: Path) -> None:
    root, own = of_version(proc, version), str(os.getpid())
    group = root / f"hf-flash-bench-{own}"
    place = group if version == 1 else group / "run"
    with script.disk_class(Path("standin"), "sata", proc) as limits:
        assert limits == "530 bytes/s, 90 reads/s"
        assert ran == [[str(ROOT / "scripts" / "standin_ssd"), "throttle", "standin", group.name, "sata"]]
        assert (place / "cgroup.procs").read_text() == own
        if version == 2:  # caps on memory find a place below the limit, beside us
            assert (root / "cgroup.subtree_control").read_text() == "+io +memory"
            assert (group / "cgroup.subtree_control").read_text() == "+memory"
    assert (root / "own" / "cgroup.procs").read_text() == own
    assert not group.exists()


def test_the_report_says_so(script: ModuleType, ran: list[list[str]], monkeypatch: pytest.MonkeyPatch, proc: Path) -> None:
    of_version(proc, 1)
    monkeypatch.setattr(script.disk_class.__wrapped__, "__defaults__", (proc,))
    assert call(script, monkeypatch, "folder", "--standin", "there", "--class", "sata", "--tokens", 9) == 7
    assert ran[-1][:4] == ["bench", "folder", "--tokens", "9"]
    assert ran[-1][4] == "--note"
    assert "class sata: 530 bytes/s, 90 reads/s" in ran[-1][5]


def test_without_a_stand_in_nothing_is_left_behind(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, proc: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = of_version(proc, 1)
    answer = subprocess.CompletedProcess([], 1, "", "standin_ssd: no stand-in at there\n")
    monkeypatch.setattr(script.subprocess, "run", lambda *args, **kwargs: answer)
    monkeypatch.setattr(script.disk_class.__wrapped__, "__defaults__", (proc,))
    assert call(script, monkeypatch, "folder", "--standin", "there", "--class", "sata") == 1
    assert capsys.readouterr().err == "bench_decode: standin_ssd: no stand-in at there\n"
    assert [item.name for item in root.iterdir()] == ["own"]


def test_no_cgroups_are_an_error(script: ModuleType, proc: Path) -> None:
    (proc / "mounts").write_text("proc /proc proc rw 0 0\n")
    (proc / "self" / "cgroup").write_text("")
    with pytest.raises(OSError, match="no cgroups are mounted"), script.disk_class(Path("x"), "sata", proc):
        pass
