"""Drawings with matplotlib: what all of them share, and those of an evaluation report (evaluation/compare.py).

matplotlib comes with the `plots` extra and is imported when something is drawn. A report is a plain dictionary, so that
drawings can be made of reports that were saved. Those of a bench report are in drawings.py.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np

from hf_flash.base.installing import with_extra
from hf_flash.errors import ConfigError

COLOURS: Final = ("#ef8a2c", "#9a86e0", "#22a699", "#4a8fe0", "#6f8098", "#d95f83", "#7fb43a", "#c9a227")
TEXT, LINES = "#1c2130", "#d9dde5"
_STYLE: Final = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left", "axes.titlesize": 10.0,
    "axes.titleweight": "bold", "axes.axisbelow": True, "font.size": 9.5, "legend.frameon": False, "legend.fontsize": 8.5,
    "legend.title_fontsize": 8.5, "lines.linewidth": 1.4, "svg.fonttype": "none",
}  # fmt: skip


def check_installed() -> None:
    """Raise now, not after hours, if there is no matplotlib."""
    new_figure(1.0)


def new_figure(height: float, width: float = 9.2) -> Any:
    """An empty figure, in inches.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise ConfigError("plots need matplotlib", hint=with_extra("plots")) from error
    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1, hspace=0.06))


@contextmanager
def style(name: str, text: str = TEXT, lines: str = LINES, page: str = "#ffffff") -> Iterator[None]:
    """What drawings look like while they are made and written.

    Args:
        name: of the drawing. The same name and figures give the same file.
        text: the colour of text. lines: of axes and grid. page: of what is behind it, or "none".
    """
    check_installed()
    import matplotlib
    from cycler import cycler

    colours = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), text)
    colours |= {"axes.edgecolor": lines, "grid.color": lines, "figure.facecolor": page, "axes.facecolor": "none"}
    cycle = cycler(linestyle=["-", "--", ":"]) * cycler(color=COLOURS)
    with matplotlib.rc_context({**_STYLE, **colours, "axes.prop_cycle": cycle, "svg.hashsalt": name}):
        yield


def text_colour() -> Any:
    """Of the style that drawings are made in."""
    import matplotlib

    return matplotlib.rcParams["text.color"]


def write(figure: Any, path: Path) -> None:
    """Write a figure; the file's suffix says the format. The same figure gives the same SVG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def legend_beside(figure: Any, title: str | None = None) -> None:
    """One legend for all axes of a figure, to the right of the first: it overlaps nothing."""
    found: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.axes[0].legend(
        found.values(), [wrapped(label, 26) for label in found], title=title, alignment="left",
        loc="upper left", bbox_to_anchor=(1.02, 1.0), borderaxespad=0.0,
    )  # fmt: skip


def wrapped(text: str, width: int) -> str:
    """Text in lines of so many letters."""
    return "\n".join(textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)) or text


# --- of an evaluation ----------------------------------------------------------------------------------------------------


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
        paths.append(folder / f"{name}.svg")
        with style(name):
            write(evaluation_figure(report, draw), paths[-1])
    return paths


def evaluation_figure(report: dict[str, Any], draw: Any) -> Any:
    """One drawing of an evaluation, its legend beside it and the model above it."""
    figure = new_figure(3.8)
    axes = figure.subplots()
    draw(axes, report)
    axes.grid(alpha=0.8, linewidth=0.6)
    legend_beside(figure)
    axes.set_title(f"{axes.get_title('left')}\n{Path(report['model']['source']).name}")
    return figure


def _sparse(report: dict[str, Any]) -> dict[str, Any]:
    return {name: found for name, found in report["predictors"].items() if found["bytes"]}


def _whole_numbers(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))


def _sparsity(axes: Any, report: dict[str, Any]) -> None:
    """Share of the neurons that are not used, by layer: truly, and as predicted."""
    d_ff = report["model"]["d_ff"]
    active = np.array([layer["active"] for layer in report["predictors"]["none"]["layers"]])
    axes.plot(100 * (1 - active / d_ff), ".-", color=text_colour(), label="zero after ReLU: need not be read")
    for number, (name, found) in enumerate(_sparse(report).items()):
        selected = active * [layer["selected"] for layer in found["layers"]]
        axes.plot(100 * (1 - selected / d_ff), ".--", color=COLOURS[number % len(COLOURS)], label=f"not read by {name}")
    _whole_numbers(axes.xaxis)
    axes.set(xlabel="layer, from the first", ylabel="% of the layer's neurons")
    axes.set_title("How many neurons a token leaves out, by layer")


def _preactivations(axes: Any, report: dict[str, Any]) -> None:
    """Where predicted neurons lie, and where those lie that were missed (paper: figure 3a)."""
    edges = np.array(report["bins"])
    middle = (edges[1:] + edges[:-1]) / 2
    for number, (name, found) in enumerate(_sparse(report).items()):
        total, colour = max(1, sum(found["predicted_at"])), COLOURS[number % len(COLOURS)]
        axes.step(middle, 100 * np.array(found["predicted_at"]) / total, color=colour, label=f"{name}: predicted")
        axes.fill_between(
            middle, 100 * np.array(found["missed_at"]) / total, step="pre", alpha=0.5, color=colour,
            label=f"{name}: missed, {100 * found['missed']:.2f} % of the active",
        )  # fmt: skip
    axes.axvline(0, color=text_colour(), linewidth=0.7)
    axes.set(yscale="log", ylim=(1e-4, 100), ylabel="% of the predicted, by tenths of a deviation")
    axes.set_xlabel("value before ReLU, in standard deviations of its layer; right of 0: active")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_title("Which neurons are predicted, and which are missed")


def _aggregated_use(axes: Any, report: dict[str, Any]) -> None:
    """How much of a layer the last k tokens used (paper: figure 4a)."""
    d_ff = report["model"]["d_ff"]
    for number, (name, found) in enumerate(_sparse(report).items()):
        use = 100 * np.array(found["use"]) / d_ff
        axes.plot(range(1, len(use) + 1), use, ".--", color=COLOURS[number % len(COLOURS)], label=f"read by {name}")
    use = 100 * np.array(report["use"]) / d_ff
    axes.plot(range(1, len(use) + 1), use, ".-", color=text_colour(), label="truly used")
    _whole_numbers(axes.xaxis)
    axes.set_ylim(bottom=0)
    axes.set(xlabel="tokens in a row", ylabel="% of a layer's neurons")
    axes.set_title("How much of a layer several tokens use between them")
