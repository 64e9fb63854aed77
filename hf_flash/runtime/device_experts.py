"""`DeviceExperts`: the experts of one layer on a device such as a GPU.

    flash --read--> ring of pinned host memory --copy--> slots on the device
                    host's slots (if the budget names the host) <--copy-->

How a call flows through it, in `run`. This process waits for the device only once, for the router's choice.

    1. choose     the ids of the router's experts are copied to the host
    2. make room  the most recently used experts stay (expert_tiers.py); reads of experts that are only on flash begin
    3. compute    experts that are on the device, while others are read and copied
    4. arrive     the host's experts first, then each as it is read: copied on a separate stream, computed after the copy
    5. sum        each token's experts with the router's weights, in the order in which the router named them

Results depend on the call alone (contract C3): each expert is multiplied separately, for few tokens always with as many rows as
the call has tokens (compute/device_products.py), and a token's sum is made at the end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from time import perf_counter
from typing import Any, Final, NamedTuple

import numpy as np
import torch

from hf_flash.base.arrays import Ids
from hf_flash.compute.device_products import DeviceProducts
from hf_flash.compute.expert_gate import stock_gate
from hf_flash.compute.transfers import Copied, PinnedMemory, Transfers, upload
from hf_flash.reading.experts import ExpertReading
from hf_flash.runtime.engine import ExpertEngine
from hf_flash.runtime.expert_tiers import ExpertTiers
from hf_flash.store.experts import SECOND, ExpertLayer

FEW: Final = 16  # up to so many tokens in a call, every expert gets a row for each of them
_SUMMED: Final = 256  # tokens whose experts are summed at a time: for all of a long prompt, the buffer would be large


class Ring:
    """Slots of pinned memory that experts are read into, one after the other, before they are copied to the device.

    Args:
        slots: number of slots.
        nbytes: size of a slot: of an expert as it is read from its file.
        transfers: copies from the slots.
    """

    def __init__(self, slots: int, nbytes: int, transfers: Transfers) -> None:
        self.memory = PinnedMemory((slots, nbytes), transfers)
        self._copied: list[Copied | None] = [None] * slots  # the last copy from each slot
        self.forget()

    def take(self, *, is_needed: bool) -> int | None:
        """Take a slot, once the last copy from it is done.

        Args:
            is_needed: whether to wait for a copy that may just have begun. If not, the last free slot is not taken.

        Returns:
            The slot; `None`: there is none to take.
        """
        if not self._free or (len(self._free) == 1 and not is_needed):
            return None
        slot = self._free.popleft()
        if (copied := self._copied[slot]) is not None:
            copied.wait()
        return slot

    def give(self, slot: int, copied: Copied) -> None:
        """Give a slot back. It is free when this copy is done."""
        self._copied[slot] = copied
        self._free.append(slot)

    def forget(self) -> None:
        """Make all slots free. Call it when no read or copy is under way."""
        self._free = deque(range(len(self._copied)))


class SharedOnDevice:
    """Memory and transfers that the layers of one model share on a device.

    Args:
        device: the device.
        slot_bytes: size of a packed slot of the largest layer.
        read_bytes: size of an expert as it is read from its file.
        passing: number of slots for experts that are not kept.
        ring: number of slots that experts are read into.
    """

    def __init__(self, device: torch.device, slot_bytes: int, read_bytes: int, *, passing: int, ring: int) -> None:
        self.device, self.transfers = device, Transfers(device)
        self.passing_memory = torch.empty(passing, slot_bytes, dtype=torch.uint8, device=device)
        self._computed: list[Any] = [None] * passing  # per slot, the work that must be done before it is overwritten
        self._next = 0
        self.ring = Ring(ring, read_bytes, self.transfers)

    def release(self) -> None:
        """Give the memory back. Nothing can be computed afterwards."""
        self.transfers.synchronize()
        self.ring.memory.release()
        self.passing_memory = self.passing_memory.new_empty((0, 0))

    def passes(self) -> int:
        """The next passing slot. Later copies wait until the device has computed with what the slot holds now."""
        slot, self._next = self._next, (self._next + 1) % len(self._computed)
        self.transfers.follow(self._computed[slot])
        return slot

    def passed(self, slot: int) -> None:
        """Record that all work with this passing slot has been queued on the device."""
        self._computed[slot] = self.transfers.mark()


class _Rows:
    """The rows that experts compute, and the row of each pair of a token and an expert.

    Args:
        index: int64 [tokens, k] the experts that the router named. An index outside the layer's experts, such as that of an
            expert elsewhere, adds nothing.
        experts: number of experts in the layer.

    Attributes:
        count, k: tokens, and experts of each.
        used: the experts in use, ascending.
        last: the last token that uses each of them.
        tokens: int64 [rows] the token of each row.
        of_pair: int64 [tokens * k] the row of each pair; the index after the last row for a pair that adds nothing.
        bounds: the rows of each expert, as a slice.
    """

    def __init__(self, index: Ids, experts: int) -> None:
        count, k = index.shape
        flat = index.reshape(-1)
        pairs = np.flatnonzero((flat >= 0) & (flat < experts))
        pairs = pairs[np.argsort(flat[pairs], kind="stable")]  # by expert, then by token
        self.used, begin, sizes = np.unique(flat[pairs], return_index=True, return_counts=True)
        token = pairs // k
        self.last: Ids = token[begin + sizes - 1]
        self.count, self.k = count, k
        number = np.repeat(np.arange(len(self.used)), sizes)
        if count <= FEW:
            self.tokens = np.tile(np.arange(count), len(self.used))
            row, ends = number * count + token, np.arange(1, len(self.used) + 1) * count
        else:
            self.tokens = token
            row, ends = np.arange(len(pairs)), begin + sizes
        self.of_pair: Ids = np.full(len(flat), len(self.tokens), np.int64)
        self.of_pair[pairs] = row
        begins = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
        self.bounds = dict(zip(self.used.tolist(), map(slice, begins.tolist(), ends.tolist()), strict=True))


class _Arriving(NamedTuple):
    """An expert that is being read into a slot of the ring."""

    expert: int
    kept: bool
    slot: int
    reading: ExpertReading


class _Call(NamedTuple):
    """A call while it is computed.

    Attributes:
        stock: the module that is called.
        rows: the rows of its experts.
        x: inputs [tokens, d_model]; with more than `FEW` tokens [rows, d_model], since each expert has rows of its own.
        out: [rows + 1, d_model], with a last row of zeros.
        leaving: experts that have to leave the device.
    """

    stock: Any
    rows: _Rows
    x: torch.Tensor
    out: torch.Tensor
    leaving: deque[int]

    def inputs(self, expert: int) -> torch.Tensor:
        """The inputs of an expert, [its rows, d_model]."""
        return self.x if self.rows.count <= FEW else self.x[self.rows.bounds[expert]]


class _Arrived(NamedTuple):
    """An expert on its way into a slot of the device.

    Attributes:
        expert: its index.
        kept: whether it stays on the device.
        number: the slot's number, among the layer's slots if the expert is kept, else among the passing slots.
        memory: the slot's memory.
        copied: the copy.
    """

    expert: int
    kept: bool
    number: int
    memory: torch.Tensor
    copied: Copied


class DeviceExperts:
    """The experts of one layer. Copies of the layer share it.

    Args:
        layer: the experts' places and shapes.
        index: number of the layer among those with experts.
        engine: the model's engine.
        shared: what all layers share.
        memory: uint8 [slots, bytes of a packed slot] on the device.
        on_host: number of slots in this machine's memory; 0: it keeps no experts.
    """

    def __init__(
        self, layer: ExpertLayer, index: int, engine: ExpertEngine, shared: SharedOnDevice, memory: torch.Tensor, on_host: int
    ) -> None:
        self._layer, self._index, self._engine, self._shared = layer, index, engine, shared
        self.memory = memory
        self.host_memory = PinnedMemory((on_host, layer.packed_bytes), shared.transfers)
        self.tiers = ExpertTiers(layer.experts, len(memory), on_host)
        self._up = DeviceProducts(layer, layer.first, engine.dtype, shared.device)
        self._down = DeviceProducts(layer, SECOND, engine.dtype, shared.device)
        self._at = engine.reader.places.at(index).tolist()

    def release(self) -> None:
        """Give the slots' memory back. Nothing can be computed afterwards."""
        self._shared.transfers.synchronize()
        self.tiers.device.release()
        self.tiers.host.release()
        self.memory = self.memory.new_empty((0, self._layer.packed_bytes))
        self.host_memory.release()

    # --- the main path

    def run(self, stock: Any, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The layer's output for some tokens, [tokens, d_model], on the device.

        Args:
            stock: the module that is called; a copy of the layer is another one.
            x: [tokens, d_model] in the compute dtype.
            index: int64 [tokens, k] the experts that the router named.
            weights: [tokens, k] the router's weights.
        """
        with self._shared.transfers.turn():
            return self._run(stock, x, index, weights)

    def _run(self, stock: Any, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        start, transfers, tiers = perf_counter(), self._shared.transfers, self.tiers
        rows = _Rows(index.cpu().numpy(), self._layer.experts)  # waits until the device has done all work queued so far
        room = tiers.make_room(rows.used, rows.last, rows.count)
        absent = [*((expert, True) for expert in room.kept), *((expert, False) for expert in room.passing)]
        on_host = deque((expert, kept) for expert, kept in absent if tiers.waits(expert))
        reads = deque((expert, kept) for expert, kept in absent if not tiers.waits(expert))
        arriving: deque[_Arriving] = deque()
        self._start_reads(reads, arriving)
        if rows.count > FEW:
            x = x.index_select(0, upload(rows.tokens, x.device))
        out = torch.zeros(len(rows.tokens) + 1, self._layer.width, dtype=self._engine.dtype, device=x.device)
        call = _Call(stock, rows, x, out, deque(room.leaving))
        self._engine.counters.manage_s += perf_counter() - start
        host_hits = len(on_host)
        coming = deque[_Arrived]()
        while on_host and on_host[0][1] and (tiers.device.free or call.leaving):  # copies run while hits are computed
            coming.append(self._bring_from_host(call, on_host))
        for expert in room.hits:
            self._compute(call, expert, self.memory[int(tiers.device.slot_of[expert])])
        if room.leaving_later:
            transfers.follow(transfers.mark())
            call.leaving.extend(room.leaving_later)
        while coming:
            self._take_in(call, coming.popleft())
        while on_host:
            self._take_in(call, self._bring_from_host(call, on_host))
        while reads or arriving:
            self._start_reads(reads, arriving)
            self._take_in(call, self._bring_from_flash(call, arriving.popleft()))
        while call.leaving:
            self._leave(call.leaving.popleft())
        self._count(rows, len(room.hits), host_hits)
        return self._sum(rows, out, weights)

    # --- how experts come and go

    def _start_reads(self, reads: deque[tuple[int, bool]], arriving: deque[_Arriving]) -> None:
        """Start to read experts, as far as the ring has free slots."""
        ring, reader = self._shared.ring, self._engine.reader
        while reads and (slot := ring.take(is_needed=not arriving)) is not None:
            expert, kept = reads.popleft()
            reading = reader.start(self._index, expert, ring.memory.tensor.numpy(), slot)
            arriving.append(_Arriving(expert, kept, slot, reading))

    def _bring_from_flash(self, call: _Call, came: _Arriving) -> _Arrived:
        """Wait until an expert is read, and copy its parts to a packed slot of the device."""
        came.reading.wait()
        counters, ring = self._engine.counters, self._shared.ring
        counters.io_s += came.reading.waited_s
        counters.add_read(came.reading.count)
        slot = ring.memory.tensor[came.slot]
        came.reading.check_scales(slot.numpy())
        places = zip(self._at[came.expert], self._layer.packed_at, self._layer.ranges, strict=False)
        arrived = self._bring(call, came.expert, [(slot[at : at + size], to) for at, to, size in places], kept=came.kept)
        ring.give(came.slot, arrived.copied)
        return arrived

    def _bring_from_host(self, call: _Call, waiting: deque[tuple[int, bool]]) -> _Arrived:
        expert, kept = waiting.popleft()
        slot = int(self.tiers.host.slot_of[expert])
        arrived = self._bring(call, expert, [(self.host_memory.tensor[slot], 0)], kept=kept)
        if kept or not self.tiers.belongs_on_host(expert):
            self.tiers.host.drop(expert)  # safe at once: a later copy into this slot runs after this one
        return arrived

    def _bring(self, call: _Call, expert: int, parts: Sequence[tuple[torch.Tensor, int]], *, kept: bool) -> _Arrived:
        """Start to copy an expert to the device.

        Args:
            parts: contiguous bytes in this machine's memory, each with its offset in the packed slot.
            kept: whether the expert stays on the device.
        """
        shared, device = self._shared, self.tiers.device
        if kept and not device.free:
            self._leave(call.leaving.popleft())
        number = device.take() if kept else shared.passes()
        memory = self.memory[number] if kept else shared.passing_memory[number, : self._layer.packed_bytes]
        copied = shared.transfers.copy(*((source, memory[at : at + len(source)]) for source, at in parts))
        return _Arrived(expert, kept, number, memory, copied)

    def _take_in(self, call: _Call, arrived: _Arrived) -> None:
        """Compute with an expert once it is copied. Then it stays on the device, or goes on to the host if it belongs there."""
        self._shared.transfers.use(arrived.copied)
        self._compute(call, arrived.expert, arrived.memory)
        if arrived.kept:
            self.tiers.device.put(arrived.expert, arrived.number)
        else:
            self._to_host(arrived.expert, arrived.memory)
            self._shared.passed(arrived.number)

    def _leave(self, expert: int) -> None:
        """Remove an expert from the device, and copy it to the host if it belongs there."""
        device = self.tiers.device
        self._to_host(expert, self.memory[int(device.slot_of[expert])])
        device.drop(expert)

    def _to_host(self, expert: int, slot: torch.Tensor) -> None:
        host = self.tiers.host
        if self.tiers.belongs_on_host(expert) and not self.tiers.waits(expert) and host.free:
            place = host.take()
            self._shared.transfers.copy((slot, self.host_memory.tensor[place]))
            host.put(expert, place)

    # --- what is computed

    def _compute(self, call: _Call, expert: int, slot: torch.Tensor) -> None:
        """Queue the products of one expert's rows on the device.

        Nothing is done for several experts at once, not even the gate: on some processors the result for a number depends on
        how many others are computed with it.
        """
        start, stock, rows = perf_counter(), call.stock, call.rows.bounds[expert]
        products = self._up.multiply(call.inputs(expert), slot)
        self._add_bias(products, stock, self._layer.first, expert)
        found = self._down.multiply(stock_gate(stock, products), slot)
        self._add_bias(found, stock, SECOND, expert)
        call.out[rows] = stock.post_expert_norm(found) if stock.has_post_expert_norm else found
        self._engine.counters.compute_s += perf_counter() - start

    @staticmethod
    def _add_bias(products: torch.Tensor, stock: Any, param: str, expert: int) -> None:
        if (bias := stock._bias_of(param)) is not None:
            products.add_(bias[expert])

    def _sum(self, rows: _Rows, out: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Sum each token's experts with the router's weights, in the router's order, as `grouped_mm` of transformers does."""
        of_pair = upload(rows.of_pair, out.device).view(rows.count, rows.k)
        total = torch.empty(rows.count, out.shape[1], dtype=torch.promote_types(out.dtype, weights.dtype), device=out.device)
        for at in range(0, rows.count, _SUMMED):
            part = slice(at, at + _SUMMED)
            found = out.index_select(0, of_pair[part].reshape(-1)).view(-1, rows.k, out.shape[1])
            total[part] = (found * weights[part].unsqueeze(-1)).sum(dim=1)
        return total

    def _count(self, rows: _Rows, hits: int, host_hits: int) -> None:
        count, transfers, used = self._engine.counters, self._shared.transfers, len(rows.used)
        count.calls += 1
        count.tokens += rows.count
        count.selected += used
        count.hits += hits
        count.host_hits += host_hits
        count.missing_bytes += (used - hits - host_hits) * self._layer.expert_bytes
        count.bus_bytes += transfers.copied_bytes
        transfers.copied_bytes = 0
