"""`hf-flash bench`: rows, counters and reasons. Never times: those are what it is for, and what no test can know."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_flash.base.tables import printed
from hf_flash.bench import child as bench_job
from hf_flash.bench import clock
from hf_flash.bench import report as bench_report
from hf_flash.bench import run as bench
from hf_flash.bench import worker as bench_worker
from hf_flash.bench.calls import time_calls
from hf_flash.bench.checks import add_checks, window_law
from hf_flash.bench.names import row_names
from hf_flash.bench.report import describe
from hf_flash.bench.systems import (
    ABLATION,
    SYSTEMS,
    System,
    parse_arguments,
    parse_calls,
    parse_sweep,
    parse_system,
    resolve_systems,
)
from hf_flash.commands.main import main
from hf_flash.compute.dram_speed import dram_gb_per_s
from hf_flash.errors import ConfigError, HfFlashError, StoreReadError
from hf_flash.machine import memory_cap as cap
from hf_flash.machine.disk import DiskPoint, disk_curve, mean_curve, rate_at
from hf_flash.machine.memory_cap import memory_cap
from hf_flash.store.layout import FlashStore

pytest.importorskip("matplotlib", reason="the plot needs it")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any], Path]:
    """One run of the command for all tests: a child takes seconds to import transformers."""
    folder = tmp_path_factory.mktemp("bench")
    code = main([
        "bench", "--preset", "tiny", "--tokens", "8", "--systems", "stock-ram,flash", "--check",
        "--calls", "2x1,1x3,1x6", "--system", "too little: memory_budget=1000", "--note", "slow & <today>",
        "--json", str(folder / "out.json"), "--plot", str(folder / "out.svg"),
        "--html", str(folder / "out.html"),
    ])  # fmt: skip
    report: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return code, report, folder


def row(report: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(row for row in report["rows"] if row["system"] == name)
    return found


def test_every_system_is_a_row_with_sane_counters(made: tuple[int, dict[str, Any], Path]) -> None:
    code, report, _ = made
    assert code == 0
    assert report["same_tokens"] is True
    assert [row["system"] for row in report["rows"]] == ["stock-ram", "flash", "too little", "flash-uncapped"]
    for name in ("stock-ram", "flash", "flash-uncapped"):
        found = row(report, name)
        assert len(found["tokens"]) == 8
        assert len(found["token_ms"]) == 7  # what is timed begins after the first token
        assert found["runs_tokens_per_s"] == [found["tokens_per_s"]]
        assert found["runs_first_token_s"] == [found["first_token_s"]]
    flash = row(report, "flash")
    assert flash["stats"]["counters"]["tokens"] == 7 * report["model"]["layers"]
    assert 0 < flash["hit_rate"] < 1
    assert flash["read_bytes"] > 0
    assert flash["run_bytes"] * flash["reads"] == pytest.approx(flash["read_bytes"])
    assert flash["stats"]["budget_bytes"] == report["settings"]["memory_bytes"]
    assert sum(flash["parts_ms"].values()) == pytest.approx(flash["mean_ms"])
    assert row(report, "flash-uncapped")["cap"] == "no cap"


def test_calls_of_several_tokens_are_timed(made: tuple[int, dict[str, Any], Path]) -> None:
    _, report, folder = made
    names = ["2x1", "1x3", "1x6"]
    for name in ("stock-ram", "flash", "flash-uncapped"):
        assert sorted(row(report, name)["calls_ms"]) == sorted(names)
        assert all(ms > 0 for ms in row(report, name)["calls_ms"].values())
    assert report["settings"]["calls"] == [[2, 1], [1, 3], [1, 6]]
    text = printed(describe(report))
    assert re.search(r"\nsystem +2x1 +1x3 +1x6\n.*\n.* \(stock-ram\) +[\d.]+ +[\d.]+ +[\d.]+\nhf_flash \(flash\) ", text)
    assert f"{row(report, 'flash')['calls_ms']['1x3']:.1f}" in text
    assert "<th>1x6</th>" in (folder / "out.html").read_text()


def test_every_row_of_hf_flash_names_its_predictor(made: tuple[int, dict[str, Any], Path]) -> None:
    _, report, folder = made
    found = row(report, "flash")
    assert found["stats"]["predictor"] == "int4-g64"
    text = printed(describe(report))
    assert text.count(f"  int4-g64, {found['cap']}\n") == 1
    assert "<dd>hf_flash as it comes; predictor: int4-g64; " in (folder / "out.html").read_text()
    assert f"  {row(report, 'stock-ram')['cap']}\n" in text


@pytest.mark.usefixtures("in_process")
def test_a_prompt_that_is_computed_whole_is_measured(packed: Path, tmp_path: Path) -> None:
    """Its tokens count for the window law with what they really used."""
    out = tmp_path / "out.json"
    arguments = ["--tokens", "4", "--prompt-tokens", "40", "--systems", "flash", "--memory", "5MB", "--json", str(out)]
    assert main(["bench", str(packed), *arguments]) == 0
    found = row(json.loads(out.read_text()), "flash")
    assert found.get("failed") is None
    assert found["expected_bytes"] > 0
    assert 0 < found["window_tokens"] <= 44


def test_calls_go_on_with_their_rows_or_are_prompts() -> None:
    seen: list[tuple[tuple[int, ...], Any, Any]] = []

    class Model:
        config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=50))

        def forward(self, ids: Any, past_key_values: Any = None, use_cache: bool = False, logits_to_keep: int = 0) -> Any:
            seen.append((tuple(ids.shape), past_key_values, logits_to_keep))
            return SimpleNamespace(past_key_values=len(seen))

        __call__ = forward

    assert list(time_calls(Model(), [(2, 1), (1, 9)], 8)) == ["2x1", "1x9"]
    assert seen == [((2, 8), None, 1), *(((2, 1), past, 0) for past in range(1, 8)), *[((1, 9), None, 1)] * 7]


def test_calls_of_given_tokens_go_through_the_text_and_rows_begin_apart() -> None:
    seen: list[list[list[int]]] = []

    class Model:
        config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=50))

        def forward(self, ids: torch.Tensor, past_key_values: Any = None, use_cache: bool = False) -> Any:
            seen.append(ids.tolist())
            return SimpleNamespace(past_key_values=0)

        __call__ = forward

    time_calls(Model(), [(2, 3)], 4, list(range(10, 30)))
    text = [*range(10, 30), *range(10, 30)]
    assert seen[0] == [text[:4], text[10:14]]
    assert seen[1:] == [[text[at : at + 3], text[10 + at : 13 + at]] for at in range(4, 25, 3)]


def test_rows_of_hf_flash_are_held_against_law_disk_and_floor(made: tuple[int, dict[str, Any], Path]) -> None:
    _, report, _ = made
    for name in ("flash", "flash-uncapped"):
        found = row(report, name)
        assert found["expected_ratio"] == pytest.approx(found["read_bytes"] / found["expected_bytes"])
        floor = found["floor_ms"]
        assert 0 < floor["dram"] <= floor["overlapped"] <= floor["in_turn"] == floor["dram"] + floor["disk"]
        assert found["stats"]["resident_bytes"] * 0.8 < found["touched_bytes"] < found["stats"]["dense_bytes"] * 1.2
        assert re.search(rf"\n- {name}: .* would read {found['expected_bytes'] / 1e6:.2f} MB", printed(describe(report)))
    assert (
        row(report, "flash")["window_tokens"] < row(report, "flash-uncapped")["window_tokens"] == 7
    )  # 4 to 10, prompt and all
    assert "floor_ms" not in row(report, "stock-ram")
    assert printed(describe(report)).count("DRAM alone would take") == 2


def test_a_system_that_fails_is_a_row_with_its_reason(made: tuple[int, dict[str, Any], Path]) -> None:
    _, report, _ = made
    failed = row(report, "too little")["failed"]
    assert failed.startswith("BudgetError: the memory budget is too small for this model; where: memory_budget; expected: ")
    assert re.search(r"\nWhat failed\ntoo little .*BudgetError", printed(describe(report)))


def test_the_report_says_on_what_it_ran_and_draws(made: tuple[int, dict[str, Any], Path]) -> None:
    _, report, folder = made
    assert report["machine"]["cores"] == os.cpu_count()
    assert {"torch", "transformers", "python"} <= set(report["machine"]["versions"])
    assert report["settings"]["cap_bytes"] > report["settings"]["memory_bytes"]
    assert {point["pattern"] for point in report["disk"]} == {"random", "sequential"}
    assert "same tokens without a cap: yes" in printed(describe(report))
    assert "\nslow & <today>\n" in printed(describe(report))
    assert "a whole token" in (folder / "out.svg").read_text()


def test_the_steps_of_the_paper_read_less_and_less(packed: Path) -> None:
    store, found = FlashStore.open_folder(packed), {}
    for name in ABLATION[:-1]:
        job = bench_job.Job(packed, None, [[5, 6, 7]], 8, 0, 1 << 30, 1 << 30, False, 60)
        found[name] = bench_worker.run(job.spec(SYSTEMS[name]))
    assert found["hybrid"]["hit_rate"] == found["+predictor"]["hit_rate"] == 0 < found["+window"]["hit_rate"]
    assert found["hybrid"]["stats"]["counters"]["missing_bytes"] == 7 * store.nbytes
    for name, pieces in (("+predictor", 2), ("+window", 2), ("+bundling", 1)):
        counters = found[name]["stats"]["counters"]
        assert counters["reads"] == pieces * counters["missing_bytes"] / store.layers[0].bundle_bytes
    assert found["+predictor"]["tokens"] == found["+window"]["tokens"] == found["+bundling"]["tokens"]
    assert found["+predictor"]["reads"] > found["+window"]["reads"] == 2 * found["+bundling"]["reads"] > 0


@pytest.mark.parametrize(("name", "arguments"), [
    ("hybrid", {}), ("+predictor", {}), ("flash-uncapped", {"lookahead": 0}), ("none", {}), ("none", {"memory_budget": 10**9}),
])  # fmt: skip
def test_the_window_law_is_exact_where_there_is_nothing_to_choose(name: str, arguments: dict[str, Any], packed: Path) -> None:
    """Windows that hold nothing read everything again; windows that hold everything read what is used the first time."""
    least = bench_worker._least_budget(str(packed), {"predictor": "none"} if name == "none" else {})
    job = bench_job.Job(packed, None, [[5, 6, 7]], 8, 0, least, 1 << 30, False, 60)
    found = bench_worker.run(job.spec(replace(SYSTEMS[name], arguments=SYSTEMS[name].arguments | arguments)))
    assert found["expected_bytes"] == found["missing_bytes"]
    assert (found["expected_bytes"] > 0) is (name != "none" or not arguments)


def test_what_lookahead_guesses_is_not_what_a_token_selected(packed: Path) -> None:
    """And the run that is recorded leaves no trace in the one that is measured."""
    job = bench_job.Job(packed, None, [[5, 6, 7]], 8, 0, 1 << 30, 1 << 30, False, 60)
    found = [bench_worker.run(job.spec(System("flash", arguments={"lookahead": n, "reader": "direct"}))) for n in (0, 1)]
    assert found[0]["expected_bytes"] == found[1]["expected_bytes"] == found[0]["missing_bytes"] >= found[1]["missing_bytes"]
    assert found[1]["missing_bytes"] > 0
    assert found[0]["stats"]["counters"]["tokens"] == found[1]["stats"]["counters"]["tokens"] == 7 * 3


@pytest.mark.parametrize(("kind", "in_memory"), [("stock", False), ("stock", True), ("accelerate", False)])
def test_the_others_generate_what_none_generates(kind: str, in_memory: bool, plain: Path, packed: Path) -> None:
    job = bench_job.Job(packed, plain, [[5, 6, 7]], 8, 0, 1 << 30, 1 << 30, False, 60)
    other = bench_worker.run(job.spec(System("other", kind, in_memory=in_memory)))
    assert other["tokens"] == bench_worker.run(job.spec(SYSTEMS["none"]))["tokens"]
    assert "parts_ms" not in other


def test_a_slow_system_stops_early(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "SLOW_S", 0.0)
    job = bench_job.Job(packed, None, [[5, 6, 7]], 30, 0, 1 << 30, 1 << 30, False, 60)
    assert len(bench_worker.run(job.spec(SYSTEMS["flash"]))["token_ms"]) == 8


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children that are none: seconds less."""

    def finish(command: list[str], place: Path, timeout: float) -> tuple[int, str, str]:
        try:
            return 0, json.dumps(bench_worker.run(json.loads((place / "spec.json").read_text()))), ""
        except HfFlashError as error:
            return 1, "", f"{type(error).__name__}: {error}"

    monkeypatch.setattr(bench_job, "_finish", finish)
    monkeypatch.setattr(bench_report, "dram_gb_per_s", lambda: 10.0)
    monkeypatch.setattr(bench, "disk_curve", lambda folder, max_seconds: disk_curve(folder, max_seconds=0.01))


def test_the_page_is_whole_and_loads_nothing(made: tuple[int, dict[str, Any], Path]) -> None:
    _, report, folder = made
    text = (folder / "out.html").read_text()
    assert "slow &amp; &lt;today&gt;" in text
    assert not re.search(r"<(script|link|img|iframe)|@import|(src|href)=[\"'](?!#)|url\((?!#)", text)
    assert "prefers-color-scheme: dark" in text
    titles = re.findall(r"<h2>([^<]*)</h2><p>[^<]*</p><figure>", text)
    assert titles == ["Where the time of a token goes", "Token by token", "Memory", "The disk, as it was in this run"]
    targets: list[str] = []  # of references, which must not be another drawing's
    for title, drawing in zip(titles, re.findall(r"<svg.*?</svg>", text, re.DOTALL), strict=True):
        assert ElementTree.fromstring(drawing).get("aria-label") == title
        assert "currentColor" in drawing
        assert "var(--lines)" in drawing
        assert not re.search("#010203|#040506", drawing)  # what stood for them
        own = set(re.findall(r'(?:href="#|url\(#)([^")]+)', drawing))
        assert own <= set(re.findall(r'\bid="([^"]+)"', drawing))
        targets += own
    assert len(targets) == len(set(targets))
    names = row_names(report)
    tables = [re.findall(r"<tr[^>]*><td>([^<]*)", table) for table in re.findall(r"<table>.*?</table>", text, re.DOTALL)]
    assert tables[:2] == [names, names]
    assert tables[2] == [name for name in names if name != "too little"]
    assert text.count('class="failed"') == 2
    assert f"<b>{row(report, 'flash')['tokens_per_s']:.3g}</b>" in text


@pytest.mark.usefixtures("in_process")
def test_a_sweep_is_a_row_for_every_budget(packed: Path, tmp_path: Path) -> None:
    least = bench_worker._least_budget(str(packed), {})
    sweep = f"{least + 50_000}B, {least + 20_000}B, 1, {least + 50_000}B:none"
    arguments = ["--tokens", "6", "--sweep", sweep, "--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.svg")]
    assert main(["bench", str(packed), *arguments]) == 0
    report = json.loads((tmp_path / "a.json").read_text())
    names = [f"flash {least + 50_000}B", f"flash {least + 20_000}B", "flash 1%", f"flash {least + 50_000}B none"]
    assert [row["system"] for row in report["rows"]] == names  # and nothing else, unless asked for
    much, little, nothing, dense = report["rows"]
    assert [found["stats"]["budget_bytes"] - least for found in (much, little, dense)] == [50_000, 20_000, 50_000]
    assert much["cap_bytes"] in (None, least + 50_000 + 600_000_000)
    assert much["missing_bytes"] < little["missing_bytes"]
    assert much["tokens"] == little["tokens"]
    assert "BudgetError: the memory budget is too small" in nothing["failed"]
    assert main(["bench", str(packed), "--tokens", "2", "--sweep", "1"]) == 1  # nothing of hf_flash ran
    assert "weights in memory, and cap, as each row says" in printed(describe(report))
    drawn = (tmp_path / "a.svg").read_text()
    assert "hf_flash, 1 % of the weights" in drawn
    assert "failed" in drawn
    assert "whole token" not in drawn


@pytest.mark.usefixtures("in_process")
def test_a_batch_is_measured_by_the_step(packed: Path, tmp_path: Path) -> None:
    """Each sequence as alone (contract C3); figures that are of a token are left out."""
    arguments = ["--tokens", "6", "--systems", "flash", "--memory", "5MB"]
    reports = []
    for size in (1, 3):
        out = tmp_path / f"{size}.json"
        files = ["--json", str(out), "--html", str(tmp_path / "a.html"), "--plot", str(tmp_path / "a.svg")]
        assert main(["bench", str(packed), *arguments, "--batch-size", str(size), *files]) == 0
        reports.append(json.loads(out.read_text()))
    alone, batch = (row(report, "flash") for report in reports)
    assert (len(batch["tokens"]), len(batch["token_ms"])) == (18, 5)
    assert batch["tokens"][::3] == alone["tokens"]
    assert batch["tokens_per_s"] == pytest.approx(3e3 / batch["mean_ms"])
    assert sum(batch["parts_ms"].values()) == pytest.approx(batch["mean_ms"])
    assert batch["touched_bytes"] > alone["touched_bytes"]
    assert (batch["expected_bytes"], batch["window_tokens"], batch["expected_ratio"]) == (None, None, None)
    text = printed(describe(reports[1]))
    assert "6 tokens after a prompt of 16, 3 sequences at once\n" in text
    assert "\nSpeed, for a step\n" in text
    assert f"\n- flash: read {batch['read_bytes'] / 1e6:.2f} MB" in text
    assert "3 sequences at once</p>" in (tmp_path / "a.html").read_text()
    assert "ms a step" in (tmp_path / "a.svg").read_text()
    reports[0]["settings"].pop("batch_size")  # as reports of old
    assert "\nSpeed, for a token\n" in printed(describe(reports[0]))


@pytest.mark.usefixtures("in_process")
def test_systems_and_a_sweep_are_two_plots_of_one_figure(packed: Path, tmp_path: Path) -> None:
    arguments = ["--tokens", "3", "--memory", "5MB", "--systems", "flash", "--sweep", "6MB", "--system", "more: window=9"]
    assert main(["bench", str(packed), *arguments, "--plot", str(tmp_path / "a.svg")]) == 0
    drawn = (tmp_path / "a.svg").read_text()
    assert "All systems" in drawn
    assert "hf_flash with more or less of the weights in memory" in drawn


@pytest.mark.parametrize("arguments", [
    *(["--sweep", text] for text in ("", "half", "40,-5", "1.2.3", "0", "40:oracle", "40:")),
    ["--preset", "large"], ["--tokens", "1"], ["--headroom", "much"], ["--preset", "tiny", "--repeats", "0"],
    ["--batch-size", "0"], *(["--calls", text] for text in ("", "8", "0x1", "8x", "2x1;1x4")),
    ["--system", "no arguments"], ["--system", "flash: window=3"], ["--system", "a: windw=3"], ["--flash-arg", "window"],
])  # fmt: skip
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", *arguments])
    assert "error: argument" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "message"), [
    (["/nowhere"], "not a folder"),
    (["PACKED", "--systems", "fast"], "no such system"),
    (["PACKED", "--systems", "stock-cap"], "needs the plain checkpoint"),
    (["PACKED", "--memory", "half"], "not a size"),
])  # fmt: skip
def test_what_cannot_be_measured(arguments: list[str], message: str, packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *(str(packed) if item == "PACKED" else item for item in arguments)]) == 1
    assert message in capsys.readouterr().err


def test_arguments_are_parsed() -> None:
    assert parse_arguments("window=3, reader=direct") == {"window": 3, "reader": "direct"}
    assert parse_calls(" 8x1, 1x4,8x1,") == [(8, 1), (1, 4)]
    assert parse_system(" mine : window=3") == System("mine", arguments={"window": 3})
    assert [s.label for s in resolve_systems(["ablation", "flash"], {"window": 3}, True, None)] == [
        "hybrid", "+predictor", "+window", "+bundling", "flash", "flash-uncapped",
    ]  # fmt: skip
    mine = System("flash", arguments={"window": 9})
    assert resolve_systems([mine], {"window": 3, "reader": "mmap"}, False, None)[0].arguments == {"window": 9, "reader": "mmap"}
    assert parse_sweep(" 40, 50%:none,6GiB,40") == [
        System("flash 40%", memory="40%"), System("flash 50% none", memory="50%", arguments={"predictor": "none"}),
        System("flash 6GiB", memory="6GiB"), System("flash 40%", memory="40%"),
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="a sweep says itself"):
        resolve_systems(parse_sweep("40"), {"memory_budget": 7}, False, None)
    with pytest.raises(ConfigError, match="two systems of one name"):
        resolve_systems(["flash", mine], {}, False, None)
    with pytest.raises(ConfigError, match="no argument 'windw'"):
        resolve_systems(["flash"], {"windw": 3}, False, None)


@pytest.mark.parametrize(("one", "other", "same"), [
    ([1, 2], [1, 2, 3], True), ([1, 2], [1, 3], False), (None, [1], None),
])  # fmt: skip
def test_tokens_are_compared_as_far_as_both_came(one: list[int] | None, other: list[int], same: bool | None) -> None:
    rows = [
        {"system": "a", "failed": "why"} if one is None else {"system": "a", "tokens": one},
        {"system": "b", "tokens": other},
    ]
    assert bench.same_tokens(rows, "a", "b") is same


def test_the_median_run_stands_for_all() -> None:
    runs = [{"tokens_per_s": 3.0}, {"failed": "why"}, {"tokens_per_s": 2.0}]
    assert bench._median_run(runs) == {"tokens_per_s": 2.0, "runs_tokens_per_s": [3.0, None, 2.0]}
    timed = [{"tokens_per_s": speed, "first_token_s": first} for speed, first in ((3.0, 1.0), (2.0, 9.0), (1.0, 4.0))]
    assert bench._median_run([*timed, {"failed": "x"}])["first_token_s"] == 4.0


@pytest.mark.parametrize(("code", "err", "reason"), [
    (None, "", "not done after 9 s"),
    (-9, "", "out of memory under the cap of 1.0 MiB"),
    (1, "Traceback\n  File x\nValueError: broken\n  where: here\n", "ValueError: broken; where: here"),
    (3, "", "exit code 3"),
])  # fmt: skip
def test_reasons(code: int | None, err: str, reason: str) -> None:
    assert bench_job._reason(code, err, 1 << 20, 9) == reason


# --- the cap -------------------------------------------------------------------------------------------------------------


def test_a_cap_holds_and_leaves_nothing_behind() -> None:
    with memory_cap(200 << 20) as found:
        if found.nbytes is None:
            pytest.skip("no way to cap memory here")
        script = "x = bytearray(400 << 20); print(len(x))"
        done = subprocess.run(found.command([sys.executable, "-c", script]), capture_output=True, check=False)
        assert done.returncode in (-9, 137), done.stderr
    assert found.folder is None or not found.folder.exists()


def test_without_a_way_to_cap_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cap, "_ROOT", tmp_path)
    monkeypatch.setattr(cap.shutil, "which", lambda name: None)
    with memory_cap(1 << 30) as found:
        assert (found.label, found.command(["true"])) == ("no cap", ["true"])


def test_an_interrupt_ends_the_child_and_its_cgroup(tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # test runners' workers ignore it

    def interrupt() -> None:
        while not (out.exists() and out.read_text().endswith("\n")):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    try:
        with memory_cap(1 << 30) as found, pytest.raises(KeyboardInterrupt):
            bench_job._finish(found.command(["sh", "-c", "echo $$; exec sleep 60"]), tmp_path, 60)
    finally:
        signal.signal(signal.SIGINT, before)
    with pytest.raises(ProcessLookupError):
        os.kill(int(out.read_text()), 0)
    assert found.folder is None or not found.folder.exists()


# --- the disk ------------------------------------------------------------------------------------------------------------


def test_the_disk_of_a_small_file_is_measured(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(os.urandom(300_000))
    (tmp_path / "b.safetensors").write_bytes(os.urandom(200_000))
    for path in (tmp_path, tmp_path / "a.safetensors"):
        points = disk_curve(path, depths=(1, 4), max_bytes=1 << 20, max_seconds=0.05)
        grid = [(point.size, point.depth) for point in points if point.pattern == "random"]
        assert grid == [(size << 10, depth) for size in (4, 16, 64, 256) for depth in (1, 4)]
        assert points[-1].pattern == "sequential"
        for point in points:
            assert 0 < point.nbytes <= 1 << 20
            assert point.nbytes % point.size == 0
            assert point.gb_per_s > 0


def test_a_file_too_small_to_measure_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"tiny")
    with pytest.raises(StoreReadError, match="no file is large enough"):
        disk_curve(tmp_path)


CURVE = [
    DiskPoint("random", True, size, depth, 1_000_000_000, 1 / rate)
    for size, depth, rate in [(4096, 1, 0.1), (4096, 16, 0.4), (65536, 1, 0.4), (65536, 16, 1.6)]
] + [DiskPoint("sequential", True, 1 << 20, 4, 1_000_000_000, 0.1)]


@pytest.mark.parametrize(("size", "depth", "rate"), [
    (4096, 1, 0.1), (65536, 16, 1.6), (4096, 4, 0.2), (16384, 1, 0.2), (16384, 4, 0.4), (16384, None, 0.8),
    (1024, 0.5, 0.1), (1 << 22, 64, 1.6),
])  # fmt: skip
def test_a_curve_is_read_between_its_points(size: int, depth: float | None, rate: float) -> None:
    assert rate_at(CURVE, size, depth) == pytest.approx(rate)


def test_curves_of_one_disk_are_averaged_over_their_time() -> None:
    slower = [replace(point, nbytes=500_000_000, seconds=2 * point.seconds) for point in CURVE]
    found = mean_curve([CURVE, slower])
    assert [(point.pattern, point.size, point.depth) for point in found] == [(p.pattern, p.size, p.depth) for p in CURVE]
    assert [point.gb_per_s for point in found] == pytest.approx([point.gb_per_s / 2 for point in CURVE])
    assert mean_curve([CURVE]) == CURVE


@pytest.mark.usefixtures("in_process")
def test_the_disk_is_measured_around_every_row(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a disk that is half as fast each time, a row is held against its own two curves, the report against all."""
    curves = [[replace(point, seconds=point.seconds * 2**turn) for point in CURVE] for turn in range(3)]
    left = iter(curves)
    monkeypatch.setattr(bench, "disk_curve", lambda folder, max_seconds: next(left))
    least = bench_worker._least_budget(str(packed), {})
    report = bench.bench(packed, systems=["flash", "none"], tokens=6, memory=least + 20_000, arguments={"reader": "direct"})
    for row, around in zip(report["rows"], itertools.pairwise(curves), strict=True):
        count = row["stats"]["counters"]
        rate = rate_at(mean_curve(around), row["run_bytes"], count["reads"] / count["calls"])
        assert row["disk_rate_share"] == pytest.approx(row["read_gb_per_s"] / rate)
    assert [point["seconds"] for point in report["disk"]] == pytest.approx([7 * point.seconds for point in CURVE])


def a_row(**stats: Any) -> dict[str, Any]:
    counters = {"reads": 320, "calls": 20}
    return {"stats": {"reader": "direct", "counters": counters} | stats, "run_bytes": 65536, "read_gb_per_s": 0.8,
            "read_bytes": 3e6, "missing_bytes": 1.6e6, "expected_bytes": 2e6, "touched_bytes": 5e6}  # fmt: skip


def test_checks_are_ratios_to_what_the_run_measured() -> None:
    assert add_checks({"system": "stock-ram"}, CURVE, 10.0) == {"system": "stock-ram"}
    found = add_checks(a_row(), CURVE, 10.0)
    assert (found["expected_ratio"], found["disk_rate_share"]) == (1.5, pytest.approx(0.5))
    assert found["floor_ms"] == pytest.approx({"dram": 0.5, "disk": 1.0, "overlapped": 1.0, "in_turn": 1.5})
    for stats in ({"reader": "mmap"}, {"counters": {"reads": 0, "calls": 20}}):
        found = add_checks(a_row(**stats) | {"expected_bytes": 0.0}, CURVE, 10.0)
        assert (found["expected_ratio"], found["disk_rate_share"], found["floor_ms"]["disk"]) == (None, None, 0.0)


@given(st.integers(0, 12), st.integers(1, 20), st.integers(0, 25), st.floats(0, 1), st.integers(0, 1 << 30))
@settings(max_examples=60, deadline=None)
def test_the_window_law(first: int, d_ff: int, capacity: int, share: float, seed: int) -> None:
    used = np.random.default_rng(seed).random((12, d_ff)) < share
    read = kept = 0
    for token in range(first, 12):
        fitting = [k for k in range(token + 1) if used[token - k : token].any(0).sum() <= capacity]
        kept += max(fitting)
        read += int((used[token] & ~used[token - max(fitting) : token].any(0)).sum())
    assert window_law(used, first, capacity) == (read, kept)


def test_dram_has_a_speed() -> None:
    assert dram_gb_per_s(1 << 22, repeats=2) > 0
