"""Odd surroundings: no home, no locale, closed streams, names that are long or no text. Right answers, or clear words.

A process costs seconds to start, so each runs several commands.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_flash import ConfigError, FlashOffloadConfig, HfFlashError
from hf_flash.commands import main as cli
from hf_flash.packing import flash_cache
from hf_flash.packing.flash_cache import cache_folder
from tests.conftest import ROOT, TINY_OPT, in_a_fork, torch_threads
from tests.preloaded_python import python

RUN = """
import json, os, sys
before, commands = sys.argv[1:]
exec(before)
from hf_flash.commands.main import main
for command in json.loads(commands):
    try:
        code = main([os.fsdecode(word.encode()) for word in command])
    except SystemExit as end:
        code = end.code
    if sys.stderr is not None:
        sys.stderr.write(f"code {code}\\n")
    if code:
        sys.exit(code)
"""
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def run(
    commands: Sequence[Sequence[str | Path]], given: Mapping[str, str] | None = None, *, before: str = "", shell: str = '"$@"'
) -> subprocess.CompletedProcess[str]:
    """Commands one after the other, in an environment that has nothing but what is needed and given."""
    least = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    names = json.dumps([[str(word) for word in command] for command in commands])
    interpreter = python() if shell == '"$@"' else [sys.executable]
    return subprocess.run(
        ["/bin/sh", "-c", shell, "sh", *interpreter, "-c", RUN, before, names], env=least | dict(given or {}),
        capture_output=True, text=True, check=False, timeout=300, errors="surrogateescape",
    )  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model in a folder whose name is not ASCII."""
    return Path(shutil.copytree(TINY_OPT, tmp_path / "é 模型"))


@pytest.mark.parametrize("given", [
    pytest.param({"LC_ALL": "C"}, marks=pytest.mark.slow, id="locale"),
    pytest.param({"PYTHONIOENCODING": "ascii:strict"}, marks=pytest.mark.slow, id="stdout"),
])  # fmt: skip
def test_every_command_takes_paths_that_are_not_ascii(model: Path, tmp_path: Path, given: dict[str, str]) -> None:
    flash, plain = tmp_path / "flash-ü", tmp_path / "plain-ü"
    done = run(
        [
            ("repack", model, flash), ("inspect", flash, "--check"), ("plan", flash, "--active", "0.1"),
            ("restore", flash, plain),
            ("demo", model, "--max-new-tokens", "2"), ("cache", "ls"), ("cache", "ls", "--json", "-"),
        ],
        given | {"HF_FLASH_CACHE": str(tmp_path / "cäche")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert (plain / "model.safetensors").exists()


def test_an_ascii_system_reads_a_store_with_another_name_and_says_what_it_cannot(model: Path, tmp_path: Path) -> None:
    """No UTF-8 at all: names come as bytes. A plain checkpoint's own name goes into the store, where it must be text."""
    flash = tmp_path / "flash-ü"
    assert cli.main(["repack", str(model), str(flash)]) == 0
    given = ASCII | {"HF_FLASH_CACHE": str(tmp_path / "cache")}
    done = run([("inspect", flash), ("plan", flash, "--active", "0.1"), ("restore", flash, tmp_path / "plain-ü")], given)
    assert done.returncode == 0, done.stderr
    failed = run([("repack", model, tmp_path / "other")], given)
    assert "Traceback" not in failed.stderr
    assert failed.returncode == 0 or "LANG=C.UTF-8" in failed.stderr
    assert failed.returncode == 0 or not (tmp_path / "other").exists()


def test_without_a_home_the_cache_needs_a_name(tmp_path: Path) -> None:
    """The user is unknown, too: nothing says where a home would be. What needs no cache works."""
    before = "os.setreuid(54321, 0)"
    if os.geteuid() != 0:
        pytest.skip("only root can be a user that nobody knows")
    failed = run([("cache", "ls")], before=before)
    assert failed.returncode == 1
    assert "no place for the flash cache" in failed.stderr
    assert "HF_FLASH_CACHE" in failed.stderr
    assert "Traceback" not in failed.stderr
    flash = tmp_path / "flash"
    done = run([("repack", TINY_OPT, flash), ("inspect", flash), ("plan", flash, "--active", "0.1")], before=before)
    assert done.returncode == 0, done.stderr


def test_a_cache_that_cannot_be_written_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """/proc is read-only for root, too."""
    monkeypatch.setenv("HF_FLASH_CACHE", "/proc/here")
    with pytest.raises(HfFlashError, match="/proc/here"):
        AutoModelForCausalLM.from_pretrained(TINY_OPT, quantization_config=FlashOffloadConfig())
    assert flash_cache.scan() == []


@pytest.mark.parametrize(
    ("shell", "code"),
    [
        pytest.param('"$@" >&-', 0, marks=pytest.mark.slow),
        ('"$@" <&- >&- 2>&-', 0),
        ('"$@" >/dev/full', 1),
    ],
)
def test_closed_and_full_streams(tmp_path: Path, shell: str, code: int) -> None:
    target = tmp_path / "flash"
    done = run([("repack", TINY_OPT, target), ("inspect", target)], {"HF_HOME": str(tmp_path)}, shell=shell)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert (target / "config.json").exists()


def test_a_current_folder_that_was_removed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    flash, gone = tmp_path / "flash", tmp_path / "gone"
    assert cli.main(["repack", str(TINY_OPT), str(flash)]) == 0

    def check() -> bool:
        gone.mkdir()
        os.chdir(gone)
        gone.rmdir()
        os.environ["HF_FLASH_CACHE"] = str(tmp_path / "cache")
        fine = [["cache", "ls"], ["inspect", str(flash)], ["restore", str(flash), str(tmp_path / "plain")]]
        wrong = [["repack", str(TINY_OPT), "relative"], ["restore", str(flash), "relative"], ["inspect", "relative"]]
        return [cli.main(words) for words in fine + wrong] == [0] * len(fine) + [1] * len(wrong)

    assert in_a_fork(check)
    assert "Traceback" not in capfd.readouterr().err


# --- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x" * 236, "x" * 255, "é" * 127, "模" * 85], ids=["236", "255", "two bytes", "three bytes"])
def test_a_model_whose_name_is_as_long_as_names_can_be_is_loaded_and_cached(name: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(TINY_OPT, tmp_path / name))
    flash = FlashOffloadConfig(memory_budget="16MB", cache_dir=str(tmp_path / "cache"))
    with torch_threads(1):
        for _ in range(2):
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=flash)
    (entry,) = flash_cache.scan(str(tmp_path / "cache"))
    assert (entry.state, entry.source) == ("ready", name)
    assert entry.name.startswith(name[0] * 50)
    entry.remove()
    assert flash_cache.scan(str(tmp_path / "cache")) == []


@pytest.mark.parametrize("name", ["y" * 255, "ü" * 127])
def test_a_target_may_have_a_long_name(name: str, tmp_path: Path) -> None:
    target = tmp_path / name
    assert cli.main(["repack", str(TINY_OPT), str(target)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_cache_folder_is_a_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cache_folder("here") == tmp_path / "here"
    with pytest.raises(ConfigError, match="no place for the flash cache"):
        cache_folder("~no-such-user-here/cache")
