"""`hf-flash doctor`: findings, verdicts and advice. Never how fast the machine is."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import hf_flash
from hf_flash.base.tables import printed
from hf_flash.commands import doctor
from hf_flash.commands.doctor import BAD, FAIR, GOOD, Diagnosis, Finding, diagnose
from hf_flash.commands.main import main
from hf_flash.errors import ConfigError


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_SCRATCH_BYTES", 2 << 20)


def look(folder: Path | None = None) -> Diagnosis:
    return diagnose(folder, disk_seconds=0.002)


def named(found: Diagnosis) -> dict[str, Finding]:
    return {finding.name: finding for finding in found.findings}


def test_this_machine_is_looked_at_and_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_FLASH_CACHE", str(tmp_path / "not" / "there"))
    found = look()
    assert found.place == str(tmp_path)
    assert found.works
    asked = {
        "versions",
        "compiled part",
        "threads",
        "DRAM",
        "memory",
        "disk",
        "direct I/O",
        "io_uring",
        "flash cache",
    }
    assert asked <= set(named(found))
    assert all((finding.verdict, bool(finding.advice)) in ((GOOD, False), (FAIR, True)) for finding in found.findings)
    assert {point.size for point in found.disk} >= {4 << 10, 64 << 10}
    assert list(tmp_path.iterdir()) == []


def test_a_model_is_looked_at_with_its_own_files(plain: Path, packed: Path, tiny_opt: Path) -> None:
    assert named(look(packed))["model"].found.endswith("repacked")
    assert "a plain checkpoint" in named(look(plain))["model"].found
    found = named(look(tiny_opt))
    assert found["model"].found.startswith("6 layers of 1024 neurons, 11.2 MiB")
    assert "hold 1024 of 1024 neurons a layer" in found["its memory"].found


def test_a_model_that_cannot_be_loaded_is_a_problem_and_an_exit_code(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = hf_flash.repack(plain, tmp_path / "packed")
    (folder / "flash-layer-00001.safetensors").unlink()
    assert main(["doctor", str(folder), "--json", "-"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["works"] is False
    (wrong,) = (finding for finding in report["findings"] if finding["verdict"] == BAD)
    assert wrong["name"] == "model"
    assert "flash-layer-00001" in wrong["advice"]
    assert main(["doctor", str(folder)]) == 1
    assert "hf_flash does not work here: 1 problem" in capsys.readouterr().out


def test_a_model_that_does_not_fit_is_a_problem(tiny_opt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "ceiling_bytes", lambda budget: 1 << 20)
    found = look(tiny_opt)
    assert not found.works
    assert named(found)["its memory"].found == "8.6 MiB at least, 1.0 MiB to use"
    monkeypatch.setattr(doctor, "ceiling_bytes", lambda budget: 9_050_000)
    found = look(tiny_opt)
    assert found.works
    assert "most of them are read again" in str(named(found)["its memory"].advice)


def no_library() -> None:
    raise OSError("this processor lacks AVX2, FMA or F16C")


def test_what_a_machine_lacks_could_be_better_and_is_no_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.native, "try_ring", lambda: errno.EPERM)
    monkeypatch.setattr(doctor.native, "load", no_library)
    monkeypatch.setattr(doctor, "available_memory", lambda: 1 << 20)
    monkeypatch.setattr(doctor.torch, "get_num_threads", lambda: 4096)
    monkeypatch.setattr("hf_flash.machine.disk._takes_direct", lambda path: False)
    monkeypatch.setattr(doctor.sys, "platform", "darwin")
    found = look(tmp_path)
    assert found.works
    lacking = ("versions", "compiled part", "threads", "memory", "direct I/O", "io_uring")
    assert [named(found)[name].verdict for name in lacking] == [FAIR] * len(lacking)
    assert "not permitted" in named(found)["io_uring"].found
    assert "AVX2" in named(found)["compiled part"].found
    assert f"OMP_NUM_THREADS={doctor.usable_cores()}" in str(named(found)["threads"].advice)
    assert "findings could be better" in printed(found.describe())


def test_a_library_that_is_too_old_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["torch>=2", "transformers>=99", "nothing-like-it>=1", 'lm-eval>=99; extra == "eval"']
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: wanted)
    found = named(look(tmp_path))["versions"]
    assert (found.verdict, found.advice) == (BAD, 'pip install -U "transformers>=99" "nothing-like-it>=1"')


def test_a_cache_that_cannot_be_written_to_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_FLASH_CACHE", str(tmp_path))
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    assert named(look())["flash cache"].verdict == BAD


def test_a_disk_that_cannot_be_measured_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    found = look(tmp_path)
    assert (named(found)["disk"].verdict, found.disk, found.works) == (BAD, (), False)
    assert "not enough room" in str(named(found)["disk"].advice)


@pytest.mark.parametrize(("kind", "advice"), [("tmpfs", "lies in memory"), ("nfs4", "local SSD"), ("ext4", "None")])
def test_file_systems_that_are_no_flash(kind: str, advice: str) -> None:
    points = tuple(doctor.DiskPoint(how, True, 16 << 10, 32, 1 << 30, 0.5) for how in ("random", "sequential"))
    assert advice in str(doctor._speed(points, "here", kind).advice)
    slow = tuple(doctor.DiskPoint(how, True, 16 << 10, 32, 1 << 20, 1.0) for how in ("random", "sequential"))
    assert "OPT-6.7B reads 59.1 s for a token" in str(doctor._speed(slow, "here", "ext4").advice)


@pytest.mark.parametrize(("text", "verdict"), [("always [madvise] never", GOOD), ("always madvise [never]", FAIR)])
def test_huge_pages(text: str, verdict: str, tmp_path: Path) -> None:
    (tmp_path / "enabled").write_text(text)
    (found,) = doctor._huge_pages(tmp_path / "enabled")
    assert found.verdict == verdict
    assert list(doctor._huge_pages(tmp_path / "none")) == []


@pytest.mark.parametrize("damage", [
    lambda folder: (folder / "model.safetensors").unlink(),
    lambda folder: (folder / "model.safetensors").write_bytes(b"no header"),
])  # fmt: skip
def test_a_plain_checkpoint_without_weights_is_a_problem(
    damage: Callable[[Path], object], tiny_opt: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_opt, tmp_path / "model"))
    assert look(folder).works
    damage(folder)
    assert named(look(folder))["model"].verdict == BAD


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a folder"):
        diagnose(tmp_path / "none")


def test_json_has_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(tmp_path), "--json", str(tmp_path / "out.json")]) == 0
    said, report = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())
    assert all(finding["found"] in said for finding in report["findings"])
    assert "random, 32 at a time" in said
    keys = {key for point in report["disk"] for key in point}
    assert keys == {"pattern", "direct", "size", "depth", "nbytes", "seconds", "gb_per_s"}
