"""The flash cache, seen from outside: what plain checkpoints were repacked into, what it takes, and how to be rid of it.

An entry is a folder of the cache with the bundles of one checkpoint; `.<name>.partial` is what an interrupted run left of
one, and `.push-*` what an interrupted upload left. The lock file of an entry is touched by everybody who asks for it, which
says when it was last used.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from filelock import Timeout

from . import inuse
from .budget import format_bytes
from .commandline import add_json, finish, say, tell
from .errors import ConfigError, HfFlashError, StoreError, StoreFormatError, StoreMissingError, UsageError
from .files import exists, listing
from .folders import lock_file, lock_on, put_aside
from .packing import cache_folder
from .store import FlashStore
from .writer import writing

_LEFT: Final = re.compile(r"\.(?P<name>.+)\.(partial|removed)|\.push-.+")


@dataclass(frozen=True)
class Entry:
    """A folder in the flash cache.

    Attributes:
        source, revision: what it was made from; empty where that cannot be told.
        state: "ready", "unfinished" (an interrupted run left it; the next one goes on there), "damaged", or
            "unreadable" (not to be read now, or by this version).
        last_used: seconds since the epoch.
    """

    path: Path
    source: str
    revision: str
    predictors: tuple[str, ...]
    size_bytes: int
    last_used: float
    state: str

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def in_use(self) -> bool:
        """Whether a process is known to write it, or to have a model loaded from it."""
        return inuse.held([self.path, self._lock, *self.path.glob("*.safetensors")])

    @property
    def _lock(self) -> Path:
        """The lock file of the folder that this one is, or was to become."""
        match = _LEFT.fullmatch(self.name)
        return lock_file(self.path.with_name(match["name"]) if match and match["name"] else self.path)

    def answers_to(self, target: str) -> bool:
        """Whether a name, a pattern or the beginning of a commit means this entry."""
        if re.fullmatch(r"[0-9a-f]{7,40}", target) and self.revision.startswith(target):
            return True
        return any(fnmatchcase(known, target) for known in (self.name, self.source) if known)

    def remove(self) -> None:
        """Remove it from the disk. It is out of the way at once, or not at all.

        Raises:
            UsageError: it is in use.
            RepackError: the system does not let it go.
        """
        try:
            alone = lock_on(self._lock).acquire(timeout=0) if self._lock.exists() else nullcontext()
            with alone, writing(self.path):
                if inuse.held([self.path, *self.path.glob("*.safetensors")]):
                    raise UsageError("in use by a running process", where=self.path, hint="close the model first")
                shutil.rmtree(self.path if _LEFT.fullmatch(self.name) else put_aside(self.path))
        except Timeout as error:
            raise UsageError("a running process is writing it", where=self.path, hint="wait for it") from error

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        used = datetime.fromtimestamp(self.last_used, UTC).isoformat(timespec="seconds")
        facts = asdict(self) | {"path": str(self.path), "predictors": list(self.predictors), "last_used": used}
        return {"name": self.name} | facts | {"in_use": self.in_use}


def scan(cache_dir: str | None = None) -> list[Entry]:
    """What is in the flash cache, by source.

    Args:
        cache_dir: as in `FlashOffloadConfig`.
    """
    folder = cache_folder(cache_dir)
    paths = [path for path in listing(folder) if path.is_dir()] if exists(folder) else []
    entries = (_entry(path) for path in paths if not path.name.startswith(".") or _LEFT.fullmatch(path.name))
    return sorted((entry for entry in entries if entry is not None), key=lambda entry: (entry.source, entry.name))


def _entry(path: Path) -> Entry | None:
    source, revision, state = "", "", "unfinished"
    predictors: tuple[str, ...] = ()
    try:
        if not _LEFT.fullmatch(path.name):
            state = "damaged"
            store = FlashStore.open_folder(path)
            source, revision, state = store.metadata["source"], store.metadata["revision"], "ready"
            predictors = tuple(store.predictors)
    except (StoreFormatError, StoreMissingError):
        pass
    except StoreError:  # somebody else's, of a newer version, or out of reach just now
        state = "unreadable"
    try:
        size = sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())
        clock = next(there for there in (lock_file(path), path) if there.exists())
        return Entry(path, source, revision, predictors, size, clock.stat().st_mtime, state)
    except (OSError, StopIteration):  # gone in the meantime
        return None


def chosen(entries: Iterable[Entry], targets: Sequence[str]) -> tuple[list[Entry], list[str]]:
    """The entries that the targets mean, and the targets that mean none."""
    entries = list(entries)
    found = [entry for entry in entries if any(map(entry.answers_to, targets))]
    return found, [target for target in targets if not any(entry.answers_to(target) for entry in entries)]


def describe(entries: Sequence[Entry], folder: Path) -> str:
    """Entries as a table."""
    head = ("SOURCE", "REVISION", "SIZE", "LAST USED", "STATE", "NAME")
    rows = [head, *(_row(entry) for entry in entries)]
    wide = [max(len(row[column]) for row in rows) for column in range(len(head))]
    size = format_bytes(sum(entry.size_bytes for entry in entries))
    lines = [
        "  ".join(cell.rjust(n) if at == 2 else cell.ljust(n) for at, (cell, n) in enumerate(zip(row, wide, strict=True)))
        for row in rows
    ]
    total = f"{len(entries)} entr{'y' if len(entries) == 1 else 'ies'}, {size}, in {folder}"
    return "\n".join([*(line.rstrip() for line in lines if entries), *([""] if entries else []), total])


def _row(entry: Entry) -> tuple[str, ...]:
    used = datetime.fromtimestamp(entry.last_used).astimezone().strftime("%Y-%m-%d %H:%M")
    state = f"{entry.state}, in use" if entry.in_use else entry.state
    return entry.source or "-", entry.revision[:12] or "-", format_bytes(entry.size_bytes), used, state, entry.name


# --- the command ---------------------------------------------------------------------------------------------------


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
    """`hf-flash cache`, as the command line says. Returns the exit code."""
    code: int = args.verb(args)
    return code


def _list(args: argparse.Namespace) -> int:
    entries, folder = scan(args.cache_dir), cache_folder(args.cache_dir)
    size = sum(entry.size_bytes for entry in entries)
    found = {"folder": str(folder), "size_bytes": size, "entries": [entry.to_dict() for entry in entries]}
    tell(args, describe(entries, folder))
    finish(args, found)
    return 0


def _remove(args: argparse.Namespace) -> int:
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
