"""How much memory this process may still take, given the machine and its cgroups."""

from __future__ import annotations

import psutil

from hf_flash.machine.cgroup import memory_left


def available_memory() -> int:
    """Return the bytes that this process may still take: the machine's free memory, or less where a cgroup leaves less."""
    return max(0, min([int(psutil.virtual_memory().available), *memory_left()]))
