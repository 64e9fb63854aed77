"""Memory that this process may still take, on this machine or in its cgroup."""

from __future__ import annotations

import psutil

from hf_flash.machine.cgroup import memory_left


def available_memory() -> int:
    """Bytes this process may still take: the machine's free memory, or less where a cgroup says so."""
    return max(0, min([int(psutil.virtual_memory().available), *memory_left()]))
