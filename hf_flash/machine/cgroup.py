"""Memory and cores that the cgroups of this process allow it, in version 1, version 2, or both at once.

This is the only module that parses cgroup files. `/proc/self/cgroup` names the group of this process in every hierarchy.
`/proc/self/mountinfo` says where a hierarchy is mounted, and at which group the mount begins: in a container that is often the
container's own. The limits of that group, of our own and of every group between them apply to this process. A file that is
missing or cannot be read sets no limit, and no text in these files is an error.

Every function takes the `root` of a file system, so that tests can use a made-up tree.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path("/")


class _Names(NamedTuple):
    """Names of a memory group's files, and of the rows of its `memory.stat`, which count the groups below it too."""

    limits: tuple[str, ...]
    usage: str
    peak: str
    cache: tuple[str, ...]  # file pages in memory; tmpfs pages and locked pages are on other lists
    busy: tuple[str, ...]  # file pages that must be written to the disk before they can be dropped


_MEMORY: Final = {
    1: _Names(
        ("memory.limit_in_bytes",),
        "memory.usage_in_bytes",
        "memory.max_usage_in_bytes",
        ("total_active_file", "total_inactive_file"),
        ("total_dirty", "total_writeback"),
    ),
    2: _Names(
        ("memory.max", "memory.high"),
        "memory.current",
        "memory.peak",
        ("active_file", "inactive_file"),
        ("file_dirty", "file_writeback"),
    ),
}
_NO_LIMIT: Final = 1 << 60  # version 1 writes a number near 2**63
_CPU: Final = {1: ("cpu.cfs_quota_us", "cpu.cfs_period_us"), 2: ("cpu.max",)}


@dataclass(frozen=True)
class Group:
    """A cgroup.

    Attributes:
        folder: the folder with its files.
        version: 1 or 2.
    """

    folder: Path
    version: int

    def text(self, name: str) -> str:
        """Read a file of the group. Returns an empty text if the file is missing or cannot be read."""
        return _text(self.folder / name)

    def number(self, name: str) -> int | None:
        """Read a file that holds one number. Returns `None` for anything else, such as "max"."""
        return _number(self.text(name).strip())


def groups(controller: str, root: Path = ROOT) -> list[Group]:
    """Find the groups through which `controller` may limit this process: its own first, then those above it."""
    found: list[Group] = []
    for version, name in _memberships(controller, root):
        chains = [_chain(mount, begin, name, version) for mount, begin in _mounts(controller, version, root)]
        longest: list[Group] = max(chains, key=len, default=[])
        found += longest
    return found


def memory_left(root: Path = ROOT) -> Iterator[int]:
    """Yield the bytes that each limited memory group still lets this process take; below zero where a group is over its limit.

    Page cache counts as free: the kernel reclaims it before it refuses memory, however often it was read.
    """
    seen: Group | None = None
    for group in groups("memory", root):
        if seen and seen.version == group.version == 1 and group.number("memory.use_hierarchy") == 0:
            continue  # an old kernel: groups below do not count here
        seen, names = group, _MEMORY[group.version]
        limits = [limit for name in names.limits if (limit := group.number(name)) is not None and limit < _NO_LIMIT]
        if limits:
            used = group.number(names.usage) or 0
            yield min(limits) - max(0, used - _reclaimable(group, names))


def memory_peak(root: Path = ROOT) -> int | None:
    """Return the most bytes that the group of this process ever held, page cache included; `None` if no kernel reports it."""
    for version, names in _MEMORY.items():
        nearest = next((group for group in groups("memory", root) if group.version == version), None)
        if nearest and (peak := nearest.number(names.peak)) is not None:
            return peak
    return None


def cores(root: Path = ROOT) -> int | None:
    """Return the cores' worth of CPU time that the quotas on this process allow it, rounded up; `None` without a quota."""
    found = []
    for group in groups("cpu", root):
        match [_number(word) for name in _CPU[group.version] for word in group.text(name).split()]:
            case [int(quota), int(period)] if period > 0:
                found.append(max(1, -(-quota // period)))
    return min(found, default=None)


def _reclaimable(group: Group, names: _Names) -> int:
    rows = dict(row.split(" ", 1) for row in group.text("memory.stat").splitlines() if " " in row)
    cache, busy = (sum(_number(rows.get(name, "")) or 0 for name in some) for some in (names.cache, names.busy))
    return max(0, cache - busy)


def _memberships(controller: str, root: Path) -> Iterator[tuple[int, str]]:
    """Yield the version of each hierarchy that may have `controller`, and the name of our group in it."""
    for row in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = row.partition(":")
        controllers, colon, name = rest.partition(":")
        if colon and controller in controllers.split(","):
            yield 1, name
        elif colon and (number, controllers) == ("0", ""):
            yield 2, name


def _mounts(controller: str, version: int, root: Path) -> Iterator[tuple[Path, str]]:
    """Yield the folders where a hierarchy is mounted, each with the name of the group at which the mount begins."""
    for row in _text(root / "proc/self/mountinfo").splitlines():
        place, _, source = row.partition(" - ")
        match place.split(" "), source.split(" "):
            case [_, _, _, begin, folder, *_], [kind, _, options]:
                if kind == "cgroup2" if version == 2 else kind == "cgroup" and controller in options.split(","):
                    yield root / _plain(folder).lstrip("/"), _plain(begin)


def _chain(mount: Path, begin: str, name: str, version: int) -> list[Group]:
    """List the groups from `name` up to a mount, without those that the mount hides: removed groups, groups of the host."""
    begin = begin.rstrip("/")
    below = name[len(begin) :].strip("/") if (name + "/").startswith(begin + "/") else ""
    parts = below.split("/") if below else []
    if ".." in parts:  # the group is outside of our cgroup namespace
        parts = []
    folders = (mount.joinpath(*parts[:count]) for count in range(len(parts), -1, -1))
    return [Group(folder, version) for folder in folders if os.path.isdir(folder)]  # `Path.is_dir` may raise


def _plain(field: str) -> str:
    r"""Decode a field of mountinfo, which writes blanks and backslashes as `\040` and the like."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch(r"[0-9]{1,30}", text) else None


def _text(path: Path) -> str:
    with suppress(OSError):
        return os.fsdecode(path.read_bytes())
    return ""
