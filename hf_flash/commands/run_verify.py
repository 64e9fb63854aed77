"""`hf-flash verify`: repack, calibrate and evaluate a model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from hf_flash.commands import run_eval
from hf_flash.commands.arguments import WIKITEXT, positive, tell
from hf_flash.errors import ConfigError

_TRAIN_TEXT: Final = f"{WIKITEXT}:train"
_TEST_TEXT: Final = f"{WIKITEXT}:test"
_TASKS: Final = "arc_easy,arc_challenge,hellaswag"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hf-flash verify`."""
    add = parser.add_argument
    add("model", help="folder or Hub repository of a plain checkpoint")
    add("folder", nargs="?", help="where to repack it to, or where it was (default: MODEL-flash here)")
    add("--calibration-text", default=_TRAIN_TEXT, metavar="TEXT", help=f"to train on (default {_TRAIN_TEXT})")
    add("--samples", type=positive, default=256, metavar="N", help="windows to train on (default 256)")
    add("--with-stock", action="store_true", help="run the tasks on the stock model too; needs the memory for it")
    run_eval.add_evaluation_arguments(parser, text=_TEST_TEXT, tasks=_TASKS)


def run(args: argparse.Namespace) -> int:
    """`hf-flash verify`. Returns the exit code. What an earlier run has finished is not done again."""
    from hf_flash.calibration.job import calibrate
    from hf_flash.calibration.text import check_text
    from hf_flash.commands.calibration_table import describe
    from hf_flash.packing.expert_folder import refuse_mixture
    from hf_flash.packing.repacking import repack
    from hf_flash.store.checkpoint import resolve_folder
    from hf_flash.store.layout import FlashStore

    folder = Path(args.folder or f"{Path(args.model).name}-flash")
    refuse_mixture(folder if folder.exists() else resolve_folder(args.model, config_only=True), "verify")
    store = FlashStore.open_folder(folder) if folder.exists() else None
    if store is not None:
        _check_source(store.metadata["source"], args.model, folder)
    tasks = run_eval.checked_tasks(args)
    if store is None or store.calibration is None:
        check_text(args.calibration_text)
        if store is None:
            repack(args.model, folder)
        report = calibrate(
            folder, args.calibration_text, samples=args.samples, memory_budget=args.memory_budget, context=args.context,
        )  # fmt: skip
        tell(args, describe(report))
        tell(args, "")
    args.folder, args.stock = folder, args.model if args.with_stock else None
    return run_eval.evaluate_and_report(args, tasks)


def _check_source(repacked: str, model: str, folder: Path) -> None:
    """Refuse a folder that another model was repacked into."""
    wanted = Path(model).resolve().name if Path(model).is_dir() else model
    if repacked != wanted:
        raise ConfigError(
            "the folder was repacked from another model",
            where=folder,
            expected=wanted,
            got=repacked,
            hint="name another FOLDER",
        )
