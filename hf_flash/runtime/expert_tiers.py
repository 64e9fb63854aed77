"""`ExpertTiers`: which experts of a layer are on the device, which wait in this machine's memory, and which are on flash alone.

One rule decides: the most recently used are on the device, as many as it has slots for; the next ones in the host's slots. So
an expert that has to leave the device goes to the host, and none is in both. (Host slots that also hold what is on the device
would be simpler, but then a host with twice the device's slots would keep half as many experts from the disk.)

Of a call that uses more experts than the device has slots for, some *pass*: they go through slots that all layers share.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hf_flash.base.arrays import Ids
from hf_flash.runtime.expert_slots import ExpertSlots


class TieredRoom(NamedTuple):
    """What a call's experts mean for both tiers.

    Attributes:
        hits: experts that are on the device, ascending.
        leaving: others on the device, which have to go before the call. leaving_later: hits, which have to go after it.
        kept: experts that get a slot of the device, the most recently used first. passing: those that do not.
    """

    hits: list[int]
    leaving: list[int]
    leaving_later: list[int]
    kept: list[int]
    passing: list[int]


class ExpertTiers:
    """The slots of one layer on a device and in this machine's memory.

    Args:
        experts: of the layer.
        on_device: slots of the device.
        on_host: slots of this machine's memory. One of them is always free, so that two experts can change places.
    """

    def __init__(self, experts: int, on_device: int, on_host: int) -> None:
        self.device, self.host = _slots(experts, on_device), _slots(experts, on_host)
        self._ranks_on_host: Ids = np.zeros(experts, np.bool_)  # after the last call

    def make_room(self, used: Ids, last: Ids, tokens: int) -> TieredRoom:
        """Take note of what a call uses, and say what has to move. Nothing is moved but what leaves the host for good.

        Args:
            used: experts, ascending. last: the token of the call, from 0 on, that uses each of them last.
            tokens: of the call.
        """
        device, host = self.device, self.host
        device.last_used[used] = device.clock + 1 + last
        device.state.clock += tokens
        there, waiting = device.slot_of >= 0, host.slot_of >= 0
        needed = np.zeros_like(there)
        needed[used] = True
        candidates = np.flatnonzero(there | waiting | needed)
        order = candidates[np.lexsort((candidates, -device.last_used[candidates]))]
        stay, after = order[: device.capacity], order[device.capacity :][: max(0, host.capacity - 1)]
        stays = np.zeros_like(there)
        stays[stay] = True
        self._ranks_on_host[:] = False
        self._ranks_on_host[after] = True
        for expert in np.flatnonzero(waiting & ~stays & ~self._ranks_on_host & ~needed).tolist():
            host.drop(expert)
        return TieredRoom(
            hits=used[there[used]].tolist(),
            leaving=np.flatnonzero(there & ~stays & ~needed).tolist(),
            leaving_later=np.flatnonzero(there & ~stays & needed).tolist(),
            kept=stay[~there[stay]].tolist(),
            passing=np.flatnonzero(needed & ~there & ~stays).tolist(),
        )

    def waits(self, expert: int) -> bool:
        """Whether an expert is in the host's slots."""
        return bool(self.host.slot_of[expert] >= 0)

    def belongs_on_host(self, expert: int) -> bool:
        """Whether the host's slots are where the last call's rule wants an expert."""
        return bool(self._ranks_on_host[expert])

    def forget(self) -> None:
        """Nothing is in memory any more."""
        self.device.forget()
        self.host.forget()


def _slots(experts: int, count: int) -> ExpertSlots:
    """Slots whose memory is elsewhere."""
    return ExpertSlots(experts, np.empty((count, 0), np.uint8))
