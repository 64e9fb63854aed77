#!/usr/bin/env python3
"""The frontier of predictors on a model: bytes against perplexity, reads and time. Writes JSON and the plot of the docs.

    scripts/predictor_frontier.py MODEL --train FILE --test FILE [FILE ...] --out FOLDER

Every point is a real run: the model is repacked in each format, calibrated at each rank on the training text, and evaluated on
each test text. Takes some ten minutes for the shipped model on two cores.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import matplotlib.figure
import torch

import hf_flash
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


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """Bytes against the change in perplexity, and against the neurons that are read for nothing."""
    figure = matplotlib.figure.Figure(figsize=(9, 3.8), layout="constrained")
    first = found[0]["text"]
    for axes, key, label in zip(
        figure.subplots(1, 2),
        ("change", "selected"),
        ("change in perplexity, %", "predicted neurons per active one"),
        strict=True,
    ):
        groups = {"lowrank, rank by layer": "k*", "lowrank": "C0o-", "measured": "C2s-", "assumed": "C1^-"}
        for group, style in groups.items():
            rows = sorted(
                (r for r in found if r["text"] == first and group_of(r["predictor"]) == group), key=lambda r: r["bytes"]
            )
            scale = 100 if key == "change" else 1
            axes.plot([r["bytes"] / 1024 for r in rows], [scale * r[key] for r in rows], style, label=legend(group))
            for row in rows:
                axes.annotate(row["predictor"].split(",")[0].removeprefix("lowrank "), (row["bytes"] / 1024, scale * row[key]),
                              fontsize=7, xytext=(3, 3), textcoords="offset points")  # fmt: skip
        axes.set(xlabel="predictors of all layers, KiB", ylabel=label, yscale="log")
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    figure.suptitle(f"Predictors on the shipped model, {first}", fontsize=10)
    figure.savefig(path, metadata={"Date": None})


def group_of(name: str) -> str:
    """Which curve a predictor belongs to."""
    if name.startswith("lowrank"):
        return name if "," in name else "lowrank"
    return "measured" if name.endswith("measured margin") else "assumed"


def legend(group: str) -> str:
    """What the plot calls a curve."""
    return {"lowrank": "low rank, the same in all layers", "measured": "quantized, measured margin",
            "assumed": "quantized, assumed margin"}.get(group, "low rank, chosen by layer")  # fmt: skip


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
