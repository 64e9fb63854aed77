"""`hf-flash calibrate`"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from hf_flash.base.sizes import format_bytes, parse_bytes
from hf_flash.calibration.job import (
    calibrate,
)
from hf_flash.errors import HfFlashError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hf-flash calibrate` and `python -m hf_flash.calibration`."""
    parser.add_argument("folder", help="a repacked checkpoint, with its tokenizer")
    parser.add_argument("--text", required=True, help="a UTF-8 file, or a dataset as name[:config[:split]]")
    parser.add_argument("--samples", type=int, default=256, metavar="N", help="windows of text (default 256)")
    parser.add_argument("--context", type=int, metavar="N", help="tokens in a window (default 256)")
    parser.add_argument("--recall", type=float, default=0.96, metavar="X", help="active neurons to find (default 0.96)")
    parser.add_argument("--extra", type=float, default=0.07, metavar="X", help="inactive neurons allowed (default 0.07)")
    parser.add_argument("--rank", type=int, metavar="N", help="this rank in every layer; default: the smallest that will do")
    parser.add_argument("--max-rank", type=int, metavar="N", help="largest rank to try")
    parser.add_argument("--epochs", type=int, default=4, metavar="N", help="passes over the text (default 4)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of text and training (default 0)")
    parser.add_argument("--placement", action=argparse.BooleanOptionalAction, default=True,
                        help="whether neurons that are used together become neighbours on flash (default yes)")  # fmt: skip
    parser.add_argument("--memory-budget", metavar="SIZE", help='weights and training in DRAM at most, such as "6GiB"')


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Calibrate as the command line says; returns the report."""
    keywords = {k: v for k, v in vars(args).items() if k not in ("folder", "text", "run", "memory_budget", "json")}
    budget = None if args.memory_budget is None else parse_bytes(args.memory_budget)
    return calibrate(args.folder, args.text, memory_budget=budget, **keywords)


def describe(report: dict[str, Any]) -> str:
    """A calibration report as a table, one layer a row."""
    rows = ["layer   active   rank   recall    extra  untrained  predicted/active       bytes   missing  reads, placed"]
    for index, layer in enumerate(report["layers"]):
        low, reads = layer["lowrank"], layer["reads"]
        rows.append(
            f"{index:5d} {layer['active']:8.1f} {low['rank']:6d} {low['recall']:8.2%} {low['extra']:8.2%} "
            f"{low['extra_untrained']:10.2%} {low['selected']:17.2f} {format_bytes(low['nbytes']):>11s} "
            f"{reads['missing']:9.1f} {reads['before']:6.1f} {reads['after']:7.1f}"
        )
    reached = "in every layer" if report["reached"] else "NOT in every layer"
    rows.append(f"\nmeasured on {report['text']['held_out']} held-out tokens; targets reached {reached}")
    rows.append(f"the folder's predictor is now: {report['default']}")
    rows.append(f"neurons placed: {describe_placement(report)}")
    return "\n".join(rows)


def describe_placement(report: dict[str, Any]) -> str:
    """What placing neurons did to reading, in a line."""
    layers = [layer["reads"] for layer in report["layers"] if "reads" in layer]
    placed = [reads["worth"] and report["placement"] for reads in layers]
    if not any(placed):
        return "none"
    missing, before = (sum(reads[name] for reads in layers) for name in ("missing", "before"))
    after = sum(reads["after" if done else "before"] for reads, done in zip(layers, placed, strict=True))
    return (
        f"{sum(placed)} of {len(layers)} layers; {after:.1f} reads a token instead of {before:.1f}, "
        f"{missing / after:.3f} neurons a read instead of {missing / before:.3f}"
    )


def main() -> int:
    """`python -m hf_flash.calibration`, which `accelerate launch -m` runs in several processes."""
    parser = argparse.ArgumentParser(prog="python -m hf_flash.calibration", description=__doc__.splitlines()[0])
    add_arguments(parser)
    try:
        table = describe(run(parser.parse_args()))
    except HfFlashError as error:
        print(f"hf-flash: {error}", file=sys.stderr)  # noqa: T201
        return 1
    if int(os.environ.get("RANK", "0")) == 0:
        print(table)  # noqa: T201
    return 0
