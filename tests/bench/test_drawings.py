"""The page and the drawings of a bench report: names, headings and legends, by what is in them and where it lies."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from hf_flash.bench.names import PARTS, ROWS, row_name, row_names, setting
from hf_flash.bench.systems import SYSTEMS, parse_sweep
from hf_flash.errors import ConfigError

pytest.importorskip("matplotlib", reason="drawings need it")
from hf_flash.bench import plots
from hf_flash.bench.drawings import _disk, _memory, _timeline, bench_drawings, time_figure
from hf_flash.bench.page import page


def row(label: str, kind: str, ms: float, sweep: str | None = None) -> dict[str, Any]:
    """What `hf-flash bench` reports of a system, with figures that could be."""
    found = {
        "system": label, "kind": kind, "arguments": {}, "sweep": sweep, "memory_bytes": 500_000_000, "cap": "cgroup v2",
        "cap_bytes": 1_100_000_000, "token_ms": [2 * ms, ms, ms / 2], "tokens_per_s": 1e3 / ms, "mean_ms": ms,
        "median_ms": 0.9 * ms, "p95_ms": 2 * ms, "disk_bytes": 5e6, "load_s": 1.0, "first_token_s": 2.0,
        "peak_anonymous_bytes": 700_000_000, "calls_ms": {"1x8": 7.5}, "runs_tokens_per_s": [1e3 / ms],
    }  # fmt: skip
    if kind != "flash":
        return found
    return found | {
        "parts_ms": dict.fromkeys(PARTS, ms / len(PARTS)), "read_bytes": 4e6, "reads": 30.0, "run_bytes": 16384.0,
        "read_gb_per_s": 1.5, "hit_rate": 0.75, "stats": {"reader": "direct", "predictor": "int4-g64"}, "expected_bytes": 4e6,
        "expected_ratio": 1.0, "disk_rate_share": 0.9,
        "floor_ms": dict.fromkeys(("dram", "disk", "overlapped", "in_turn"), 1.0),
    }  # fmt: skip


@pytest.fixture
def report() -> dict[str, Any]:
    """Every system, a sweep, and one that failed; hf_flash is 30 times as fast as the slowest."""
    rows = [row(label, system.kind, 3000 / (1 + 5 * at)) for at, (label, system) in enumerate(SYSTEMS.items())]
    rows += [row(system.label, "flash", 80 + at, system.memory) for at, system in enumerate(parse_sweep("40,1GiB"))]
    failed = {"system": "mine", "kind": "flash", "sweep": None, "memory_bytes": 5, "cap": "no cap", "cap_bytes": None}
    rows.append(failed | {"arguments": {}, "failed": "BudgetError: <too small>"})
    point = {"pattern": "random", "depth": 1, "direct": True}
    return {
        "machine": {"cpu": "a processor", "cores": 2, "torch_threads": 2, "dram_gb_per_s": 20.0, "disk": "a disk",
                    "kernel": "Linux", "date": "2026-11-27", "versions": {"python": "3"}},
        "model": {"source": "opt-2.7b", "dense_bytes": 1_000_000_000, "dtype": "bfloat16", "layers": 32,
                  "d_model": 64, "d_ff": 256},
        "settings": {"tokens": 64, "prompt_tokens": 16, "batch_size": 1, "calls": [[1, 8]], "memory_bytes": 500_000_000,
                     "cap_bytes": 1_100_000_000},
        "notes": [],
        "disk": [point | {"size": size, "gb_per_s": size / 1e5} for size in (4096, 65536)]
        + [{"pattern": "sequential", "direct": True, "size": 1 << 20, "depth": 1, "gb_per_s": 2.0}],
        "rows": rows,
    }  # fmt: skip


# --- names ---------------------------------------------------------------------------------------------------------------


def test_every_system_has_a_name_of_its_own() -> None:
    assert list(ROWS) == list(SYSTEMS)
    assert len({name for name, _ in ROWS.values()}) == len(ROWS)


@pytest.mark.parametrize(("found", "name"), [
    ({"system": "flash 40%", "sweep": "40%"}, "hf_flash, 40 % of the weights"),
    ({"system": "flash 6GiB none", "sweep": "6GiB", "arguments": {"predictor": "none"}},
     "hf_flash, 6GiB of weights, predictor none"),
    ({"system": "mine", "sweep": None}, "mine"),
    ({"system": "stock-cap", "sweep": None, "cap_bytes": 5}, "stock transformers under the cap (the kernel pages)"),
    ({"system": "stock-cap", "sweep": None, "cap_bytes": None}, "stock transformers, no cap"),
    ({"system": "stock-ram", "sweep": None}, "stock transformers, all in RAM, no cap"),
])  # fmt: skip
def test_rows_have_names(found: dict[str, Any], name: str) -> None:
    assert row_name(found) == name


def test_on_a_device_weights_are_in_its_memory() -> None:
    assert "device's memory" in row_name({"system": "stock-ram", "sweep": None}, on_device=True)


def test_the_setting_says_share_cap_prompt_and_tokens(report: dict[str, Any]) -> None:
    assert setting(report) == "50 % of the weights in memory, cap 1.02 GiB; 64 tokens after a prompt of 16"
    report["settings"] |= {"forced": True, "batch_size": 3}
    for found in report["rows"]:
        found["cap_bytes"] = None
    assert setting(report) == "50 % of the weights in memory, no cap; 64 given tokens after a prompt of 16, 3 sequences at once"


# --- drawings ------------------------------------------------------------------------------------------------------------


def boxes(figure: Any) -> Iterator[tuple[str, Any]]:
    """Whatever is drawn beside the legend, and where: bars, marks, lines, texts and labels."""
    for axes in figure.axes:
        labels = [axes.title, axes._left_title, axes.xaxis.label, *axes.get_yticklabels()]
        for item in [*axes.patches, *axes.lines, *axes.texts, *labels]:
            box = item.get_window_extent()
            if box.width > 0 or box.height > 0:
                yield str(item), box


@pytest.mark.parametrize("draw", [time_figure, _timeline, _memory, _disk])
def test_a_legend_overlaps_nothing_and_nothing_is_cut_off(draw: Any, report: dict[str, Any]) -> None:
    with plots.style("test"):
        figure = draw(report)
        figure.draw_without_rendering()
        legend = figure.axes[0].get_legend().get_window_extent()
        for name, box in [("legend", legend), *boxes(figure)]:
            assert name == "legend" or not legend.overlaps(box), name
            assert figure.bbox.x0 <= box.x0, name
            assert box.x1 <= figure.bbox.x1, name


def test_no_text_of_the_bars_overlaps_another(report: dict[str, Any]) -> None:
    with plots.style("test"):
        figure = time_figure(report)
        figure.draw_without_rendering()
        texts = [
            item
            for axes in figure.axes
            for item in [*axes.texts, *axes.get_yticklabels(), *axes.get_xticklabels(), axes._left_title]
        ]
        found = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]
    for number, (name, box) in enumerate(found):
        for other, beside in found[number + 1 :]:
            assert not box.overlaps(beside), (name, other)


def test_a_bar_is_the_mean_and_its_mark_the_median(report: dict[str, Any]) -> None:
    with plots.style("test"):
        figure = time_figure(report)
    everything, short, sweep = figure.axes
    done = [found for found in report["rows"] if "failed" not in found and not found["sweep"]]
    (medians,) = everything.lines
    assert list(medians.get_xdata()) == [found["median_ms"] for found in done]
    ends = [
        max(bar.get_x() + bar.get_width() for bar in everything.patches if round(bar.get_y() + 0.31) == at)
        for at in range(len(done))
    ]
    assert ends == pytest.approx([found["mean_ms"] for found in done])
    assert len(short.get_yticklabels()) == sum("parts_ms" in found and 4 * found["mean_ms"] < 3000 for found in done)
    assert [label.get_text().replace("\n", " ") for label in sweep.get_yticklabels()] == [
        "hf_flash, 40 % of the weights", "hf_flash, 1GiB of weights",
    ]  # fmt: skip
    texts = [text.get_text() for text in everything.texts]
    assert texts == [f"{found['median_ms']:.0f} ({found['mean_ms']:.0f})" for found in done]


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match="plots need matplotlib"):
        plots.check_installed()


# --- the page ------------------------------------------------------------------------------------------------------------


def test_every_row_is_called_by_its_name_in_words_drawings_and_tables(report: dict[str, Any]) -> None:
    text = page(report)
    for found, name in zip(report["rows"], row_names(report), strict=True):
        assert f"<dt>{name}</dt>".replace("'", "&#x27;") in text
        assert text.count(f"<td>{name.replace(chr(39), '&#x27;')}<") >= 1
        assert found["system"] == name or f"<small>{found['system']}</small>" in text
    drawn = list(bench_drawings(report))
    for label in [line for name in row_names(report) if name != "mine" for line in plots.wrapped(name, 30).splitlines()]:
        assert any(label in " ".join(ElementTree.fromstring(drawing.svg).itertext()) for drawing in drawn), label


def test_every_heading_is_explained_and_every_table_scrolls_in_its_box(report: dict[str, Any]) -> None:
    text = page(report)
    assert f'<h1>Decode speed of opt-2.7b</h1><p class="setting">{setting(report)}</p>' in text
    headings = re.findall(r"<h2>([^<]*)</h2>(<\w+)>(?:([^<]{40,})</p>(?:<figure>|<div class=\"table\">))?", text)
    assert [(kind, bool(says)) for _, kind, says in headings] == [("<dl", False), *[("<p", True)] * (len(headings) - 1)]
    assert len(headings) == text.count("<h2>") == 10
    assert text.count("<table>") == text.count('<div class="table"><table>') == 5
    assert re.search(r"\.table \{ overflow-x: auto", text)
    assert text.count("A bar is the mean") == 1


def test_columns_have_units_and_old_figures_their_place(report: dict[str, Any]) -> None:
    text = page(report)
    for heading in re.findall(r"<th>(.*?)</th>", text):
        assert re.search(r", (ms|s|MB|KiB|GB/s|%)$|^a token$|^tokens a second$|^reads$|^\d|^GB/s$", heading), heading
    assert "failed: BudgetError: &lt;too small&gt;" in text
    assert "<td>100.0</td>" not in text
    assert f"<td>{3000 * 0.9:.1f}</td>" in text


# --- of an evaluation ----------------------------------------------------------------------------------------------------


@pytest.fixture
def evaluation() -> dict[str, Any]:
    """What `hf-flash eval` reports, as far as it is drawn."""
    judged = {
        "bytes": 1000, "layers": [{"selected": 1.5}] * 3, "predicted_at": [1, 5, 9, 2], "missed_at": [0, 1, 0, 0],
        "missed": 0.01, "use": [4, 6, 7],
    }  # fmt: skip
    none = {"bytes": 0, "layers": [{"active": active} for active in (9, 2, 5)]}
    predictors = {"none": none, "int4-g64, margin 1.5": judged, "int4-g64, measured margin": judged, "lowrank": judged}
    model = {"d_ff": 100, "source": "/somewhere/tiny-opt"}
    return {"model": model, "predictors": predictors, "bins": [-2.0, -1.0, 0.0, 1.0, 2.0], "use": [3, 4, 5]}


@pytest.mark.parametrize("draw", [plots._sparsity, plots._preactivations, plots._aggregated_use])
def test_drawings_of_an_evaluation_have_their_legend_beside_them(draw: Any, evaluation: dict[str, Any]) -> None:
    with plots.style("test"):
        figure = plots.evaluation_figure(evaluation, draw)
        figure.draw_without_rendering()
        (axes,) = figure.axes
        legend, inside = axes.get_legend(), axes.get_window_extent()
        assert not legend.get_window_extent().overlaps(inside)
        assert legend.get_window_extent().x1 <= figure.bbox.x1
        title = axes._left_title.get_window_extent()
    assert title.x1 <= figure.bbox.x1
    assert "tiny-opt" in axes._left_title.get_text()
    named = " ".join(text.get_text().replace("\n", " ") for text in legend.get_texts())
    assert all(name in named for name in evaluation["predictors"] if name != "none")
    assert axes.get_xlabel()
    assert "%" in axes.get_ylabel()


def test_the_same_evaluation_is_the_same_files(evaluation: dict[str, Any], tmp_path: Path) -> None:
    first, second = plots.plot(evaluation, tmp_path / "a"), plots.plot(evaluation, tmp_path / "b")
    assert [path.name for path in first] == ["sparsity.svg", "preactivations.svg", "aggregated-use.svg"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
