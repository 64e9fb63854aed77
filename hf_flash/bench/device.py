"""A device that a benchmark computes on: what it is, how fast its memory and the way to it are."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any, Final

import torch

from hf_flash.compute.transfers import PinnedMemory, Transfers, free_bytes

_BYTES: Final = 256 << 20  # copied, or gone through, at a time
_REPEATS: Final = 5


def about_device(device: str) -> dict[str, Any]:
    """Its name, its memory in bytes, and speeds in GB/s: copies to it and from it, and a product in its memory."""
    place = torch.device(device)
    module = torch.get_device_module(place.type)
    memory = min(_BYTES, free_bytes(device) // 8)
    transfers = Transfers(place)
    here = PinnedMemory((memory,), transfers)
    there = torch.zeros(memory, dtype=torch.uint8, device=place)
    weight = there.view(torch.bfloat16)[: memory // 8192 * 4096].view(-1, 4096)
    x = torch.zeros(1, 4096, dtype=torch.bfloat16, device=place)

    def multiply() -> None:
        torch.nn.functional.linear(x, weight)
        finish(place)

    found = {
        "name": module.get_device_name(place) if hasattr(module, "get_device_name") else device,
        "memory_bytes": module.mem_get_info(place)[1] if hasattr(module, "mem_get_info") else free_bytes(device),
        "pinned": here.is_pinned,
        "to_gb_per_s": _gb_per_s(lambda: transfers.copy((here.tensor, there)).wait(), memory),
        "from_gb_per_s": _gb_per_s(lambda: transfers.copy((there, here.tensor)).wait(), memory),
        "memory_gb_per_s": _gb_per_s(multiply, weight.nbytes),
    }
    here.release()
    return found


def finish(device: torch.device) -> None:
    """Wait until a device has done what it was told."""
    if device.type != "cpu":
        torch.get_device_module(device.type).synchronize(device)


def peak_bytes(device: torch.device) -> int | None:
    """The most that torch had of a device's memory; `None` where it does not count that."""
    if device.type == "cpu":
        return None
    module = torch.get_device_module(device.type)
    return int(module.max_memory_allocated(device)) if hasattr(module, "max_memory_allocated") else None


def _gb_per_s(do: Callable[[], object], nbytes: int) -> float:
    do()
    best = float("inf")
    for _ in range(_REPEATS):
        start = perf_counter()
        do()
        best = min(best, perf_counter() - start)
    return nbytes / 1e9 / best
