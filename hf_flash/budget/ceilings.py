"""Whose memory a budget limits: this machine's, that of the device that computes, or one for each (contract C5).

    memory_budget            on the CPU       with a device such as "cuda:0"
    "8GiB"                   of this machine  of the device; this machine holds only buffers
    None                     what is free     most of what is free on the device, and half of what is free here
    {"cuda:0": a}            refused          a of the device; this machine holds only buffers
    {"cuda:0": a, "cpu": b}  refused          a of the device, b of this machine, which keeps units that left the device
    {"cpu": b}               b                what is free on the device, b of this machine

With `units_on="cpu"` the device holds everything except the units. A single number then limits this machine's memory, where the
units are, and the device may use most of what it has free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from hf_flash.base.sizes import parse_bytes, parse_places
from hf_flash.compute.transfers import free_bytes, shares_memory
from hf_flash.errors import ConfigError
from hf_flash.machine.free_memory import available_memory

HEADROOM: Final = 0.9  # share of the free memory that a budget of None takes: activations and the KV cache need the rest
LEFT_ON_DEVICE: Final = 3 << 29  # bytes at least, but never more than half: also for libraries, and kernels loaded on first use
PINNED: Final = 0.5  # share of free host memory that a budget of None takes with a device: pinned memory cannot be paged out
HOST: Final = "cpu"


@dataclass(frozen=True)
class Ceilings:
    """The most bytes of weights that each memory may hold.

    Attributes:
        device: where the model computes; `None`: on the CPU.
        device_bytes: the ceiling on that device; 0 without a device.
        host_bytes: the ceiling in this machine's memory; with a device, `None` means only buffers.
        is_given: whether the user set the budget of the memory that holds the units.
    """

    device: str | None
    device_bytes: int
    host_bytes: int | None
    is_given: bool


def ceilings_of(budget: Any, device: object | None, *, units_here: bool = False) -> Ceilings:
    """The ceilings, in bytes, that a budget sets.

    Args:
        budget: as `FlashOffloadConfig` takes it.
        device: where the model computes, a `torch.device` or its name with its index; `None`: on the CPU.
        units_here: whether the units are in this machine's memory although the rest is on a device.

    Raises:
        ConfigError: the budget names a device that holds no part of this model.
    """
    places, name, free = parse_places(budget), str(device), available_memory()
    if device is None:
        given = budget if places is None else _only(places, {HOST}).get(HOST)
        return Ceilings(None, 0, _bytes(given, free), given is not None)
    if places is not None:
        named = _only(places, {name, HOST})
        there, here, is_kept_here = named.get(name), named.get(HOST), units_here or HOST in named
    elif units_here:
        there, here, is_kept_here = None, budget, True
    else:
        there, here, is_kept_here = budget, None, budget is None and not shares_memory(name)
    is_given = (here if units_here else there) is not None
    share = HEADROOM if units_here else PINNED
    return Ceilings(name, _on_device(there, name), _bytes(here, free, share) if is_kept_here else None, is_given)


def _only(places: Mapping[str, Any], known: set[str]) -> Mapping[str, Any]:
    if others := sorted(set(places) - known):
        raise ConfigError(
            "this budget is for a device where the model has nothing",
            where="memory_budget",
            expected=" and ".join(sorted(known, reverse=True)),
            got=", ".join(others),
            hint="name the devices of device_map, and the cpu",
        )
    return places


def _bytes(given: int | str | None, free: int, share: float = HEADROOM) -> int:
    return int(free * share) if given is None else parse_bytes(given)


def _on_device(given: int | str | None, device: str) -> int:
    if given is not None:
        return parse_bytes(given)
    free = free_bytes(device)
    return max(free // 2, min(int(free * HEADROOM), free - LEFT_ON_DEVICE))
