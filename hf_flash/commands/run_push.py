"""`hf-flash push`: upload a repacked checkpoint to the Hub."""

from __future__ import annotations

import argparse

from hf_flash.commands.arguments import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hf-flash push`."""
    add = parser.add_argument
    add("folder", help="a repacked checkpoint, or a mixture of experts that save_pretrained made")
    add("repo_id", help="me/opt-6.7b-flash")
    add("--private", action="store_true", default=None, help="make a new repository private")
    add("--revision", help="branch to upload to")
    add("--create-pr", action="store_true", help="open a pull request instead")
    add("--commit-message", metavar="TEXT", help="of the commit")
    add("--bench", metavar="FILE", help="JSON report of `hf-flash bench` on this model, for the model card")


def run(args: argparse.Namespace) -> int:
    """`hf-flash push`. Returns the exit code."""
    from hf_flash.hub.saving import push

    info = push(
        args.folder, args.repo_id, private=args.private, revision=args.revision, create_pr=args.create_pr,
        commit_message=args.commit_message, bench=args.bench,
    )  # fmt: skip
    say(info)
    return 0
