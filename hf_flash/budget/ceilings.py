"""Whose memory a budget is of: this machine's, that of the device that computes, or one for each (contract C5).

memory_budget          on the CPU        with a device such as "cuda:0"
"8GiB"                 of this machine   of the device; this machine holds buffers alone
None                   what is free      what is free on the device, and what is free here
{"cuda:0": a}          refused           a of the device; this machine holds buffers alone
{"cuda:0": a, "cpu": b}  refused         a of the device, b of this machine: units that left the device stay there
{"cpu": b}             b                 what is free on the device, b of this machine
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from hf_flash.base.sizes import parse_bytes, parse_places
from hf_flash.compute.transfers import free_bytes
from hf_flash.errors import ConfigError
from hf_flash.machine.free_memory import available_memory

HEADROOM: Final = 0.9  # share of the free memory that a budget of None takes: activations and the KV cache need the rest
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


def ceilings_of(budget: Any, device: object | None) -> Ceilings:
    """A budget, as `FlashOffloadConfig` takes it, in bytes.

    Args:
        device: where the model computes, or its name with its number; `None`: on the CPU.

    Raises:
        ConfigError: it names a device where this model has nothing.
    """
    places, name = parse_places(budget), str(device)
    if device is None:
        given = budget if places is None else _only(places, {HOST}).get(HOST)
        return Ceilings(None, 0, _bytes(given, available_memory()), given is not None)
    if places is None:
        of_device, of_host = budget, (None if budget is not None else available_memory())
    else:
        named = _only(places, {name, HOST})
        of_device, of_host = named.get(name), named.get(HOST)
    host_bytes = None if of_host is None else _bytes(of_host if places else None, available_memory())
    return Ceilings(name, _bytes(of_device, free_bytes(name)), host_bytes, of_device is not None)


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


def _bytes(given: int | str | None, free: int) -> int:
    return int(free * HEADROOM) if given is None else parse_bytes(given)
