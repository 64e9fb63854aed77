"""`DeviceReader`: reads neurons into rows on a device, through pinned memory of this machine that `BundleReader` fills.

    flash --read--> a lane of pinned memory --copy--> a lane on the device --> rows of the caller's matrix
       |                 ^
       +--read--> rows that stay in this machine's memory (host_rows.py), if the budget has room for them

A lane has room for a block of neurons. While one lane is copied, the next is read. The last step runs on the stream on which
the device computes, so that rows are never overwritten while they are used.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final

import numpy as np
import torch

from hf_flash.base.arrays import Ids
from hf_flash.compute.transfers import Copied, PinnedMemory, Transfers, upload
from hf_flash.errors import HfFlashError, StoreReadError
from hf_flash.reading.host_rows import HostRows
from hf_flash.reading.layer_files import FileSource
from hf_flash.reading.reader import BundleReader, ReadCount, Reading
from hf_flash.store.layout import FlashStore
from hf_flash.store.unit import UnitLayout

LANES: Final = 3  # one is read into, one is copied, and one is left for a caller that waits


class _Lane:
    """Room for some neurons in pinned memory (`here`) and on the device (`there`)."""

    def __init__(self, here: torch.Tensor, there: torch.Tensor) -> None:
        self.here, self.there = here, there
        self.copied: Copied | None = None  # the last copy from here to there
        self.taken: Any = None  # the mark behind which `there` has been copied into the caller's matrix


class DeviceReader(BundleReader):
    """As `BundleReader`, for rows on a device.

    Args:
        store, source, dtype: as in `BundleReader`.
        transfers: copies to the device.
        rows: neurons that a lane has room for.
        kept: for each layer, how many neurons may stay in this machine's memory.
    """

    def __init__(
        self, store: FlashStore, source: FileSource, dtype: torch.dtype, transfers: Transfers, rows: int, kept: Sequence[int]
    ) -> None:
        super().__init__(store, source, dtype)
        self.transfers, unit = transfers, store.unit.as_dtype(dtype)
        self.pinned = PinnedMemory((LANES * rows, unit.row_bytes), transfers)
        here = self.pinned.tensor.view(dtype)
        there = torch.empty(LANES * rows, unit.numbers, dtype=dtype, device=transfers.device)
        self._lanes = [_Lane(*lane) for lane in zip(torch.split(here, rows), torch.split(there, rows), strict=True)]
        self.free = deque(self._lanes)
        self.lane_rows = rows
        self.epoch = 0  # how often `forget` was called
        self.buffer_bytes += self.pinned.tensor.nbytes
        self._kept = [
            HostRows(layer.d_ff, count, unit.numbers, dtype) if count else None
            for layer, count in zip(store.layers, kept, strict=True)
        ]

    @staticmethod
    def device_bytes(unit: UnitLayout, rows: int) -> int:
        """Bytes that the lanes take on the device, and again in pinned memory.

        Args:
            unit: the layout of a neuron, in the compute dtype.
            rows: neurons that a lane has room for.
        """
        return LANES * rows * unit.row_bytes

    def step_file(self, layer: int) -> None:
        return None

    def start(self, layer: int, ids: Ids, out: torch.Tensor, rows: Ids, *, background: bool = False) -> Reading:
        """Begin to fill rows of a matrix on the device; arguments as in `BundleReader.start`."""
        return _ToDevice(self, layer, ids, out, rows)

    def start_in(self, lane: _Lane, layer: int, ids: Ids) -> Reading:
        """Begin to fill a lane with neurons, at most as many as it has rows."""
        if lane.copied is not None:
            lane.copied.wait()
        kept = self._kept[layer]
        if kept is None:
            return self.start_here(layer, ids, lane.here, np.arange(len(ids)), background=True)
        return _ThroughHost(self, kept, layer, ids, lane)

    def through_gaps(self, layer: int, ids: Ids, first: int, last: int, buffer: torch.Tensor) -> Ids:
        if len(self.free) < LANES:
            return ids
        lane = self._lanes[0]  # a buffer to measure with, which happens once
        if lane.copied is not None:
            lane.copied.wait()
        return super().through_gaps(layer, ids, first, last, lane.here)

    def settle(self) -> None:
        super().settle()
        self.transfers.synchronize()

    def forget(self) -> None:
        super().forget()
        self.transfers.synchronize()
        self.epoch += 1
        computed = self.transfers.mark()  # includes work that an interrupted call had no time to mark
        for lane in self._lanes:
            lane.taken = computed
        self.free = deque(self._lanes)
        for rows in self._kept:
            if rows is not None:
                rows.forget()

    def close(self) -> None:
        super().close()
        self.transfers.synchronize()
        self.free.clear()
        self._lanes.clear()
        self.pinned.release()
        for rows in self._kept:
            if rows is not None:
                rows.release()


class _ThroughHost:
    """Neurons that go into a lane from the rows kept in this machine's memory; missing ones are first read into those rows."""

    def __init__(self, reader: DeviceReader, kept: HostRows, layer: int, ids: Ids, lane: _Lane) -> None:
        self._kept, self._lane, self._ids = kept, lane, ids
        self._taken = taken = kept.take(ids)
        self._copy(taken.here, taken.slots)  # at once: the next read may evict them
        self._reading: list[Reading] = []
        with self._given_back_on_failure():
            for at, matrix, rows in ((taken.coming, kept.matrix, taken.free), (taken.passing, lane.here, taken.passing)):
                if len(at):
                    self._reading.append(reader.start_here(layer, ids[at], matrix, rows, background=True))

    def wait(self) -> ReadCount:
        taken = self._taken
        total = ReadCount(host_hits=len(taken.here))
        with self._given_back_on_failure():
            while self._reading:
                total.add(self._reading.pop(0).wait())
        self._copy(taken.coming, taken.free)
        self._kept.commit(self._ids[taken.coming], taken.free)
        return total

    def _copy(self, at: Ids, slots: Ids) -> None:
        if len(at):
            picked = self._kept.matrix.index_select(0, torch.from_numpy(slots))
            self._lane.here.index_copy_(0, torch.from_numpy(at), picked)

    @contextmanager
    def _given_back_on_failure(self) -> Iterator[None]:
        try:
            yield
        except HfFlashError:
            while self._reading:  # no read may write to slots that are given back
                with suppress(HfFlashError):
                    self._reading.pop(0).wait()
            self._kept.give_back(self._taken.free)
            raise


class _ToDevice:
    """Neurons that go to the device, one lane at a time. The first lane is read at once, unless only one lane is free."""

    def __init__(self, reader: DeviceReader, layer: int, ids: Ids, out: torch.Tensor, rows: Ids) -> None:
        self._reader, self._layer, self._out, self._epoch = reader, layer, out, reader.epoch
        self._parts: deque[tuple[Ids, Ids]] = deque(_parts(ids, rows, reader.lane_rows))
        self._reading: deque[tuple[_Lane, Reading, Ids]] = deque()
        if len(reader.free) > 1:
            self._start()

    def _start(self) -> None:
        if self._parts and self._reader.free:
            ids, rows = self._parts.popleft()
            lane = self._reader.free.popleft()
            self._reading.append((lane, self._reader.start_in(lane, self._layer, ids), rows))

    def wait(self) -> ReadCount:
        """Wait until the rows are read. The device fills them before it runs work that is queued afterwards."""
        if self._epoch != self._reader.epoch:  # its lanes and its slots in host memory may belong to other reads
            raise StoreReadError(
                "these reads were given up when something else was interrupted",
                where=f"layer {self._layer}",
                hint="read again",
            )
        total = ReadCount()
        try:
            while self._parts or self._reading:
                if not self._reading:
                    self._start()
                self._start()
                lane, reading, rows = self._reading[0]
                total.add(reading.wait())
                total.bus_bytes += self._take_in(lane, rows)
                self._reader.free.append(self._reading.popleft()[0])
        except HfFlashError:
            self._give_up()
            raise
        return total

    def _take_in(self, lane: _Lane, rows: Ids) -> int:
        """Copy a lane to the device, and from there into the caller's rows; returns the bytes."""
        transfers, there = self._reader.transfers, lane.there[: len(rows)]
        places = upload(rows, there.device)
        transfers.follow(lane.taken)
        lane.copied = transfers.copy((lane.here[: len(rows)], there))
        transfers.use(lane.copied)
        self._out.index_copy_(0, places, there)
        lane.taken = transfers.mark()
        return there.nbytes

    def _give_up(self) -> None:
        """Free the lanes, after their reads have ended: no read may write to a lane that another gets."""
        while self._reading:
            with suppress(HfFlashError):
                self._reading[0][1].wait()
            self._reader.free.append(self._reading.popleft()[0])


def _parts(ids: Ids, rows: Ids, size: int) -> Sequence[tuple[Ids, Ids]]:
    return [(ids[at : at + size], rows[at : at + size]) for at in range(0, len(ids), size)]
