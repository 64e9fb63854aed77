"""A ceiling on the memory of a child process, by whatever means this system offers.

Three means are tried in turn: a cgroup v2 below one that we may write to and that delegates the memory controller; a cgroup v1;
`systemd-run --user --scope`, which needs no privileges. The group nearest to this process comes first, so that the limits on
this process apply to the child too. A means is used only if a trial process ran under it. Swapping is switched off, since the
child could otherwise exceed the ceiling. The child's page cache counts, but the kernel reclaims it when memory is needed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hf_flash.machine import cgroup

NO_CAP = "no cap"
_ROOT = cgroup.ROOT
_LIMITS: Final = {1: ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes"), 2: ("memory.max",)}
_SWAP: Final[dict[int, tuple[str, ...]]] = {1: (), 2: ("memory.swap.max",)}


@dataclass(frozen=True)
class MemoryCap:
    """How to start processes under a ceiling of `nbytes`; `label` names the means, or is [`NO_CAP`]."""

    label: str = NO_CAP
    nbytes: int | None = None
    prefix: tuple[str, ...] = ()  # goes before the command
    folder: Path | None = None  # our own cgroup's

    def command(self, arguments: Sequence[str]) -> list[str]:
        """Return the command that runs `arguments` under the cap, with the same process id and standard streams."""
        return [*self.prefix, *arguments]

    def remove(self) -> None:
        """Remove our cgroup. Its processes must have ended; the kernel may need a moment to notice."""
        for _ in range(50 if self.folder is not None and self.folder.exists() else 0):
            try:
                self.folder.rmdir()  # type: ignore[union-attr]
                return
            except OSError:
                time.sleep(0.05)


@contextmanager
def memory_cap(nbytes: int | None) -> Iterator[MemoryCap]:
    """Yield the first cap that works, or one without a ceiling. Its cgroup is new, and removed after the block.

    Args:
        nbytes: the ceiling; `None` asks for no cap.
    """
    for cap in _candidates(nbytes) if nbytes is not None else ():
        try:
            if _works(cap):
                yield cap
                return
        finally:
            cap.remove()
    yield MemoryCap()


def _works(cap: MemoryCap) -> bool:
    with suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(cap.command(["true"]), check=False, capture_output=True, timeout=10)
        return done.returncode == 0
    return False


def _candidates(nbytes: int) -> Iterator[MemoryCap]:
    name = f"hf-flash-{os.getpid()}-{time.monotonic_ns()}"
    for parent in sorted(cgroup.groups("memory", _ROOT), key=lambda group: -group.version):
        if parent.version == 1 or "memory" in parent.text("cgroup.subtree_control").split():
            limits = dict.fromkeys(_LIMITS[parent.version], nbytes) | dict.fromkeys(_SWAP[parent.version], 0)
            yield from _cgroup(f"cgroup v{parent.version}", parent.folder / name, limits, nbytes)
    if shutil.which("systemd-run"):
        scope = ("systemd-run", "--user", "--scope", "--quiet", "-p", f"MemoryMax={nbytes}", "-p", "MemorySwapMax=0")
        yield MemoryCap("systemd-run", nbytes, scope)


def _cgroup(label: str, folder: Path, limits: dict[str, int], nbytes: int) -> Iterator[MemoryCap]:
    """Yield a new cgroup, if it can be made and accepts the first limit. The other limits, on swap, may be refused."""
    (first, ceiling), *others = limits.items()
    try:
        if not (folder.parent / "cgroup.procs").exists():
            return
        folder.mkdir()
    except OSError:
        return
    prefix = ("sh", "-c", 'echo $$ > "$0" && exec "$@"', str(folder / "cgroup.procs"))
    cap = MemoryCap(label, nbytes, prefix, folder)
    try:
        (folder / first).write_text(str(ceiling))
    except OSError:
        cap.remove()
        return
    for file, value in others:
        with suppress(OSError):  # a kernel without swap accounting
            (folder / file).write_text(str(value))
    yield cap
