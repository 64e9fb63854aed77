"""`hf-flash calibrate`: train predictors on text and measure what the neurons do, or the routers of a mixture."""

from __future__ import annotations

import argparse
from typing import Any

from hf_flash.base.sizes import parse_bytes
from hf_flash.commands.arguments import add_json, finish, tell


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hf-flash calibrate`."""
    add_calibration_arguments(parser)
    add_json(parser)


def add_calibration_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that `hf-flash calibrate` shares with `python -m hf_flash.calibration`."""
    add = parser.add_argument
    add("folder", help="a repacked checkpoint, with its tokenizer; of a mixture its own, or a Hub repository")
    add("--text", required=True, help="a UTF-8 file, or a dataset as name[:config[:split]]")
    add("--samples", type=int, metavar="N", help="windows of text (default 256; for a mixture 16)")
    add("--context", type=int, metavar="N", help="tokens in a window (default 256)")
    add("--recall", type=float, default=0.96, metavar="X", help="active neurons to find (default 0.96)")
    add("--extra", type=float, default=0.07, metavar="X", help="inactive neurons allowed (default 0.07)")
    add("--rank", type=int, metavar="N", help="this rank in every layer; default: the smallest that will do")
    add("--max-rank", type=int, metavar="N", help="largest rank to try")
    add("--epochs", type=int, default=4, metavar="N", help="passes over the text (default 4)")
    add("--seed", type=int, default=0, metavar="N", help="of text and training (default 0)")
    add("--placement", action=argparse.BooleanOptionalAction, default=True,
        help="whether neurons that are used together become neighbours on flash (default yes)")  # fmt: skip
    add("--memory-budget", metavar="SIZE", help='weights and training in DRAM at most, such as "6GiB"')


def run(args: argparse.Namespace) -> int:
    """`hf-flash calibrate`. Returns the exit code."""
    from hf_flash.commands.calibration_table import describe

    report = calibration_report(args)
    tell(args, describe(report))
    finish(args, report)
    return 0


def calibration_report(args: argparse.Namespace) -> dict[str, Any]:
    """Calibrate with the arguments of the command line, and return the report."""
    from hf_flash.calibration.job import calibrate

    return calibrate(
        args.folder, args.text, samples=args.samples, context=args.context, recall=args.recall, extra=args.extra,
        rank=args.rank, max_rank=args.max_rank, epochs=args.epochs, seed=args.seed, placement=args.placement,
        memory_budget=None if args.memory_budget is None else parse_bytes(args.memory_budget),
    )  # fmt: skip
