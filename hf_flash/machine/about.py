"""What this machine is: its processor, its usable cores, its mounted file systems."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import psutil

from hf_flash.machine.cgroup import ROOT, cores


def cpu_name() -> str:
    """Return the name of the processor, or its architecture if the system reports no name."""
    try:
        rows = Path("/proc/cpuinfo").read_text().splitlines()
        return next(row.partition(":")[2].strip() for row in rows if row.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or not x86
        return platform.processor() or platform.machine()


def mount_of(folder: Path) -> Any:
    """Find the mounted file system that a folder lies on.

    Returns:
        psutil's row with `device`, `fstype` and `mountpoint`; `None` if none is found.
    """
    mounts = [part for part in psutil.disk_partitions(all=True) if folder.resolve().is_relative_to(part.mountpoint)]
    return max(mounts, key=lambda part: len(part.mountpoint), default=None)


def usable_cores(root: Path = ROOT) -> int:
    """Count the cores that this process may use: those in its affinity, which a cpuset narrows too, or fewer under a quota.

    Args:
        root: the root of the file system with the cgroup files; tests pass their own.
    """
    tied = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(tied, cores(root) or tied)
