"""`hf-flash inspect`: what is in a repacked checkpoint."""

from __future__ import annotations

import argparse

from hf_flash.commands.arguments import add_json, finish, tell


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hf-flash inspect`."""
    parser.add_argument("folder", help="a repacked checkpoint, or an entry of the flash cache")
    parser.add_argument("--check", action="store_true", help="read everything and compare checksums")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """`hf-flash inspect`. Returns the exit code: 1 if a checksum is wrong."""
    from huggingface_hub.utils import tqdm

    from hf_flash.commands.store_facts import describe, facts
    from hf_flash.store.layout import FlashStore

    store = FlashStore.open_folder(args.folder)
    found, problems = facts(store), list[str]()
    tell(args, describe(found))
    if args.check:
        problems = store.check(lambda layers: tqdm(layers, desc="Checking", unit="layer", delay=1))
        tell(args, "\n".join(problems) if problems else "checksums         all right")
    finish(args, found | {"checked": args.check, "problems": problems})
    return 1 if problems else 0
