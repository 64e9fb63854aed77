"""`hf-flash cache ls` and `hf-flash cache rm`: what is in the flash cache."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from hf_flash.base.sizes import format_bytes
from hf_flash.commands.arguments import add_json, finish, say, tell
from hf_flash.errors import ConfigError, HfFlashError

if TYPE_CHECKING:
    from rich.console import Group

    from hf_flash.packing.flash_cache import Entry


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hf-flash cache`."""
    verbs = parser.add_subparsers(metavar="ls|rm", required=True, help="list what is there, or remove entries")
    ls = verbs.add_parser("ls", help="list what is there", description="List what is in the flash cache.")
    ls.set_defaults(verb=_list)
    add_json(ls)
    rm = verbs.add_parser(
        "rm", help="remove entries", description="Remove entries of the flash cache; they are made again when they are needed."
    )
    rm.set_defaults(verb=_remove)
    which = rm.add_mutually_exclusive_group(required=True)
    which.add_argument("targets", nargs="*", default=[], metavar="TARGET", help="me/opt, me/*, the name of an entry, a commit")
    which.add_argument("--all", action="store_true", help="everything that is there")
    rm.add_argument("-y", "--yes", action="store_true", help="do not ask")
    rm.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    for sub in (ls, rm):
        sub.add_argument("--cache-dir", metavar="FOLDER", help="where it is (default: $HF_FLASH_CACHE, else in the HF cache)")


def run(args: argparse.Namespace) -> int:
    """`hf-flash cache ls` or `hf-flash cache rm`. Returns the exit code: 1 if something was not found or not removed."""
    code: int = args.verb(args)
    return code


def _list(args: argparse.Namespace) -> int:
    from hf_flash.packing.flash_cache import cache_folder, scan

    entries, folder = scan(args.cache_dir), cache_folder(args.cache_dir)
    size = sum(entry.size_bytes for entry in entries)
    found = {"folder": str(folder), "size_bytes": size, "entries": [entry.to_dict() for entry in entries]}
    tell(args, describe(entries, folder))
    finish(args, found)
    return 0


def _remove(args: argparse.Namespace) -> int:
    from hf_flash.packing.flash_cache import cache_folder, chosen, scan

    entries, folder = scan(args.cache_dir), cache_folder(args.cache_dir)
    found, unknown = (entries, []) if args.all else chosen(entries, args.targets)
    if unknown:
        say(f"not in {folder}: {', '.join(unknown)}")
    if found:
        say(describe(found, folder))
    if not found or args.dry_run:
        say("dry run: nothing was removed" if found else "nothing to remove")
        return int(bool(unknown))
    if not args.yes and not _confirmed(len(found)):
        say("nothing was removed")
        return 1
    freed, failed = 0, bool(unknown)
    for entry in found:
        try:
            entry.remove()
            freed += entry.size_bytes
        except HfFlashError as error:
            failed = True
            say(f"not removed: {error}")
    say(f"freed {format_bytes(freed)}")
    return int(failed)


def _confirmed(count: int) -> bool:
    if not sys.stdin.isatty():
        raise ConfigError("there is nobody to ask", where="cache rm", hint="--yes removes without asking")
    sys.stderr.write(f"Remove {'this entry' if count == 1 else f'these {count} entries'}? [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def describe(entries: Sequence[Entry], folder: Path) -> Group:
    """Entries as a table, to be printed by rich."""
    from rich.console import Group
    from rich.text import Text

    from hf_flash.base.tables import Figures, Paragraph

    size = format_bytes(sum(entry.size_bytes for entry in entries))
    total = Paragraph(f"{len(entries)} entr{'y' if len(entries) == 1 else 'ies'}, {size}, in {folder}")
    if not entries:
        return Group(total)
    headings = ("source", "revision", "size", "last used", "state", "name")
    return Group(Figures(headings, [_row(entry) for entry in entries], notes=frozenset((1, 3, 4, 5))), Text(), total)


def _row(entry: Entry) -> tuple[str, ...]:
    used = datetime.fromtimestamp(entry.last_used).astimezone().strftime("%Y-%m-%d %H:%M")
    state = f"{entry.state}, in use" if entry.in_use else entry.state
    return entry.source or "-", entry.revision[:12] or "-", format_bytes(entry.size_bytes), used, state, entry.name
