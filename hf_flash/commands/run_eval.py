"""`hf-flash eval`: compare predictors with the dense model, on text and on tasks; of a mixture of experts, measure it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from hf_flash.commands.arguments import DTYPES, add_json, finish, positive, size, tell
from hf_flash.errors import ConfigError

if TYPE_CHECKING:
    from hf_flash.evaluation.tasks import TaskRunner


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
    return evaluate_and_report(args, checked_tasks(args))


def checked_tasks(args: argparse.Namespace) -> TaskRunner | None:
    """Check what the arguments name before anything takes long: packages, tasks and the text. Returns what runs the tasks.

    Raises:
        ConfigError: something is not there.
    """
    from hf_flash.bench.plots import check_installed
    from hf_flash.calibration.text import check_text
    from hf_flash.evaluation.tasks import TaskRunner

    tasks = [task for task in args.tasks.split(",") if task]
    runner = TaskRunner(tasks, limit=args.limit, include_path=args.include_path) if tasks else None
    if args.plots:
        check_installed()
    check_text(args.text)
    return runner


def evaluate_and_report(args: argparse.Namespace, tasks: TaskRunner | None) -> int:
    """Evaluate, print and write. Figures and plots are written even if the tasks fail. Returns the exit code."""
    from hf_flash.base.tables import section
    from hf_flash.bench.plots import plot
    from hf_flash.evaluation.compare import describe, evaluate
    from hf_flash.evaluation.tasks import describe_tasks, evaluate_tasks
    from hf_flash.packing.expert_folder import mixture_in

    if args.plots and mixture_in(Path(args.folder)) is not None:
        raise ConfigError("a mixture of experts has no predictors to draw", where="--plots", hint="leave it out")
    report = evaluate(
        args.folder, args.text, tokens=args.tokens, context=args.context, memory_budget=args.memory_budget, dtype=args.dtype,
    )  # fmt: skip
    tell(args, describe(report))
    try:
        if args.plots:
            tell(args, "\n".join(map(str, plot(report, args.plots))))
        if tasks is not None:
            report["tasks"] = evaluate_tasks(
                args.folder, tasks, stock=args.stock, dtype=args.dtype, memory_budget=args.memory_budget
            )
            tell(args, section("Tasks", describe_tasks(report["tasks"])))
    finally:
        finish(args, report)
    return 0
