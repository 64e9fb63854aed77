"""Whose memory a budget is of: this machine's, that of the device that computes, or one for each (contract C5).

    memory_budget            on the CPU       with a device such as "cuda:0"
    "8GiB"                   of this machine  of the device; this machine holds buffers alone
    None                     what is free     most of what is free on the device, and half of what is free here
    {"cuda:0": a}            refused          a of the device; this machine holds buffers alone
    {"cuda:0": a, "cpu": b}  refused          a of the device, b of this machine: units that left the device stay there
    {"cpu": b}               b                what is free on the device, b of this machine

With `units_on="cpu"` a device has everything that is no unit: one number is of this machine then, where the units are, and the
device may be filled as far as it is free.
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
LEFT_ON_DEVICE: Final = 3 << 29  # bytes at least: also for its libraries, and kernels that are loaded when they first run
PINNED: Final = 0.5  # share of the free memory behind a device: what is pinned cannot be paged out
HOST: Final = "cpu"


@dataclass(frozen=True)
class Ceilings:
    """Bytes of weights, at most.

    Attributes:
        device: where the model computes, if that is not this machine's processor. device_bytes: there.
        host_bytes: in this machine's memory; with a device, `None`: only buffers.
        is_given: whether somebody named the first that counts: the device's, if there is one.
    """

    device: str | None
    device_bytes: int
    host_bytes: int | None
    is_given: bool


def ceilings_of(budget: Any, device: object | None, *, units_here: bool = False) -> Ceilings:
    """A budget, as `FlashOffloadConfig` takes it, in bytes.

    Args:
        device: where the model computes, or its name with its number; `None`: on the CPU.
        units_here: whether units are in this machine's memory although the rest is on a device.

    Raises:
        ConfigError: it names a device where this model has nothing.
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
