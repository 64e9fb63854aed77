"""Drawings of a bench report (run.py): where the time of a token goes, tokens one by one, memory, the disk.

A bar is the mean time of a token, which is the sum of the means of its parts; a mark on it is the median token. Medians have no
parts that add up to them, so both are shown, and both are written at the end of the bar.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from hf_flash.base.sizes import format_bytes
from hf_flash.bench.names import PARTS, WHOLE, row_name, setting
from hf_flash.bench.plots import COLOURS, legend_beside, new_figure, style, text_colour, wrapped, write
from hf_flash.bench.report import step_name
from hf_flash.config_arguments import DIRECT

_WHOLE_COLOUR: Final = "#a6adba"
_MUCH_SHORTER: Final = 4  # times: bars that are this much shorter than the longest are drawn again, on a scale of their own
_NAME_WIDTH: Final = 30  # letters


@dataclass(frozen=True)
class Drawing:
    """A drawing for a page: its heading, what it shows, and the SVG."""

    title: str
    says: str
    svg: str


def plot_bench(report: dict[str, Any], path: Path) -> None:
    """Draw where the time of a decoded token goes, a bar for every system (paper: figure 1), and over the budgets of a sweep.

    Args:
        report: from `hf_flash.bench.run.bench`; or of its settings and rows what is drawn, with a `title` and a `setting`.
        path: file to write, its suffix says the format.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    with style("bench"):
        write(bench_figure(report), path)


def bench_figure(report: dict[str, Any]) -> Any:
    """What `plot_bench` draws: the bars, under the model and the setting."""
    figure = time_figure(report)
    title = report.get("title") or f"Decode speed of {report['model']['source']}"
    figure.suptitle(f"{wrapped(title, 95)}\n{wrapped(setting(report), 95)}", x=0.02, ha="left", fontsize=11)
    return figure


def bench_drawings(report: dict[str, Any]) -> Iterator[Drawing]:
    """Drawings of a bench report, as SVG that a page can hold: in its fonts and in its colours for text and lines.

    Args:
        report: from `hf_flash.bench.run.bench`.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    one = step_name(report["settings"])
    yield _on_a_page(
        f"Where the time of a {one} goes",
        f"How long one {one} takes, in milliseconds: shorter is faster. A bar is the mean over all of them; rows of hf_flash "
        f"are divided into the means of their parts, which add up to it. The mark on a bar is the median {one}, the one in "
        "the middle: a few slow ones make the mean longer, not the median. At the end of a bar: median, and mean in brackets.",
        time_figure, report,
    )  # fmt: skip
    if not any("failed" not in row for row in report["rows"]):
        return
    yield _on_a_page(
        f"{one.capitalize()} by {one}",
        f"Every {one} that was timed, in milliseconds, on a logarithmic scale. The first ones find little in memory.",
        _timeline, report,
    )  # fmt: skip
    yield _on_a_page(
        "Memory",
        "The most memory that each system held which the kernel cannot take back (anonymous memory: weights, buffers, "
        "interpreter), and the cap, which no process can exceed. What the kernel keeps of files comes on top, as far as there "
        "is room.",
        _memory, report,
    )  # fmt: skip
    yield _on_a_page(
        "The disk, as it was in this run",
        "How fast the disk answered random reads of these sizes, with so many under way at once, measured before and after "
        "each system, on logarithmic scales. Diamonds: the reads that rows of hf_flash made.",
        _disk, report,
    )  # fmt: skip


def _on_a_page(title: str, says: str, draw: Any, report: dict[str, Any]) -> Drawing:
    text_stand_in, lines_stand_in = "#010203", "#040506"  # for the page's own colours, light or dark
    with style(title, text_stand_in, lines_stand_in, "none"), io.StringIO() as file:
        draw(report).savefig(file, format="svg", metadata={"Date": None})
        text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r"(font: [^;\"]*?px) [^;\"]*", r"\1 inherit", text)
    start, end = text.split(">", 1)
    start = re.sub(r' (width|height)="[^"]*"', "", start) + f' role="img" aria-label="{title}">'
    return Drawing(title, says, start + end.replace(text_stand_in, "currentColor").replace(lines_stand_in, "var(--lines)"))


# --- bars ----------------------------------------------------------------------------------------------------------------


def time_figure(report: dict[str, Any]) -> Any:
    """Bars for all systems, those that are much shorter than the longest once more, and those of a sweep."""
    panels = _panels(report)
    lines = [max(1, len(rows)) for _, rows in panels]
    figure = new_figure(max(2.6, 0.6 * len(panels) + 0.4 * sum(lines) + 0.6))
    places = figure.subplots(len(panels), squeeze=False, height_ratios=lines)[:, 0]
    for axes, (heading, rows) in zip(places, panels, strict=True):
        _bars(axes, rows, report)
        axes.set_title(heading)
    one = step_name(report["settings"])
    places[-1].set_xlabel(f"ms a {one}; numbers: median (mean)")
    legend_beside(figure, f"bars: the mean {one}")
    return figure


def _panels(report: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Headings and their rows. A system that failed is left out; a budget that failed has its place in the sweep."""
    systems = [row for row in report["rows"] if not row["sweep"] and "failed" not in row]
    sweep = sorted((row for row in report["rows"] if row["sweep"]), key=lambda row: row.get("memory_bytes") or 0)
    longest = max((row["mean_ms"] for row in systems), default=0.0)
    short = [row for row in systems if "parts_ms" in row and row["mean_ms"] * _MUCH_SHORTER < longest]
    panels = [("All systems" if short or sweep else "", systems)] if systems or not sweep else []
    panels += [("The short bars of hf_flash once more, on a scale of their own", short)] if short else []
    panels += [("hf_flash with more or less of the weights in memory", sweep)] if sweep else []
    return panels


def _bars(axes: Any, rows: Sequence[dict[str, Any]], report: dict[str, Any]) -> None:
    """A bar for every row, with its name before it and its numbers behind it."""
    places, begin = range(len(rows)), np.zeros(len(rows))
    for number, (part, label) in enumerate(PARTS.items()):
        length = np.array([row.get("parts_ms", {}).get(part, 0.0) for row in rows])
        axes.barh(places, length, left=begin, height=0.62, color=COLOURS[number], label=label if length.any() else None)
        begin += length
    whole = [row.get("mean_ms", 0.0) if "parts_ms" not in row else 0.0 for row in rows]
    axes.barh(places, whole, height=0.62, color=_WHOLE_COLOUR, label=WHOLE if any(whole) else None)
    medians = [row.get("median_ms", np.nan) for row in rows]
    axes.plot(medians, places, "|", color=text_colour(), markersize=13, markeredgewidth=1.6,
              label=f"the median {step_name(report['settings'])}")  # fmt: skip
    for place, row in enumerate(rows):
        text = "failed" if "failed" in row else f"{_short(row['median_ms'])} ({_short(row['mean_ms'])})"
        end = max(row.get("mean_ms", 0.0), row.get("median_ms", 0.0))
        axes.annotate(text, (end, place), (5, 0), textcoords="offset points", va="center", fontsize=8.5)
    _rows_of(axes, rows, report)
    longest = max((max(row.get("mean_ms", 0.0), row.get("median_ms", 0.0)) for row in rows), default=0.0)
    axes.set_xlim(0, 1.24 * longest or 1.0)
    axes.grid(axis="x", alpha=0.8, linewidth=0.6)


def _short(ms: float) -> str:
    """Milliseconds beside a bar: small ones with a digit more."""
    return f"{ms:.0f}" if ms >= 10 else f"{ms:.1f}"


def _rows_of(axes: Any, rows: Sequence[dict[str, Any]], report: dict[str, Any]) -> None:
    """The names of rows, from the top down."""
    names = [wrapped(name, _NAME_WIDTH) for name in _names(rows, report)]
    axes.set_yticks(range(len(rows)), names, fontsize=8.5)
    for row, label in zip(rows, axes.get_yticklabels(), strict=True):
        label.set_fontweight("bold" if row["system"] == "flash" else "normal")
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)


def _names(rows: Sequence[dict[str, Any]], report: dict[str, Any]) -> list[str]:
    return [row_name(row, on_device="device" in report.get("machine", ())) for row in rows]


# --- for a page --------------------------------------------------------------------------------------------------------


def _done(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in report["rows"] if "failed" not in row]


def _timeline(report: dict[str, Any]) -> Any:
    """Every decoded token's time, a line for every system."""
    rows = _done(report)
    figure = new_figure(max(3.4, 0.4 * len(rows) + 0.6))
    axes = figure.subplots()
    for row, name in zip(rows, _names(rows, report), strict=True):
        wide = 2.6 if row["system"] == "flash" else 1.2
        axes.plot(range(1, len(row["token_ms"]) + 1), row["token_ms"], marker=".", linewidth=wide, markersize=4, label=name)
    one = step_name(report["settings"])
    axes.set(xlabel=f"decoded {one}, from the first", ylabel="ms", yscale="log")
    _plain_numbers(axes)
    axes.grid(axis="y", alpha=0.8, linewidth=0.6)
    legend_beside(figure)
    return figure


def _plain_numbers(axes: Any) -> None:
    """10 and 50 on a logarithmic axis, for people."""
    from matplotlib.ticker import LogLocator

    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()


def _memory(report: dict[str, Any]) -> Any:
    """Anonymous memory at its most, beside the cap: the page cache may be dropped, this may not."""
    rows = _done(report)
    figure = new_figure(1.2 + 0.4 * len(rows))
    axes = figure.subplots()
    held = [(row["peak_anonymous_bytes"] or 0) / 1e6 for row in rows]
    axes.barh(range(len(rows)), held, height=0.62, color=COLOURS[3], label="held by the process, at its most")
    caps = [(number, row["cap_bytes"] / 1e6) for number, row in enumerate(rows) if row["cap_bytes"]]
    for number, cap in caps:
        label = "its cap" if number == caps[0][0] else None
        axes.plot([cap, cap], [number - 0.38, number + 0.38], linestyle="-", linewidth=2.4, color=COLOURS[5], label=label)
    for number, size in enumerate(held):
        axes.annotate(f"{size:.0f}", (size, number), (5, 0), textcoords="offset points", va="center", fontsize=8.5)
    _rows_of(axes, rows, report)
    axes.set_xlim(0, 1.12 * max([*held, *(cap for _, cap in caps)]) or 1.0)
    axes.set_xlabel("MB")
    axes.grid(axis="x", alpha=0.8, linewidth=0.6)
    legend_beside(figure)
    return figure


def _disk(report: dict[str, Any]) -> Any:
    """The curve over size and depth, and where the rows of hf_flash were on it."""
    figure = new_figure(3.8)
    axes = figure.subplots()
    random = [point for point in report["disk"] if point["pattern"] == "random"]
    for depth in sorted({point["depth"] for point in random}):
        curve = sorted((point["size"], point["gb_per_s"]) for point in random if point["depth"] == depth)
        axes.plot(*zip(*curve, strict=True), marker=".", label=f"{depth} read{'s' * (depth > 1)} at a time")
    rows = [row for row in _done(report) if "stats" in row and row["stats"]["reader"] == DIRECT and row["read_gb_per_s"]]
    for number, (row, name) in enumerate(zip(rows, _names(rows, report), strict=True)):
        colour = COLOURS[(number + 3) % len(COLOURS)]
        axes.plot(row["run_bytes"], row["read_gb_per_s"], "D", color=colour, label=f"{name}: {row['reads']:.0f} reads")
    sizes = sorted({point["size"] for point in random})
    axes.set(xlabel="size of a read", ylabel="GB/s", xscale="log", yscale="log")
    axes.set_xticks(sizes, [format_bytes(size) for size in sizes])
    _plain_numbers(axes)
    axes.grid(axis="y", alpha=0.8, linewidth=0.6)
    legend_beside(figure)
    return figure
