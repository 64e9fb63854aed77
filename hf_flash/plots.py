"""Plots of an evaluation report (evaluate.py) and of a bench report (bench.py), with matplotlib from the `plots` extra."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .errors import ConfigError


def plot(report: dict[str, Any], folder: Path) -> list[Path]:
    """Draw a report: sparsity by layer, pre-activations of predicted and missed neurons, aggregated use.

    Args:
        report: from [`hf_flash.evaluate`].
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


def _figure(height: float) -> Any:
    try:
        import matplotlib.figure
    except ImportError as error:
        raise ConfigError("plots need matplotlib", hint='pip install "hf-flash[plots]"') from error
    return matplotlib.figure.Figure(figsize=(6.4, height), layout="constrained")


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
        report: from `hf_flash.bench.bench`.
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
    axes.set(xlabel="ms per decoded token", title=f"{report['model']['source']}, {size:.0%} of the weights in DRAM")
    axes.legend(fontsize=8)


def _sweep(axes: Any, rows: list[dict[str, Any]], report: dict[str, Any]) -> None:
    """A bar for every budget (paper: figure 7); a budget that did not do has a place and no bar."""
    _stack(lambda height, bottom, label: axes.bar(range(len(rows)), height, bottom=bottom, label=label, width=0.6), rows)
    for number, row in enumerate(rows):
        text, at = ("failed", 0.0) if "failed" in row else (f"{row['mean_ms']:.0f}", row["mean_ms"])
        axes.annotate(text, (number, at), ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(rows)), [row["system"].removeprefix("flash ") for row in rows])
    axes.margins(y=0.12)
    axes.set(
        xlabel="budget for weights in DRAM", ylabel="ms per decoded token", title=f"{report['model']['source']} over budgets"
    )
    axes.legend(fontsize=8)
