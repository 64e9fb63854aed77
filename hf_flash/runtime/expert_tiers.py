"""`ExpertTiers`: which experts of a layer are on the device, which are in this machine's memory, and which only on flash.

One rule decides: the most recently used experts are on the device, as many as it has slots for; the next ones are in the host's
slots. So an expert that has to leave the device goes to the host, and none is in both. (Host slots that also hold what is on
the device would be simpler, but then a host with twice the device's slots would save the disk half as many experts.)

If a call uses more experts than the device has slots for, some *pass*: they go through slots that all layers share.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hf_flash.base.arrays import Ids
from hf_flash.runtime.expert_slots import ExpertSlots


class TieredRoom(NamedTuple):
    """What a call's experts need of both tiers.

    Attributes:
        hits: experts of the call that are on the device, ascending.
        leaving: other experts on the device that have to make room.
        leaving_later: hits that have to leave the device once they are computed.
        kept: experts not on the device that get a slot there, the most recently used first.
        passing: experts not on the device that do not get one.
    """

    hits: list[int]
    leaving: list[int]
    leaving_later: list[int]
    kept: list[int]
    passing: list[int]


class ExpertTiers:
    """The slots of one layer on a device and in this machine's memory.

    Args:
        experts: number of experts in the layer.
        on_device: number of slots on the device.
        on_host: number of slots in this machine's memory. One of them is always free, so that two experts can change places.
    """

    def __init__(self, experts: int, on_device: int, on_host: int) -> None:
        self.device, self.host = _slots(experts, on_device), _slots(experts, on_host)
        self._ranks_on_host: Ids = np.zeros(experts, np.bool_)  # whether each belongs on the host after the last call

    def make_room(self, used: Ids, last: Ids, tokens: int) -> TieredRoom:
        """Record which experts a call uses, and work out which have to move. Drop only those that leave the host for good.

        Args:
            used: experts that the call uses, ascending.
            last: the last token of the call, from 0 on, that uses each of them.
            tokens: number of tokens in the call.
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
        """Whether an expert belongs in the host's slots after the last call."""
        return bool(self._ranks_on_host[expert])

    def forget(self) -> None:
        """Drop every expert from both tiers."""
        self.device.forget()
        self.host.forget()


def _slots(experts: int, count: int) -> ExpertSlots:
    """Slots without memory of their own: the callers hold it."""
    return ExpertSlots(experts, np.empty((count, 0), np.uint8))
