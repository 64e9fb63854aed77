"""`DeviceExperts`: the experts of one layer on a device such as a GPU.

    flash --read--> ring of pinned host memory --copy--> slots on the device
                    host's slots (if the budget names the host) <--copy-->

How a call flows through it, in `run`. This process waits for the device once, for what the router named.

    1. choose     the router's experts come to the host
    2. make room  the most recently used stay (expert_tiers.py); reads of what is on flash alone begin
    3. compute    experts that are on the device, while others are read and copied
    4. arrive     the host's experts first, then each as it is read: copied on a stream of its own, computed behind it
    5. sum        each token's experts with the router's weights, in the order in which it named them

Results depend on the call alone (contract C3): each expert is multiplied by itself, of few tokens with as many rows as the call
has tokens (compute/device_products.py), and a token's sum is made at the end.
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
from hf_flash.runtime.expert_slots import ExpertSlots
from hf_flash.runtime.expert_tiers import ExpertTiers
from hf_flash.store.experts import SECOND, ExpertLayer

FEW: Final = 16  # tokens of a call, up to which every expert gets a row for each
_SUMMED: Final = 256  # tokens whose experts are summed at a time: of a long prompt all would be large


class SharedOnDevice:
    """What the layers of one model share on a device.

    Args:
        device: of the slots.
        slot_bytes: of a packed slot, of the largest layer. read_bytes: of an expert as it is read from its file.
        passing: slots for experts that are not kept. ring: slots that experts are read into.
    """

    def __init__(self, device: torch.device, slot_bytes: int, read_bytes: int, *, passing: int, ring: int) -> None:
        self.device, self.transfers = device, Transfers(device)
        self.passing_memory = torch.empty(passing, slot_bytes, dtype=torch.uint8, device=device)
        self._computed: list[Any] = [None] * passing  # what has to be over before a slot is overwritten
        self._next = 0
        self.ring_memory = PinnedMemory((ring, read_bytes), self.transfers)
        self.ring = ExpertSlots(0, np.empty((ring, 0), np.uint8))
        self._copied: list[Copied | None] = [None] * ring  # the last copy from each slot

    def release(self) -> None:
        """Give the memory back. Nothing can be computed afterwards."""
        self.transfers.synchronize()
        self.ring_memory.release()
        self.passing_memory = self.passing_memory[:0].clone()

    # --- slots of the ring, in this machine's memory

    def take(self) -> int:
        """A slot of the ring that nothing is copied from any more."""
        slot = self.ring.take()
        if (copied := self._copied[slot]) is not None:
            copied.wait()
        return slot

    def give(self, slot: int, copied: Copied) -> None:
        """A slot of the ring is free when this copy is done."""
        self._copied[slot] = copied
        self.ring.give(slot)

    # --- slots of the device that an expert passes through, one after the other

    def passes(self) -> int:
        """The slot for an expert that is not kept: copies from here on wait for what is computed from it still."""
        slot, self._next = self._next, (self._next + 1) % len(self._computed)
        self.transfers.follow(self._computed[slot])
        return slot

    def passed(self, slot: int) -> None:
        """What is to be computed from such a slot has been told to the device."""
        self._computed[slot] = self.transfers.mark()


class _Rows:
    """Where each pair of a token and an expert is, in the rows that experts compute.

    Args:
        index: int64 [tokens, k] as the router named experts. What is not among them, as the index of an expert elsewhere, adds
            nothing.
        experts: of the layer.

    Attributes:
        used: experts, ascending. last: the token that uses each of them last.
        tokens: int64 [rows] whose row it is.
        of_pair: int64 [tokens * k] the row of a pair. The one behind the last adds nothing.
        bounds: of the rows of each expert.
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
    """A call on its way.

    Attributes:
        stock: the module that is called.
        inputs: [rows, d_model]. out: [rows + 1, d_model], the last of zeros.
        leaving: experts that have to leave the device.
    """

    stock: Any
    rows: _Rows
    inputs: torch.Tensor
    out: torch.Tensor
    leaving: deque[int]


class DeviceExperts:
    """The experts of one layer; copies of the layer share it.

    Args:
        layer: whose experts.
        index: among the layers with experts.
        engine: of the model.
        shared: with the other layers.
        on_device: slots there. on_host: slots of this machine's memory; 0: it keeps none.
    """

    def __init__(
        self, layer: ExpertLayer, index: int, engine: ExpertEngine, shared: SharedOnDevice, on_device: int, on_host: int
    ) -> None:
        self._layer, self._index, self._engine, self._shared = layer, index, engine, shared
        self.memory = torch.empty(on_device, layer.packed_bytes, dtype=torch.uint8, device=shared.device)
        self.host_memory = PinnedMemory((on_host, layer.packed_bytes), shared.transfers)
        self.tiers = ExpertTiers(layer.experts, on_device, on_host)
        self._up = DeviceProducts(layer, layer.first, engine.dtype, shared.device)
        self._down = DeviceProducts(layer, SECOND, engine.dtype, shared.device)
        self._at = engine.reader.places.at(index).tolist()

    def release(self) -> None:
        """Give the slots' memory back. Nothing can be computed afterwards."""
        self._shared.transfers.synchronize()
        self.tiers.device.release()
        self.tiers.host.release()
        self.memory = self.memory[:0].clone()
        self.host_memory.release()

    # --- the main path

    def run(self, stock: Any, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """What the layer makes of some tokens, [tokens, d_model], on the device.

        Args:
            stock: the module that is called: a copy of the layer has its own.
            x: [tokens, d_model] in the dtype of compute. index: int64 [tokens, k]. weights: [tokens, k].
        """
        start, transfers, tiers = perf_counter(), self._shared.transfers, self.tiers
        rows = _Rows(index.cpu().numpy(), self._layer.experts)  # here this process waits for the device
        room = tiers.make_room(rows.used, rows.last, rows.count)
        absent = [*((expert, True) for expert in room.kept), *((expert, False) for expert in room.passing)]
        on_host = [(expert, kept) for expert, kept in absent if tiers.waits(expert)]
        reads = deque((expert, kept) for expert, kept in absent if not tiers.waits(expert))
        arriving: deque[_Arriving] = deque()
        self._start_reads(reads, arriving)
        transfers.follow(transfers.mark())
        inputs = x.index_select(0, upload(rows.tokens, x.device))
        out = torch.zeros(len(inputs) + 1, self._layer.width, dtype=self._engine.dtype, device=x.device)
        call = _Call(stock, rows, inputs, out, deque([*room.leaving, *room.leaving_later]))
        self._engine.counters.manage_s += perf_counter() - start
        for expert in room.hits:
            self._compute(call, expert, self.memory[int(tiers.device.slot_of[expert])])
        if room.leaving_later:
            transfers.follow(transfers.mark())
        for expert, kept in sorted(on_host, key=lambda some: not some[1]):
            self._arrive_from_host(call, expert, kept=kept)
        while reads or arriving:
            self._start_reads(reads, arriving)
            self._arrive_from_flash(call, arriving.popleft())
        while call.leaving:
            self._leave(call.leaving.popleft())
        self._count(rows, len(room.hits), len(on_host))
        return self._sum(rows, out, weights)

    def _start_reads(self, reads: deque[tuple[int, bool]], arriving: deque[_Arriving]) -> None:
        """Begin to read what the ring has free slots for."""
        memory = self._shared.ring_memory.tensor.numpy()
        while reads and self._shared.ring.free:
            expert, kept = reads.popleft()
            slot = self._shared.take()
            arriving.append(_Arriving(expert, kept, slot, self._engine.reader.start(self._index, expert, memory, slot)))

    def _arrive_from_flash(self, call: _Call, came: _Arriving) -> None:
        """Wait for an expert, copy its parts to a packed slot of the device, and compute with it."""
        came.reading.wait()
        counters, ring = self._engine.counters, self._shared.ring_memory.tensor[came.slot]
        counters.io_s += came.reading.waited_s
        counters.add_read(came.reading.count)
        came.reading.check_scales(ring.numpy())
        sources = [ring[begin : begin + size] for begin, size in zip(self._at[came.expert], self._layer.ranges, strict=True)]
        self._shared.give(came.slot, self._arrive(call, came.expert, sources, self._layer.packed_at, kept=came.kept))

    def _arrive_from_host(self, call: _Call, expert: int, *, kept: bool) -> None:
        slot = int(self.tiers.host.slot_of[expert])
        self._arrive(call, expert, [self.host_memory.tensor[slot]], (0,), kept=kept)
        if kept or not self.tiers.belongs_on_host(expert):
            self.tiers.host.drop(expert)  # what is copied over it later is copied after this

    def _arrive(
        self, call: _Call, expert: int, sources: Sequence[torch.Tensor], places: Sequence[int], *, kept: bool
    ) -> Copied:
        """Copy an expert to the device and compute with it. Returns the last of the copies.

        Args:
            sources: contiguous bytes of this machine's memory. places: the byte of a packed slot where each of them goes.
            kept: whether it stays on the device.
        """
        shared, device = self._shared, self.tiers.device
        if kept and not device.free:
            self._leave(call.leaving.popleft())
        number = device.take() if kept else shared.passes()
        slot = self.memory[number] if kept else shared.passing_memory[number, : self._layer.packed_bytes]
        for source, place in zip(sources, places, strict=False):
            copied = shared.transfers.copy(source, slot[place : place + len(source)])
        shared.transfers.use(copied)
        self._compute(call, expert, slot)
        if kept:
            device.put(expert, number)
        else:
            self._to_host(expert, slot)
            shared.passed(number)
        return copied

    def _leave(self, expert: int) -> None:
        """An expert leaves the device, for the host if it belongs there."""
        device = self.tiers.device
        self._to_host(expert, self.memory[int(device.slot_of[expert])])
        device.drop(expert)

    def _to_host(self, expert: int, slot: torch.Tensor) -> None:
        host = self.tiers.host
        if self.tiers.belongs_on_host(expert) and not self.tiers.waits(expert) and host.free:
            place = host.take()
            self._shared.transfers.copy(slot, self.host_memory.tensor[place])
            host.put(expert, place)

    # --- what is computed

    def _compute(self, call: _Call, expert: int, slot: torch.Tensor) -> None:
        """Tell the device to multiply the rows of an expert.

        Nothing is done for several experts at once, not even the gate: what some processors make of a number depends on how
        many stand beside it.
        """
        start, stock, rows = perf_counter(), call.stock, call.rows.bounds[expert]
        products = self._up.multiply(call.inputs[rows], slot)
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
        """Each token's experts with the router's weights, in its order; as `grouped_mm` of transformers sums them."""
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
