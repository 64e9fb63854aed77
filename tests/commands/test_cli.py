"""What all commands of `hf-flash` have in common: help, JSON, exit codes, interrupts."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import hf_flash
from hf_flash.commands import main as cli
from hf_flash.commands.main import main
from tests.conftest import ROOT, make_opt
from tests.preloaded_python import python

TABLES = {"demo", "doctor", "repack", "inspect", "calibrate", "eval", "verify", "plan", "bench"}


def commands() -> dict[str, argparse.ArgumentParser]:
    actions = cli._parser()._actions
    return dict(next(action for action in actions if isinstance(action, argparse._SubParsersAction)).choices)


def examples() -> Iterator[str]:
    for text in [cli._parser().epilog or "", *(sub.epilog or "" for sub in commands().values())]:
        yield from re.findall(r"^  hf-flash (.*?)(?: #.*|   .*)?$", text, re.MULTILINE)


# --- help ----------------------------------------------------------------------------------------------------------


def test_the_help_lists_every_command_in_a_group_and_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    printed = capsys.readouterr().out
    for name in commands():
        assert len(re.findall(rf"^  {name} +[A-Z].*[.?]$", printed, re.MULTILINE)) == 1
    assert "exit codes: 0 done; 1 an error" in printed
    assert max(map(len, printed.splitlines())) <= 128


@pytest.mark.parametrize("name", commands())
def test_every_command_says_what_it_does_and_shows_how(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: hf-flash {name} ")
    assert re.search(rf"examples?:\n  hf-flash {name}\b", printed)
    assert all(action.help for action in commands()[name]._actions)


@pytest.mark.parametrize("line", sorted(set(examples())))
def test_examples_in_the_help_are_right(line: str) -> None:
    assert cli._parser().parse_args(shlex.split(line)).run


# --- JSON ----------------------------------------------------------------------------------------------------------


def test_whatever_prints_tables_can_write_json_and_that_means_one_thing() -> None:
    found = {name: sub._option_string_actions.get("--json") for name, sub in commands().items()}
    assert {name for name, action in found.items() if action} >= TABLES
    assert len({(action.type, action.metavar, action.help) for action in found.values() if action}) == 1


@pytest.mark.parametrize("target", ["", "/nowhere/at.json"])
def test_a_file_that_cannot_be_written_is_wrong_usage_before_the_work(
    target: str, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["inspect", str(packed), "--json", target or str(tmp_path)])
    assert "is a folder, or in none that exists" in capsys.readouterr().err


def test_json_is_printed_instead_of_tables_or_written_beside_them(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["repack", str(plain), str(tmp_path / "packed"), "--json", "-"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert main(["inspect", str(tmp_path / "packed"), "--check", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == facts | {"checked": True, "problems": []}
    assert main(["inspect", str(tmp_path / "packed"), "--json", str(tmp_path / "out.json")]) == 0
    assert capsys.readouterr().out.startswith("source  ")
    assert json.loads((tmp_path / "out.json").read_text()) == facts | {"checked": False, "problems": []}
    assert main(["inspect", str(tmp_path / "packed"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == facts | {"checked": False, "problems": []}


def test_a_pipe_that_json_is_written_to_stays_one(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    assert main(["cache", "ls", "--json", str(tmp_path / "pipe")]) == 0
    assert "entries" in json.loads(os.read(reader, 1 << 16))
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()
    assert main(["cache", "ls", "--json", "/dev/null"]) == 0
    assert Path("/dev/null").is_char_device()


def test_demo_as_json(tiny_opt: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", str(tiny_opt), "--max-new-tokens", "4", "--memory-budget", "9MiB", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["same_tokens"]["none"] is True
    assert found["text"].startswith("In the beginning God created")
    assert found["stats"]["budget_bytes"] == 9 << 20
    assert "watched" not in found


# --- exit codes ----------------------------------------------------------------------------------------------------


def test_the_demo_without_a_model_shows_the_shipped_ones(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["demo", "--max-new-tokens", "4", "--json", str(tmp_path / "out.json")]) == 0
    said, report = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())
    assert [Path(found["model"]).name for found in report["models"]] == ["tiny-opt", "tiny-llama", "tiny-moe"]
    for found in report["models"]:
        assert found["same_tokens"]["none"] is True
        assert 0 < found["stats"]["hit_rate"] < 1  # so little memory that something is read
        assert found["text"] in said
    assert "they fit into any memory" in said


def test_the_demo_says_where_models_are_if_none_is_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hf_flash.commands.demo.__file__", str(tmp_path / "a" / "b" / "demo.py"))
    monkeypatch.chdir(tmp_path)
    assert main(["demo"]) == 1
    assert "examples/ of the repository" in capsys.readouterr().err


@pytest.mark.parametrize("columns", [60, 100])
@pytest.mark.parametrize("command", [
    ["doctor"], ["plan", "TINY", "--memory", "90%"], ["plan", "MOE"], ["inspect", "MOE"],
    ["demo", "TINY", "--max-new-tokens", "2"], ["demo", "TINY", "--watch", "--max-new-tokens", "2"],
    ["bench", "--preset", "tiny", "--tokens", "2", "--systems", "flash"],
], ids=lambda command: " ".join(command[:3]))  # fmt: skip
def test_nothing_is_wider_than_the_terminal(
    command: list[str], columns: int, tiny_opt: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    places = {"TINY": str(tiny_opt), "MOE": str(ROOT / "examples" / "tiny-moe")}
    assert main([places.get(word, word) for word in command]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines
    too_wide = [line for line in lines if len(line.rstrip()) > columns and " " in line.strip("- ").strip()]
    assert not too_wide


def test_a_shell_completes_commands_and_options(tmp_path: Path) -> None:
    for line, wanted in (("hf-flash insp", b"inspect"), ("hf-flash plan --dra", b"--draft-tokens")):
        environment = os.environ | {
            "_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "PYTHONPATH": str(ROOT),
            "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "out"),
        }  # fmt: skip
        subprocess.run([sys.executable, "-m", "hf_flash"], env=environment, check=True, timeout=60)
        assert wanted in (tmp_path / "out").read_bytes()


@pytest.mark.parametrize("arguments", [
    [], ["fly"], ["inspect"], ["demo", "x", "--max-new-tokens", "0"], ["demo", "x", "--pace", "-1"], ["bench"],
    ["bench", "x", "--preset", "tiny"], ["serve", "x", "--port", "65536"], ["serve", "x", "--port", "-1"],
    ["serve", "x", "--port", "http"], ["plan", "--json", "facebook/opt-125m"],
])  # fmt: skip
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "usage: hf-flash" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "message"), [
    (["inspect", "/nowhere"], "no"), (["demo", "/nowhere"], "no"), (["doctor", "/nowhere"], "not a folder"),
    (["demo", "TINY", "--max-new-tokens", "5000"], "at most 249 after this prompt"), (["demo", "PLAIN"], "no tokenizer"),
])  # fmt: skip
def test_an_error_is_said_on_stderr_without_a_traceback(
    arguments: list[str], message: str, tiny_opt: Path, plain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"TINY": str(tiny_opt), "PLAIN": str(plain)}
    assert main([places.get(item, item) for item in arguments]) == 1
    said = capsys.readouterr().err
    assert "hf-flash: " in said
    assert message in said


def test_a_damaged_store_is_a_failed_check(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = hf_flash.repack(plain, tmp_path / "packed")
    layer = folder / "flash-layer-00001.safetensors"
    data = bytearray(layer.read_bytes())
    data[-1] ^= 1
    layer.write_bytes(data)
    assert main(["inspect", str(folder), "--check", "--json", "-"]) == 1
    assert "flash-layer-00001" in str(json.loads(capsys.readouterr().out)["problems"])


# --- real processes ------------------------------------------------------------------------------------------------


def environment(home: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(home), "TERM": "xterm-256color",
                         "COLORTERM": "truecolor", "HF_FLASH_CACHE": str(home / "cache")}  # fmt: skip


def start(*arguments: str, home: Path, **streams: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*python(), "-m", "hf_flash", *arguments], env=environment(home), **streams)


def interrupt_when(process: subprocess.Popen[bytes], there: Callable[[], bool]) -> None:
    """Send SIGINT as soon as something is there; it must not end before."""
    deadline = time.monotonic() + 60
    while not there():
        assert process.poll() is None, "it ended before it was interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    process.send_signal(signal.SIGINT)


SLOW_DISK = """
import os, time

replace = os.replace
os.replace = lambda *names: (replace(*names), time.sleep(0.2))
from hf_flash.commands.main import main
raise SystemExit(main())
"""


def test_an_interrupted_repack_leaves_nothing_half_written_and_goes_on(tmp_path: Path) -> None:
    plain, target = make_opt(tmp_path / "plain", num_hidden_layers=24), tmp_path / "packed"
    command = [
        *python(),
        "-c",
        SLOW_DISK,
        "repack",
        str(plain),
        str(target),
    ]  # or a busy machine sees the file when all is done
    process = subprocess.Popen(command, env=environment(tmp_path), stderr=subprocess.PIPE)
    interrupt_when(process, lambda: any("flash-layer-00001.safetensors" in files for _, _, files in os.walk(tmp_path)))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in err
    assert b"hf-flash: interrupted" in err
    assert not target.exists()
    hf_flash.repack(plain, target)
    whole = hf_flash.repack(plain, tmp_path / "whole")
    assert {p.name: p.read_bytes() for p in target.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}


def test_an_interrupted_plan_leaves_no_scratch_file(tmp_path: Path) -> None:
    plain, disk = make_opt(tmp_path / "plain"), tmp_path / "disk"
    disk.mkdir()
    process = start("plan", str(plain), "--disk", str(disk), home=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    interrupt_when(process, lambda: any(disk.iterdir()))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == b""
    assert b"Traceback" not in err
    assert list(disk.iterdir()) == []


SWALLOWING = """
import os, signal

try:
    os.kill(os.getpid(), signal.SIGINT)
except BaseException:
    pass
over = True
"""


def test_a_library_cannot_swallow_an_interrupt_while_it_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "swallowing.py").write_text(SWALLOWING)
    monkeypatch.syspath_prepend(tmp_path)

    def run(_: argparse.Namespace) -> int:
        importlib.import_module("swallowing")
        time.sleep(60)
        return 0

    monkeypatch.setattr(cli.run_doctor, "run", run)
    before = signal.getsignal(signal.SIGINT)
    assert main(["doctor"]) == 130
    assert sys.modules.pop("swallowing").over
    assert "interrupted" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


TWICE = """
import os, signal, time

os.kill(os.getpid(), signal.SIGINT)
time.sleep(0.3)  # the first one waits
os.kill(os.getpid(), signal.SIGINT)
time.sleep(60)
"""
IMPORTING = """
import sys, threading
from hf_flash.commands import main as cli

def run(args):
    import slow
    threading.Event().wait(60)

cli.run_doctor.run = run
raise SystemExit(cli.program())
"""


@pytest.mark.parametrize("module", [TWICE, SWALLOWING])
def test_an_interrupt_in_an_import_ends_what_comes_next_and_a_second_one_all(module: str, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(module)
    command, env = [*python(), "-c", IMPORTING, "doctor"], environment(tmp_path)
    env["PYTHONPATH"] += f":{tmp_path}"
    done = subprocess.run(command, env=env, capture_output=True, timeout=30, text=True)
    assert done.returncode == 130
    assert done.stderr.startswith("hf-flash: interrupted; ")
    assert len(done.stderr.splitlines()) == 1


THREAD = """
import os, signal, threading, time
from hf_flash.commands import main as cli

def interrupt():
    while signal.getsignal(signal.SIGINT) is not cli.end_at_once:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)

cli.run_doctor.run = lambda args: threading.Thread(target=interrupt).start() or 0
raise SystemExit(cli.program())
"""


def test_a_process_that_cannot_end_can_be_interrupted(tmp_path: Path) -> None:
    done = subprocess.run([*python(), "-c", THREAD, "doctor"], env=environment(tmp_path), capture_output=True, timeout=30)
    assert done.returncode == 130


AT_EXIT = """
import atexit, os, signal
from hf_flash.commands.main import program

atexit.register(os.kill, os.getpid(), signal.SIGINT)
raise SystemExit(program())
"""


@pytest.mark.parametrize("arguments", [["--version"], ["cache", "ls"]])
def test_an_interrupt_after_the_work_is_done_changes_nothing(arguments: list[str], tmp_path: Path) -> None:
    command = [*python(), "-c", AT_EXIT, *arguments]
    done = subprocess.run(command, env=environment(tmp_path), capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")


def test_an_interrupted_live_view_gives_the_terminal_back(tiny_opt: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    home = tmp_path / "home"
    home.mkdir()
    process = start("demo", str(tiny_opt), "--watch", "--pace", "0.5", home=home, stdout=theirs, stderr=subprocess.PIPE)
    os.close(theirs)
    shown = b""

    def seen() -> bool:
        nonlocal shown
        if select.select([ours], [], [], 0)[0]:
            shown += os.read(ours, 1 << 16)
        return b"token 2 of 47" in shown

    interrupt_when(process, seen)
    while True:
        try:
            shown += os.read(ours, 1 << 16)
        except OSError:  # the other end is closed
            break
    os.close(ours)
    assert process.stderr is not None
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 130
    assert b"Traceback" not in err
    assert "▀".encode() in shown
    assert shown.rindex(b"\x1b[?25h") > shown.rindex(b"\x1b[?25l")  # the cursor is there again
    assert list(home.glob(".hf-flash-*")) == []


def test_a_reader_that_goes_away_is_no_error(packed: Path, tmp_path: Path) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    process = start("inspect", str(packed), home=tmp_path, stdout=theirs, stderr=subprocess.PIPE)
    os.close(theirs)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (141, b"")
