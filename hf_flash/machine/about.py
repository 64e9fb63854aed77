"""What this machine is: processor, usable cores, mounted file systems."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import psutil

from hf_flash.machine.cgroup import ROOT, cores


def cpu_name() -> str:
    """The processor's, as far as the system tells."""
    try:
        rows = Path("/proc/cpuinfo").read_text().splitlines()
        return next(row.partition(":")[2].strip() for row in rows if row.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or not x86
        return platform.processor() or platform.machine()


def mount_of(folder: Path) -> Any:
    """The mounted file system that a folder lies on, with `device`, `fstype` and `mountpoint`; `None` if it is not found."""
    mounts = [part for part in psutil.disk_partitions(all=True) if folder.resolve().is_relative_to(part.mountpoint)]
    return max(mounts, key=lambda part: len(part.mountpoint), default=None)


def usable_cores(root: Path = ROOT) -> int:
    """Cores that this process may use: those it is tied to, by its affinity or a cpuset, or less where a quota says so."""
    tied = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(tied, cores(root) or tied)
