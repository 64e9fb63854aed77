"""Plots of an evaluation report (evaluate.py), with matplotlib from the `eval` extra."""

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
    try:
        import matplotlib.figure
    except ImportError as error:
        raise ConfigError("plots need matplotlib", hint="pip install hf-flash[eval]") from error
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, draw in (("sparsity", _sparsity), ("preactivations", _preactivations), ("aggregated-use", _aggregated_use)):
        figure = matplotlib.figure.Figure(figsize=(6.4, 3.8), layout="constrained")
        draw(figure.subplots(), report)
        paths.append(folder / f"{name}.svg")
        figure.savefig(paths[-1], metadata={"Date": None})
    return paths


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
