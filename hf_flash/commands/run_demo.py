"""`hf-flash demo`: repack a small model, or take a mixture of experts as it is, and let it generate beside the stock model."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from hf_flash.commands.arguments import add_json, finish, positive, seconds, size, tell

if TYPE_CHECKING:
    from rich.console import RenderableType


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hf-flash demo`."""
    add = parser.add_argument
    add("model", nargs="?", help="folder or Hub repository of a plain checkpoint (default: the repository's small models)")
    add("--prompt", default="In the beginning God created", help="text to continue")
    add("--max-new-tokens", type=positive, default=48, metavar="N", help="tokens to generate (default 48)")
    add("--memory-budget", type=size, metavar="SIZE", help='weights in DRAM at most, such as "6GiB"')
    add("--watch", action="store_true", help="show what every token reads and reuses, layer by layer")
    add("--pace", type=seconds, default=0.25, metavar="SECONDS", help="a token is shown so long (default 0.25)")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """`hf-flash demo`. Returns the exit code: 1 if the tokens differ from the stock model's."""
    from hf_flash.base.tables import printing
    from hf_flash.commands.demo import demo, demo_shipped, shipped_models

    def show(what: RenderableType) -> None:
        tell(args, what)

    if args.model is None and not args.watch and args.memory_budget is None:
        report = demo_shipped(shipped_models(), args.prompt, args.max_new_tokens, show)
    else:
        report = demo(
            args.model or shipped_models()[0], args.prompt, args.max_new_tokens, memory_budget=args.memory_budget,
            watch=args.watch, pace=args.pace, tell=show, console=printing(stderr=args.json == "-"),
        )  # fmt: skip
    finish(args, report)
    return 0 if report["same_tokens"]["none"] else 1
