"""`hf-flash restore`: the plain checkpoint of a repacked one."""

from __future__ import annotations

import argparse

from hf_flash.commands.arguments import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hf-flash restore`."""
    parser.add_argument("folder", help="a repacked checkpoint, or a mixture of experts that save_pretrained made")
    parser.add_argument("target", help="folder to make")


def run(args: argparse.Namespace) -> int:
    """`hf-flash restore`. Returns the exit code."""
    from hf_flash.packing.repacking import restore

    say(str(restore(args.folder, args.target)))
    return 0
