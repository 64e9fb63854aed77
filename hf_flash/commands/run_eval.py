"""`hf-flash eval`: compare predictors with the dense model, on text and on tasks; of a mixture of experts, measure it."""

from __future__ import annotations

import argparse
from pathlib import Path

from hf_flash.commands.arguments import DTYPES, add_json, finish, positive, size, tell
from hf_flash.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hf-flash eval`."""
    parser.add_argument("folder", help="a repacked checkpoint or a mixture of experts, with its tokenizer")
    parser.add_argument("--stock", metavar="MODEL", help="plain checkpoint to run the tasks with, too; needs the memory for it")
    add_evaluation_arguments(parser)


def add_evaluation_arguments(parser: argparse.ArgumentParser, text: str | None = None, tasks: str = "") -> None:
    """The arguments that `hf-flash eval` shares with `hf-flash verify`, which has defaults for text and tasks."""

    def default(value: str) -> str:
        return f" (default {value})" if value else ""

    add = parser.add_argument
    about = "a UTF-8 file, or a dataset as name[:config[:split]]" + default(text or "")
    add("--text", required=text is None, default=text, help=about)
    add("--tokens", type=positive, default=40_960, metavar="N", help="of the text (default 40960)")
    add("--context", type=positive, metavar="N", help="tokens in a window (default 256)")
    add("--dtype", choices=DTYPES, default="auto", help="of compute")
    add("--memory-budget", type=size, metavar="SIZE", help='weights in DRAM at most, such as "6GiB"')
    add("--tasks", default=tasks, metavar="A,B", help="lm-evaluation-harness tasks to run" + default(tasks))
    add("--include-path", metavar="DIR", help="a folder with further tasks")
    add("--limit", type=positive, metavar="N", help="questions per task")
    add_json(parser)
    add("--plots", type=Path, metavar="DIR", help="draw them there")


def run(args: argparse.Namespace) -> int:
    """`hf-flash eval`. Returns the exit code."""
    from hf_flash.bench.plots import check_installed, plot
    from hf_flash.evaluation.compare import describe, evaluate
    from hf_flash.evaluation.tasks import describe_tasks, evaluate_tasks
    from hf_flash.packing.expert_folder import mixture_in

    if args.plots:
        check_installed()
        if mixture_in(Path(args.folder)) is not None:
            raise ConfigError("a mixture of experts has no predictors to draw", where="--plots", hint="leave it out")
    report = evaluate(
        args.folder, args.text, tokens=args.tokens, context=args.context, memory_budget=args.memory_budget, dtype=args.dtype,
    )  # fmt: skip
    tell(args, describe(report))
    tasks = [task for task in args.tasks.split(",") if task]
    if tasks:
        report["tasks"] = evaluate_tasks(
            args.folder, tasks, stock=args.stock, limit=args.limit, include_path=args.include_path, dtype=args.dtype,
            memory_budget=args.memory_budget,
        )  # fmt: skip
        tell(args, "\n" + describe_tasks(report["tasks"]))
    finish(args, report)
    if args.plots:
        tell(args, "\n".join(map(str, plot(report, args.plots))))
    return 0
