#!/usr/bin/env python3
"""The charts of the documentation, drawn from the figures that its tables are of: docs/data/*.json.

    scripts/draw_docs.py [--into FOLDER]

`decode.svg` is drawn as `hf-flash bench --plot` draws it, `predictors.svg` as `scripts/predictor_frontier.py` does. Tests hold
the tables to the same files, and the charts to what this makes of them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from types import ModuleType

from hf_flash.bench.drawings import plot_bench

ROOT = Path(__file__).resolve().parent.parent


def draw_all(into: Path) -> None:
    """Every chart, into a folder."""
    data = ROOT / "docs" / "data"
    plot_bench(json.loads((data / "decode.json").read_text(encoding="utf-8")), into / "decode.svg")
    predictors = json.loads((data / "predictors.json").read_text(encoding="utf-8"))
    beside("predictor_frontier").draw(predictors["rows"], into / "predictors.svg")


def beside(name: str) -> ModuleType:
    """Another script of this folder as a module."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    if spec is None or spec.loader is None:
        raise ImportError(name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Parse, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--into", type=Path, default=ROOT / "docs", metavar="FOLDER", help="where the charts go (default docs)")
    draw_all(parser.parse_args().into)


if __name__ == "__main__":
    main()
