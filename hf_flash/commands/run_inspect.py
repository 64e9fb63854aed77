"""`hf-flash inspect`: what is in a repacked checkpoint, or in a mixture of experts."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hf_flash.commands.arguments import add_json, finish, tell


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hf-flash inspect`."""
    parser.add_argument("folder", help="a repacked checkpoint, an entry of the flash cache, or a mixture of experts")
    parser.add_argument("--check", action="store_true", help="read everything; compare the checksums that a repacked one has")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """`hf-flash inspect`. Returns the exit code: 1 if a checksum is wrong, or a file cannot be read."""
    from hf_flash.base.tables import facts as as_table
    from hf_flash.commands.store_facts import check_experts, expert_facts, expert_rows, facts, neuron_rows
    from hf_flash.packing.expert_folder import open_mixture
    from hf_flash.store.layout import FlashStore

    mixture, problems = open_mixture(Path(args.folder)), list[str]()
    if mixture is None:
        store = FlashStore.open_folder(args.folder)
        found = facts(store)
        tell(args, as_table(neuron_rows(found)))
        right = "All checksums are right."
    else:
        found = expert_facts(mixture)
        tell(args, as_table(expert_rows(found)))
        right = "All of it can be read. A plain checkpoint has no checksums: changed bytes are not found."
    if args.check:
        problems = store.check(_progress("layer")) if mixture is None else check_experts(mixture, _progress("file"))
        tell(args, "\n".join(problems) if problems else right)
    finish(args, found | {"checked": args.check, "problems": problems})
    return 1 if problems else 0


def _progress(unit: str) -> Any:
    """A progress bar around what is checked."""
    from huggingface_hub.utils import tqdm

    def progress(parts: Iterable[Any]) -> Iterable[Any]:
        bar: Iterable[Any] = tqdm(parts, desc="Checking", unit=unit, delay=1)
        return bar

    return progress
