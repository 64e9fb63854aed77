#!/usr/bin/env python3
"""The frontier of predictors on a model: bytes against perplexity, reads and time. Writes JSON and the plot of the docs.

    scripts/predictor_frontier.py MODEL --train FILE --test FILE [FILE ...] --out FOLDER

Every point is a real run: the model is repacked in each format, calibrated at each rank on the training text, and evaluated on
each test text. Takes some ten minutes for the shipped model on two cores.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import torch

import hf_flash
from hf_flash.bench.plots import COLOURS, legend_beside, new_figure, style, write
from hf_flash.evaluation.compare import evaluate

RANKS = (32, 64, 128)
FORMATS = ({"predictor_bits": 4, "predictor_group_size": 64}, {"predictor_bits": 8})
KEEP = ("bytes", "share_of_model", "selected", "missed", "lost", "extra", "perplexity", "change", "predict_ms", "ms_per_token")


def points(model: Path, train: Path, tests: list[Path], arguments: dict[str, Any], tokens: int) -> list[dict[str, Any]]:
    """All predictors on all texts."""
    found = []
    with tempfile.TemporaryDirectory() as place:
        for number, fmt in enumerate(FORMATS):
            folder = hf_flash.repack(model, Path(place) / f"quantized-{number}", predictor="quantized", **fmt)
            automatic = fmt.get("predictor_group_size") == 64
            hf_flash.calibrate(folder, train, **({} if automatic else {"rank": 16}), **arguments)
            found += measure(folder, tests, tokens, lambda n, a=automatic: a or n != "lowrank", "lowrank, rank by layer")
        for rank in RANKS:
            folder = hf_flash.repack(model, Path(place) / f"rank-{rank}", predictor="none")
            hf_flash.calibrate(folder, train, rank=rank, **arguments)
            found += measure(folder, tests, tokens, lambda n: n == "lowrank", f"lowrank {rank}")
    return found


def measure(folder: Path, tests: list[Path], tokens: int, wanted: Any, name: str) -> list[dict[str, Any]]:
    """Evaluate one folder; low-rank predictors are called `name`."""
    found = []
    for test in tests:
        report = evaluate(folder, test, tokens=tokens, dtype=torch.float32)
        for key, figures in report["predictors"].items():
            if wanted(key) and key != "none":
                row = {"text": test.name, "predictor": name if key == "lowrank" else key, "dense": report["perplexity"]}
                found.append(row | {k: figures[k] for k in KEEP})
                print(json.dumps(found[-1]), flush=True)
    return found


MARKS = {  # a predictor of the frontier, as the drawing has it
    "int4-g64, assumed margin": ("int4, assumed margin (needs no data)", "^", COLOURS[0]),
    "int8, assumed margin": ("int8, assumed margin (needs no data)", "v", COLOURS[0]),
    "int4-g64, measured margin": ("int4, measured margin", "s", COLOURS[2]),
    "int8, measured margin": ("int8, measured margin", "D", COLOURS[2]),
    "lowrank 32": ("low rank 32 in all layers", "o", COLOURS[3]),
    "lowrank 64": ("low rank 64 in all layers", "h", COLOURS[3]),
    "lowrank 128": ("low rank 128 in all layers", "p", COLOURS[3]),
    "lowrank, rank by layer": ("low rank, chosen by layer", "*", COLOURS[5]),
}
PANELS = (  # heading, field, factor, ticks
    ("What it costs: change in perplexity, %", "change", 100, (0.00001, 0.0001, 0.001, 0.01, 0.1, 1)),
    ("What it reads: neurons for each one that is active", "selected", 1, (1, 1.5, 2, 3, 4, 5, 7)),
)


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """Bytes against the change in perplexity, and against the neurons that are read for nothing; of the first text."""
    with style("predictors"):
        write(frontier(found), path)


def frontier(found: list[dict[str, Any]]) -> Any:
    """The drawing. A predictor that changes nothing has no place on a logarithmic scale: it is left out there."""
    figure = new_figure(7.2)
    rows = [row for row in found if row["text"] == found[0]["text"]]
    for axes, (heading, key, factor, ticks) in zip(figure.subplots(2, 1, sharex=True), PANELS, strict=True):
        for kind, (label, mark, colour) in MARKS.items():
            for row in rows:
                if kind_of(row["predictor"]) == kind and row[key] > 0:
                    size = 14 if mark == "*" else 8
                    axes.plot(row["bytes"] / 1024, factor * row[key], mark, color=colour, markersize=size, label=label)
        axes.margins(0.08, 0.12)
        axes.set(yscale="log")
        low, high = axes.get_ylim()
        axes.set_yticks([tick for tick in ticks if low <= tick <= high])
        axes.yaxis.set_major_formatter("{x:.7g}")
        axes.minorticks_off()
        axes.grid(alpha=0.8, linewidth=0.6)
        axes.set_title(heading)
    axes.set_xlabel("memory for the predictors of all layers, KiB")
    legend_beside(figure, "predictor")
    title = f"Predictors on the shipped model (tiny-opt), text: {rows[0]['text']}\nlower is better, and so is further left"
    figure.suptitle(title, x=0.02, ha="left", fontsize=11)
    return figure


def kind_of(name: str) -> str:
    """Which mark a predictor has: a margin that was assumed is named with its size by `evaluate`."""
    return re.sub(r"margin [\d.]+$", "assumed margin", name)


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="plain checkpoint")
    parser.add_argument("--train", type=Path, required=True, help="text to calibrate on")
    parser.add_argument("--test", type=Path, nargs="+", required=True, help="texts to evaluate on; the first is drawn")
    parser.add_argument("--out", type=Path, required=True, help="folder for predictors.json and predictors.svg")
    parser.add_argument("--tokens", type=int, default=16_384, help="of each text")
    parser.add_argument("--samples", type=int, default=256, help="windows to calibrate on")
    parser.add_argument("--epochs", type=int, default=4, help="passes over them")
    args = parser.parse_args()
    found = points(args.model, args.train, args.test, {"samples": args.samples, "epochs": args.epochs}, args.tokens)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "predictors.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    draw(found, args.out / "predictors.svg")


if __name__ == "__main__":
    main()
