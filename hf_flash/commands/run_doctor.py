"""`hf-flash doctor`: whether this machine is fit for hf_flash."""

from __future__ import annotations

import argparse

from hf_flash.commands.arguments import add_json, finish, tell


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hf-flash doctor`."""
    parser.add_argument("folder", nargs="?", help="a model, or any folder whose disk to measure (default: the flash cache)")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """`hf-flash doctor`. Returns the exit code: 1 if something keeps hf_flash from working."""
    from hf_flash.commands.doctor import diagnose

    diagnosis = diagnose(args.folder)
    tell(args, diagnosis.describe())
    finish(args, diagnosis.to_dict())
    return 0 if diagnosis.works else 1
