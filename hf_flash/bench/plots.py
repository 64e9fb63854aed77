"""Drawings of a bench report (run.py) and of an evaluation report (evaluation/compare.py), with matplotlib.

matplotlib comes with the `plots` extra and is imported when something is drawn. A report is a plain dictionary, so that
drawings can be made of reports that were saved.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hf_flash.base.sizes import format_bytes
from hf_flash.bench.report import step_name
from hf_flash.config_arguments import DIRECT
from hf_flash.errors import ConfigError


def plot(report: dict[str, Any], folder: Path) -> list[Path]:
    """Draw a report: sparsity by layer, pre-activations of predicted and missed neurons, aggregated use.

    Args:
        report: from `hf_flash.evaluation.compare.evaluate`.
        folder: where `sparsity.svg`, `preactivations.svg` and `aggregated-use.svg` go; made if it is not there.

    Returns:
        The files.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    paths = []
    for name, draw in (("sparsity", _sparsity), ("preactivations", _preactivations), ("aggregated-use", _aggregated_use)):
        figure = _figure(3.8)
        folder.mkdir(parents=True, exist_ok=True)
        draw(figure.subplots(), report)
        paths.append(folder / f"{name}.svg")
        figure.savefig(paths[-1], metadata={"Date": None})
    return paths


def check_installed() -> None:
    """Raise now, not after hours, if there is no matplotlib."""
    _figure(1.0)


def _figure(height: float, width: float = 6.4) -> Any:
    try:
        import matplotlib.figure
    except ImportError as error:
        raise ConfigError("plots need matplotlib", hint='pip install "hf-flash[plots]"') from error
    return matplotlib.figure.Figure(figsize=(width, height), layout="constrained")


def _sparse(report: dict[str, Any]) -> dict[str, Any]:
    return {name: found for name, found in report["predictors"].items() if found["bytes"]}


def _sparsity(axes: Any, report: dict[str, Any]) -> None:
    """Share of the neurons that are not used, by layer: truly, and as predicted."""
    d_ff = report["model"]["d_ff"]
    active = np.array([layer["active"] for layer in report["predictors"]["none"]["layers"]])
    axes.plot(100 * (1 - active / d_ff), "k.-", label="inactive after ReLU")
    for name, found in _sparse(report).items():
        selected = active * [layer["selected"] for layer in found["layers"]]
        axes.plot(100 * (1 - selected / d_ff), ".--", label=f"not predicted: {name}")
    axes.set(xlabel="layer", ylabel="% of the neurons", title="Sparsity by layer")
    axes.legend()


def _preactivations(axes: Any, report: dict[str, Any]) -> None:
    """Where predicted neurons lie, and where those lie that were missed (paper: figure 3a)."""
    edges = np.array(report["bins"])
    middle = (edges[1:] + edges[:-1]) / 2
    for number, (name, found) in enumerate(_sparse(report).items()):
        total = max(1, sum(found["predicted_at"]))
        axes.step(middle, np.array(found["predicted_at"]) / total, color=f"C{number}", label=f"predicted: {name}")
        axes.fill_between(middle, np.array(found["missed_at"]) / total, step="pre", alpha=0.5, color=f"C{number}",
                          label=f"missed: {found['missed']:.2%} of the active")  # fmt: skip
    axes.axvline(0, color="k", linewidth=0.5)
    axes.set(
        xlabel="pre-activation, in standard deviations of its layer", ylabel="share of the predicted",
        title="Pre-activations of predicted and missed neurons", yscale="log", ylim=(1e-6, 1),
    )  # fmt: skip
    axes.legend(fontsize=8, loc="upper right")


def _aggregated_use(axes: Any, report: dict[str, Any]) -> None:
    """How much of a layer the last k tokens used (paper: figure 4a)."""
    d_ff = report["model"]["d_ff"]
    truth = Path(report["model"]["source"]).name or "model"
    for name, found in _sparse(report).items():
        axes.plot(range(1, len(found["use"]) + 1), 100 * np.array(found["use"]) / d_ff, ".--", label=f"predicted: {name}")
    axes.plot(range(1, len(report["use"]) + 1), 100 * np.array(report["use"]) / d_ff, "k.-", label="active")
    axes.set(xlabel="tokens in the window", ylabel="% of the neurons", title=f"Aggregated neuron use, {truth}")
    axes.legend()


def plot_bench(report: dict[str, Any], path: Path) -> None:
    """Draw where the time of a decoded token goes, a bar for every system (paper: figure 1), and over the budgets of a sweep.

    Args:
        report: from `hf_flash.bench.run.bench`.
        path: file to write, its suffix says the format.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    systems = [row for row in report["rows"] if not row["sweep"] and "failed" not in row]
    sweep = sorted((row for row in report["rows"] if row["sweep"]), key=lambda row: row["memory_bytes"])
    panels = [(1.2 + 0.35 * len(systems), _systems, systems)] if systems or not sweep else []
    panels += [(3.8, _sweep, sweep)] if sweep else []
    heights = [height for height, *_ in panels]
    figure = _figure(sum(heights))
    places = figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
    for axes, (_, draw, rows) in zip(places, panels, strict=True):
        draw(axes, rows, report)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


_PARTS = {"io": "I/O", "manage": "management", "predict": "predictor", "compute": "FFN compute", "rest": "attention, head"}


def _stack(bars: Any, rows: list[dict[str, Any]]) -> None:
    """The parts of every row's time, one on the other; `bars` takes lengths, where they begin, and a label."""
    begin = np.zeros(len(rows))
    for key, label in _PARTS.items():
        length = np.array([row.get("parts_ms", {}).get(key, 0.0) for row in rows])
        bars(length, begin, label)
        begin += length


def _systems(axes: Any, rows: list[dict[str, Any]], report: dict[str, Any]) -> None:
    """A bar for every system."""
    _stack(lambda width, left, label: axes.barh(range(len(rows)), width, left=left, label=label), rows)
    whole = [0.0 if "parts_ms" in row else row["mean_ms"] for row in rows]
    axes.barh(range(len(rows)), whole, color="0.7", label="whole token")
    for number, row in enumerate(rows):
        axes.annotate(f" {row['mean_ms']:.0f}", (row["mean_ms"], number), va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [row["system"] for row in rows])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    size = report["settings"]["memory_bytes"] / report["model"]["dense_bytes"]
    title = f"{report['model']['source']}, {size:.0%} of the weights in DRAM"
    axes.set(xlabel=f"ms a {step_name(report['settings'])}", title=title)
    axes.legend(fontsize=8)


def _sweep(axes: Any, rows: list[dict[str, Any]], report: dict[str, Any]) -> None:
    """A bar for every budget (paper: figure 7); a budget that did not do has a place and no bar."""
    _stack(lambda height, bottom, label: axes.bar(range(len(rows)), height, bottom=bottom, label=label, width=0.6), rows)
    for number, row in enumerate(rows):
        text, at = ("failed", 0.0) if "failed" in row else (f"{row['mean_ms']:.0f}", row["mean_ms"])
        axes.annotate(text, (number, at), ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(rows)), [row["system"].removeprefix("flash ") for row in rows])
    axes.margins(y=0.12)
    title = f"{report['model']['source']} over budgets"
    axes.set(xlabel="budget for weights in DRAM", ylabel=f"ms a {step_name(report['settings'])}", title=title)
    axes.legend(fontsize=8)


# --- for a page --------------------------------------------------------------------------------------------------------

_TEXT, _LINES = "#010203", "#040506"  # stand for the page's own colours, light or dark
_ON_A_PAGE = {
    "svg.fonttype": "none", "text.color": _TEXT, "axes.labelcolor": _TEXT, "xtick.color": _TEXT, "ytick.color": _TEXT,
    "axes.edgecolor": _LINES, "grid.color": _LINES, "figure.facecolor": "none", "axes.facecolor": "none",
    "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 0, "font.size": 10.0,
}  # fmt: skip
_COLOURS = ("#ef8a2c", "#9a86e0", "#22a699", "#4a8fe0", "#8d99ab", "#d95f83", "#7fb43a", "#c9a227")


def bench_drawings(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Titles and drawings of a bench report, as SVG that a page can hold: in its fonts and in its colours for text and lines.

    Args:
        report: from `hf_flash.bench.run.bench`.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    done = [row for row in report["rows"] if "failed" not in row]
    systems = [row for row in done if not row["sweep"]]
    sweep = sorted((row for row in report["rows"] if row["sweep"]), key=lambda row: row["memory_bytes"])
    for title, draw, rows, height in (
        ("Where the time of a token goes", _systems, systems, 1.3 + 0.4 * len(systems)),
        ("Over budgets", _sweep, sweep, 3.6),
        ("Token by token", _timeline, done, 3.4),
        ("Memory", _memory, done, 1.3 + 0.4 * len(done)),
        ("The disk, as it was in this run", _disk, done, 3.6),
    ):
        if rows:
            yield title, _on_a_page(title, draw, rows, report, height)


def _on_a_page(title: str, draw: Any, rows: list[dict[str, Any]], report: dict[str, Any], height: float) -> str:
    figure = _figure(height, 9.2)
    import matplotlib
    from cycler import cycler

    cycle = cycler(linestyle=["-", "--", ":"]) * cycler(color=_COLOURS)
    with matplotlib.rc_context(_ON_A_PAGE | {"axes.prop_cycle": cycle, "svg.hashsalt": title}), io.StringIO() as file:
        figure.set_facecolor("none")
        axes = figure.subplots()
        draw(axes, rows, report)
        axes.set_title("")  # the page has it
        axes.grid(alpha=0.6, linewidth=0.6, axis="x" if draw in (_systems, _memory) else "y")
        axes.set_axisbelow(True)
        figure.savefig(file, format="svg", metadata={"Date": None})
        text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r"(font: [^;\"]*?px) [^;\"]*", r"\1 inherit", text)
    start, end = text.split(">", 1)
    start = re.sub(r' (width|height)="[^"]*"', "", start) + f' role="img" aria-label="{title}">'
    return start + end.replace(_TEXT, "currentColor").replace(_LINES, "var(--lines)")


def _timeline(axes: Any, rows: list[dict[str, Any]], report: dict[str, Any]) -> None:
    """Every decoded token's time, a line for every system."""
    for row in rows:
        numbers = range(1, len(row["token_ms"]) + 1)
        axes.plot(numbers, row["token_ms"], marker=".", linewidth=1.2, markersize=4, label=row["system"])
    axes.set(xlabel="decoded token", ylabel="ms", yscale="log")
    _plain_numbers(axes)
    _legend_above(axes)


def _plain_numbers(axes: Any) -> None:
    """10 and 50 on a logarithmic axis, for people."""
    from matplotlib.ticker import LogLocator

    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()


def _legend_above(axes: Any) -> None:
    axes.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=6)


def _memory(axes: Any, rows: list[dict[str, Any]], report: dict[str, Any]) -> None:
    """Anonymous memory at its most, beside the cap: the page cache may be dropped, this may not."""
    held = [(row["peak_anonymous_bytes"] or 0) / 1e6 for row in rows]
    axes.barh(range(len(rows)), held, color=_COLOURS[3], label="anonymous memory of the process, at its most")
    caps = [(number, row["cap_bytes"] / 1e6) for number, row in enumerate(rows) if row["cap_bytes"]]
    for number, cap in caps:
        axes.plot(
            [cap, cap], [number - 0.42, number + 0.42], color=_COLOURS[5], label="its cap" if number == caps[0][0] else None
        )
    for number, (row, size) in enumerate(zip(rows, held, strict=True)):
        axes.annotate(f" {format_bytes(row['peak_anonymous_bytes'] or 0)}", (size, number), va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [row["system"] for row in rows])
    axes.invert_yaxis()
    axes.margins(x=0.14)
    axes.set(xlabel="MB")
    _legend_above(axes)


def _disk(axes: Any, rows: list[dict[str, Any]], report: dict[str, Any]) -> None:
    """The curve over size and depth, and where the rows of hf_flash were on it."""
    random = [point for point in report["disk"] if point["pattern"] == "random"]
    for depth in sorted({point["depth"] for point in random}):
        curve = sorted((point["size"], point["gb_per_s"]) for point in random if point["depth"] == depth)
        axes.plot(*zip(*curve, strict=True), marker=".", label=f"{depth} at a time")
    direct = [row for row in rows if "stats" in row and row["stats"]["reader"] == DIRECT and row["read_gb_per_s"]]
    for row in direct:
        axes.plot(row["run_bytes"], row["read_gb_per_s"], "D", color=_COLOURS[5])
        axes.annotate(f"  {row['system']}", (row["run_bytes"], row["read_gb_per_s"]), fontsize=8, va="center")
    sizes = sorted({point["size"] for point in random})
    axes.set(xlabel="bytes a read", ylabel="GB/s", xscale="log", yscale="log")
    axes.set_xticks(sizes, [format_bytes(size) for size in sizes])
    _plain_numbers(axes)
    _legend_above(axes)
