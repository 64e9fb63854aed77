"""`hf-flash repack`: write a checkpoint again with its FFN bundled for flash."""

from __future__ import annotations

import argparse
from typing import get_args

from hf_flash.commands.arguments import add_json, finish, tell
from hf_flash.config_arguments import ARGUMENTS, CopiedName, PredictorBits


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hf-flash repack`."""
    add = parser.add_argument
    add("source", help="folder or Hub repository of a plain checkpoint")
    add("target", help="folder to make")
    add("--predictor", choices=get_args(CopiedName), help="default: quantized for ReLU models")
    add("--predictor-bits", type=int, choices=get_args(PredictorBits),
        help=f"width of the quantized predictor (default {ARGUMENTS['predictor_bits'].default})")  # fmt: skip
    add("--predictor-group-size", type=int, metavar="N",
        help=f"weights that share a scale (default {ARGUMENTS['predictor_group_size'].default})")  # fmt: skip
    add("--revision", help="branch, tag or commit on the Hub")
    add("--subfolder", default="", help="of the repository or folder, where the checkpoint is")
    add("--local-files-only", action="store_true", help="do not contact the Hub")
    add("--delete-source", action="store_true",
        help="remove the source's weights from the Hub's cache, once compared with what was written")  # fmt: skip
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """`hf-flash repack`. Returns the exit code."""
    from hf_flash.base.tables import facts as as_table
    from hf_flash.commands.store_facts import facts, neuron_rows
    from hf_flash.packing.repacking import repack
    from hf_flash.store.layout import FlashStore

    target = repack(
        args.source, args.target, predictor=args.predictor, predictor_bits=args.predictor_bits,
        predictor_group_size=args.predictor_group_size, revision=args.revision, local_files_only=args.local_files_only,
        subfolder=args.subfolder, delete_source=args.delete_source,
    )  # fmt: skip
    found = facts(FlashStore.open_folder(target))
    tell(args, as_table(neuron_rows(found)))
    if args.delete_source:
        tell(args, "\nThe source's weights were found again in it, bit for bit, and removed from the Hub's cache.")
    tell(args, f"\nLoad it:  import hf_flash; pipeline('text-generation', model={str(target)!r})")
    finish(args, found)
    return 0
