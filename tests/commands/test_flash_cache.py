"""The flash cache from outside: `hf-flash cache`, entries in use, processes that wait for one another, interrupted uploads."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import hf_flash
from hf_flash import FlashOffloadConfig
from hf_flash.commands.main import main
from tests.conftest import make_opt
from tests.hub_server import UPLOAD_WARNING, Hub
from tests.preloaded_python import python

pytestmark = [
    pytest.mark.filterwarnings(UPLOAD_WARNING),
    pytest.mark.skipif(sys.platform == "win32", reason="signals and locks of Unix"),
]
Make = Callable[..., Path]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_FLASH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fill(source: str | Path, **kwargs: Any) -> None:
    """Make an entry, as loading does."""
    hf_flash.close(load(source, **kwargs))


def load(source: str | Path, reader: Any = None, **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(source, quantization_config=FlashOffloadConfig(reader=reader), **kwargs)


def listed(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    capsys.readouterr()  # of the commands before
    assert main(["cache", "ls", "--json", "-"]) == 0
    entries: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["entries"]
    return entries


def test_entries_are_listed_with_source_size_and_last_use(
    here: Hub, opt: Make, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert listed(capsys) == []
    first, second = here.publish("me/opt", opt()), here.publish("me/opt", opt(seed=1))
    for revision in (first, second):
        fill("me/opt", revision=revision, cache_dir=tmp_path / "hub")
    fill(opt("odd"))
    entries = listed(capsys)
    assert {(e["source"], e["revision"]) for e in entries[:2]} == {("me/opt", first), ("me/opt", second)}
    for entry in entries:
        files = list(Path(entry["path"]).iterdir())
        assert entry["size_bytes"] == sum(path.stat().st_size for path in files)
        assert (entry["state"], entry["in_use"], entry["predictors"]) == ("ready", False, ["int4-g64"])
    lock = next(cache.glob(f".*{first[:12]}*.lock"))
    os.utime(lock, (0, 0))
    assert min(entry["last_used"] for entry in listed(capsys)) == "1970-01-01T00:00:00+00:00"
    assert min(entry["last_used"] for entry in listed(capsys)) < "1971"  # looking is not using
    fill("me/opt", revision=first, cache_dir=tmp_path / "hub")
    assert min(entry["last_used"] for entry in listed(capsys)) > "2000"
    assert main(["cache", "ls"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert first[:12] in "".join(table)
    assert table[-1].startswith("3 entries, ")


def test_entries_go_by_name_pattern_or_commit_and_only_when_confirmed(
    here: Hub, opt: Make, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    commits = [here.publish("me/opt", opt()), here.publish("me/opt", opt(seed=1)), here.publish("you/opt", opt(seed=2))]
    for name, revision in zip(("me/opt", "me/opt", "you/opt"), commits, strict=True):
        fill(name, revision=revision, cache_dir=tmp_path / "hub")
    before = listed(capsys)

    def typed(text: str) -> None:
        terminal = io.StringIO(text)
        monkeypatch.setattr(terminal, "isatty", lambda: True)
        monkeypatch.setattr(sys, "stdin", terminal)

    for wrong in (["rm"], ["rm", "--all", "me/opt"], []):
        with pytest.raises(SystemExit, match="2"):
            main(["cache", *wrong])
    assert main(["cache", "rm", "nobody/opt", "--yes"]) == 1
    assert main(["cache", "rm", "--all", "--dry-run"]) == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert main(["cache", "rm", "--all"]) == 1  # nobody to ask
    typed("n\n")
    assert main(["cache", "rm", "--all"]) == 1
    capsys.readouterr()
    assert listed(capsys) == before
    typed("y\n")
    assert main(["cache", "rm", commits[0][:10]]) == 0
    assert sorted(entry["revision"] for entry in listed(capsys)) == sorted(commits[1:])
    assert main(["cache", "rm", "me/*", "-y"]) == 0
    assert [entry["source"] for entry in listed(capsys)] == ["you/opt"]
    assert main(["cache", "rm", listed(capsys)[0]["name"], "-y"]) == 0
    assert listed(capsys) == []
    assert not any(path.is_dir() for path in cache.iterdir())
    fill("you/opt", cache_dir=tmp_path / "hub")  # it is simply made again
    assert main(["cache", "rm", "--all", "-y"]) == 0


@pytest.mark.parametrize("reader", ["mmap", "direct"])
def test_an_entry_that_a_model_reads_stays(opt: Make, cache: Path, capsys: pytest.CaptureFixture[str], reader: str) -> None:
    model = load(opt(), reader)
    assert [entry["in_use"] for entry in listed(capsys)] == [True]
    assert main(["cache", "rm", "--all", "--yes"]) == 1
    assert "in use" in capsys.readouterr().out
    hf_flash.close(model)
    assert [entry["in_use"] for entry in listed(capsys)] == [False]
    assert main(["cache", "rm", "--all", "--yes"]) == 0
    assert listed(capsys) == []


def test_damaged_entries_and_what_interrupted_runs_left_can_be_removed(
    opt: Make, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(opt())
    (entry,) = (path for path in cache.iterdir() if path.is_dir())
    for name in (f".{entry.name}x.partial", f".{entry.name}.removed", ".push-abc"):
        shutil.copytree(entry, cache / name)
    (entry / "flash-layer-00000.safetensors").write_bytes(b"no")
    (cache / "mine.txt").write_text("kept")
    (cache / ".hidden").mkdir()
    assert sorted(e["state"] for e in listed(capsys)) == ["damaged", *["unfinished"] * 3]
    assert main(["cache", "rm", "--all", "--yes"]) == 0
    assert listed(capsys) == []
    assert {path.name for path in cache.iterdir() if path.suffix != ".lock"} == {"mine.txt", ".hidden"}


def test_two_processes_that_need_the_same_entry_wait_for_each_other(
    opt: Make, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first one stops in the middle of its work; the second says that it waits; in the end there is one entry."""
    script = """
import os, signal, sys
from hf_flash import FlashOffloadConfig
from hf_flash.packing import bundling
from transformers import AutoModelForCausalLM
write, pause = bundling.write_layer, sys.argv[2] == "pause"
def counting(path, index, *rest):
    if pause and index == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    print("wrote", index, flush=True)
    write(path, index, *rest)
bundling.write_layer = counting
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=FlashOffloadConfig())
print("loaded", flush=True)
"""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(hf_flash.__file__).parent.parent)}

    # A process that stops and goes on: a real one, whose pid is the one that is known.
    def start(how: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", script, str(opt()), how], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    with start("pause") as first:
        try:
            assert os.WIFSTOPPED(os.waitpid(first.pid, os.WUNTRACED)[1])
            assert [(e["state"], e["in_use"]) for e in listed(capsys)] == [("unfinished", True)]
            assert main(["cache", "rm", "--all", "--yes"]) == 1
            with start("go") as second:
                assert second.stderr
                said = ""
                while "waiting for it" not in said:
                    line = second.stderr.readline()
                    assert line, said
                    said += line
                first.send_signal(signal.SIGCONT)
                assert first.communicate(timeout=60)[0].split() == ["wrote", "0", "wrote", "1", "wrote", "2", "loaded"]
                assert second.communicate(timeout=60)[0].split() == ["loaded"]
        finally:
            first.send_signal(signal.SIGCONT)
    assert [first.returncode, second.returncode] == [0, 0]
    assert [(e["state"], e["in_use"]) for e in listed(capsys)] == [("ready", False)]


def test_an_upload_that_was_interrupted_sends_only_what_is_missing(
    here: Hub, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once by Ctrl-C, once by the kernel; what had arrived is not sent again, and nothing was to be seen before the end."""
    folder = hf_flash.repack(make_opt(tmp_path / "plain", num_hidden_layers=14), tmp_path / "flash")

    def push(until: int, how: signal.Signals) -> int:
        command = [*python(), "-m", "hf_flash", "push", str(folder), "me/x"]
        process = subprocess.Popen(
            command,
            env=here.env(tmp_path) | {"HF_FLASH_CACHE": str(cache)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

        def interrupt() -> None:
            if len(here.uploaded) == until:
                process.send_signal(how)
                time.sleep(0.5)  # the Hub answers nobody until that has arrived

        here.after_upload = interrupt
        try:
            process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)  # says where it hangs
            pytest.fail(process.communicate()[1].decode())
        return process.returncode

    assert push(2, signal.SIGINT) == 130
    arrived = len(here.uploaded)
    assert list(cache.iterdir()) == []
    assert push(arrived + 2, signal.SIGKILL) == -signal.SIGKILL
    assert set(here.files("me/x")) == {".gitattributes"}
    assert 2 <= arrived < len(here.uploaded) < 16
    assert [(entry["name"][:6], entry["in_use"]) for entry in listed(capsys)] == [(".push-", False)]

    here.after_upload = lambda: None
    hf_flash.push(folder, "me/x")
    assert len(here.uploaded) == len(set(here.uploaded)) == 16  # 14 layers, a predictor, the rest
    assert set(here.files("me/x")) == {".gitattributes", "README.md", *(path.name for path in folder.iterdir())}
