"""`hf-flash bench`: compare decode speed with stock transformers and accelerate, under one memory cap."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from hf_flash.bench.systems import (
    GROUPS,
    SYSTEMS,
    TINY,
    USUAL,
    parse_arguments,
    parse_calls,
    parse_sweep,
    parse_system,
)
from hf_flash.commands.arguments import (
    add_json,
    argument_type,
    at_least_two,
    file_target,
    finish,
    positive,
    size,
    tell,
    write_target,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hf-flash bench`."""
    add = parser.add_argument
    add("model", nargs="?", help="a repacked checkpoint, or a mixture of experts")
    add("--plain", type=Path, metavar="FOLDER", help="the same model as a plain checkpoint, for the others")
    add("--preset", choices=["tiny"], help="a random model made for the purpose, in seconds, instead of MODEL")
    names = ", ".join([*SYSTEMS, *GROUPS])
    add("--systems", metavar="A,B", help=f"what to compare, of: {names.replace('%', '%%')}")
    add("--system", action="append", default=[], type=argument_type(parse_system), metavar='"NAME: ARG=VALUE"',
        help="a further row of hf_flash with arguments of FlashOffloadConfig; may be repeated")  # fmt: skip
    add("--flash-arg", action="append", default=[], type=argument_type(parse_arguments), metavar="ARG=VALUE",
        help="an argument of FlashOffloadConfig for all rows of hf_flash; may be repeated")  # fmt: skip
    add("--sweep", default=[], type=argument_type(parse_sweep), metavar="40,50,60:quantized",
        help="hf_flash at each of these budgets: percent or sizes, and which predictor")  # fmt: skip
    add("--tokens", type=at_least_two, metavar="N", help="to generate; slow systems stop at 8 (default 64)")
    add("--prompt-tokens", type=positive, metavar="N", help="of each random prompt (default 16)")
    add("--batch-size", type=positive, metavar="N", help="sequences at once (default 1)")
    add("--calls", default=[], type=argument_type(parse_calls), metavar="8x1,1x4,1x256",
        help="time calls, too: rows x tokens, of batches, drafts and prompts")  # fmt: skip
    add("--forced", metavar="SEED|FILE", type=_forced,
        help="tokens that follow the prompt in all systems, and of --calls: random ones, or a JSON list of ids")  # fmt: skip
    add("--memory", "--memory-budget", metavar="SIZE", help='weights in DRAM: a size, or a share of the model (default "50%%")')
    add("--headroom", type=size, metavar="SIZE", help='what the cap allows beyond it (default "0.6GB")')
    add("--repeats", type=positive, metavar="N", help="rounds; a row shows its median one (default 1)")
    add("--timeout", type=positive, metavar="SECONDS", help="for each system (default 1800)")
    add("--cap", action=argparse.BooleanOptionalAction, default=True, help="whether to cap memory (default yes)")
    add("--device", metavar="DEVICE", help="where all systems compute, such as cuda:0; --memory is of its memory then")
    add("--check", action="store_true", help="fail if flash generates other tokens than without a cap")
    add("--note", action="append", default=[], metavar="TEXT", help="a line for the report; may be repeated")
    add_json(parser)
    add("--plot", type=Path, metavar="FILE.svg", help="draw where the time of a token goes, and over budgets")
    add("--html", type=file_target, metavar="FILE", help="write a page with all figures and drawings")


def run(args: argparse.Namespace) -> int:
    """`hf-flash bench`. Returns the exit code: 1 if all rows of hf_flash failed, or `--check` finds other tokens."""
    from hf_flash.bench.drawings import plot_bench
    from hf_flash.bench.page import page
    from hf_flash.bench.plots import check_installed
    from hf_flash.bench.report import describe
    from hf_flash.bench.run import bench, bench_tiny

    if (args.model is None) == (args.preset is None) or (args.preset and args.plain):
        args.wrong_usage("name either MODEL, a repacked checkpoint or a mixture of experts, or --preset tiny")
    if args.plot or args.html:
        check_installed()
    settings = _settings(args)
    report = bench_tiny(**settings) if args.preset else bench(args.model, plain=args.plain, **settings)
    tell(args, describe(report))
    finish(args, report)
    if args.plot:
        plot_bench(report, args.plot)
    if args.html:
        write_target(args.html, page(report))
    ours = [row for row in report["rows"] if row["kind"] == "flash"]
    nothing_worked = bool(ours) and all("failed" in row for row in ours)
    return 0 if report.get("same_tokens", True) and not nothing_worked else 1


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """The keywords of [`bench`] that the command line names. What it leaves out has defaults there."""
    named = "tokens", "prompt_tokens", "batch_size", "forced", "memory", "headroom", "repeats", "timeout", "device"
    settings = {name: value for name in named if (value := getattr(args, name)) is not None}
    settings |= {"calls": args.calls, "cap": args.cap, "check": args.check, "notes": args.note}
    settings["arguments"] = {name: value for group in args.flash_arg for name, value in group.items()}
    names = args.systems and [name.strip() for name in args.systems.split(",") if name.strip()]
    usual = [] if args.sweep else TINY if args.preset else [USUAL]
    return settings | {"systems": [*(names or usual), *args.system, *args.sweep]}


def _forced(text: str) -> int | list[int]:
    """`"3"`, a seed; or the file of a JSON list of token ids."""
    if text.isdecimal():
        return int(text)
    try:
        found = json.loads(Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"neither a number nor a JSON file: {error}") from error
    if not isinstance(found, list) or not all(type(token) is int and token >= 0 for token in found):
        raise argparse.ArgumentTypeError("not a JSON list of token ids")
    return found
