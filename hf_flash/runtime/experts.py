"""`FlashExperts`: the experts of one layer, which stay in the checkpoint's own files.

How tokens flow through it, in `_run`:

    1. choose     the router has named the experts of each token: nothing is guessed
    2. make room  the least recently used experts go (expert_slots.py)
    3. read       missing experts are read into free slots, all at once (reading/experts.py)
    4. compute    experts in memory first, while the others arrive; then each as it arrives
    5. count      bytes, hits, seconds

For a few tokens, as in decoding, all of this is one call of the compiled part (expert_step.py). A call that uses more experts
than there are slots, as a prompt does, reads every missing expert once and multiplies all of its tokens with it; those that get
no slot are dropped again. Results do not depend on what is in memory (contract C3): each pair of a token and an expert is
computed separately, and a token's sum is made at the end, in the order in which the router named its experts.

The module has the stock class as a base class: its activation (`_apply_gate`, `act_fn`), biases, norm and names stay.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any, Final, NamedTuple

import numpy as np
import torch

from hf_flash.base.arrays import Bytes, Ids
from hf_flash.compute.expert_gate import stock_gate
from hf_flash.compute.expert_products import ExpertProducts, Group, Memory
from hf_flash.errors import UsageError
from hf_flash.reading.experts import ExpertReading
from hf_flash.runtime.device_experts import DeviceExperts
from hf_flash.runtime.engine import ExpertEngine
from hf_flash.runtime.expert_slots import ExpertSlots, PassingSlots
from hf_flash.runtime.expert_step import ExpertTokenStep, expert_step
from hf_flash.runtime.flash_weights import OnFlash, is_plain
from hf_flash.runtime.inference_only import usable_engine, without_backward
from hf_flash.runtime.transformers_model import mark_as_initialized
from hf_flash.store.experts import SECOND, ExpertLayer

_SHARED: Final = (  # by copies of a layer
    "engine", "layer", "window", "passing", "_wide", "_at", "_up", "_down", "step", "on_device",
)  # fmt: skip
_SUMMED: Final = 256  # tokens whose experts are summed at a time: for all of a long prompt, the buffer would be large


class _Arriving(NamedTuple):
    """An expert on its way into a slot."""

    expert: int
    slot: int
    reading: ExpertReading
    kept: bool


class _Call:
    """Pairs of tokens and experts, in the order in which experts are computed.

    Args:
        top_k_index: int64 [tokens, k] the experts that the router named.
        experts: number of experts in the layer. An index outside of these, such as that of an expert elsewhere, adds nothing.
    """

    def __init__(self, top_k_index: Ids, experts: int) -> None:
        self.tokens, self.k = top_k_index.shape
        flat = top_k_index.reshape(-1)
        self.valid = (flat >= 0) & (flat < experts)
        self.used, first = np.unique(flat[::-1][self.valid[::-1]], return_index=True)
        at = np.flatnonzero(self.valid[::-1])[first]
        self.last: Ids = (len(flat) - 1 - at) // self.k
        self._flat, self._experts = flat, experts

    def experts_of(self, pairs: Ids) -> Ids:
        """The expert of each of these pairs."""
        return self._flat[pairs]

    def sort(self, order: Sequence[int]) -> None:
        """Order the pairs by expert: first those of the first expert in `order`, then of the second, and so on."""
        rank = np.full(self._experts + 1, len(order), np.int64)
        rank[list(order)] = np.arange(len(order))
        key = rank[np.where(self.valid, self._flat, self._experts)]
        self.pairs: Ids = np.argsort(key, kind="stable")
        self.row: Ids = np.empty_like(self.pairs)
        self.row[self.pairs] = np.arange(len(self.pairs))
        ends = np.cumsum(np.bincount(key, minlength=len(order) + 1)).tolist()
        self.bounds = dict(zip(order, zip([0, *ends], ends, strict=False), strict=False))


class FlashExperts(OnFlash):
    """In place of a module of experts, which [`put_on_flash`] turns into it."""

    layer: ExpertLayer
    index: int  # among the layers with experts
    engine: ExpertEngine | None = None
    on_device: DeviceExperts | None = None  # if it computes on one
    step: ExpertTokenStep | None = None

    def attach(self, engine: ExpertEngine, slots: ExpertSlots, passing: PassingSlots, wide: torch.Tensor) -> None:
        """Give the layer its engine and slots. Called once the rest of the model is loaded.

        Args:
            engine: what all layers share.
            slots: the layer's slots.
            passing: slots that all layers share.
            wide: float32 scratch, as in [`Memory`].
        """
        self.engine, self.window, self.passing = engine, slots, passing
        self._wide = wide
        self._at = engine.reader.places.at(self.index)
        self._up = ExpertProducts(self.layer, self.layer.first, self._at, engine.dtype)
        self._down = ExpertProducts(self.layer, SECOND, self._at, engine.dtype)
        self.step = expert_step(self, self.layer, self.index, engine.reader, engine.dtype, (slots, passing))

    def attach_on_device(self, engine: ExpertEngine, on_device: DeviceExperts, interrupted: PassingSlots) -> None:
        """As [`attach`], for a layer that computes on a device.

        Args:
            engine: what all layers share.
            on_device: the layer's experts on the device.
            interrupted: passing slots without memory, which only make the slots of all layers forget.
        """
        self.engine, self.on_device, self.passing, self.window = engine, on_device, interrupted, on_device.tiers.device

    @property
    def window_bytes(self) -> int:
        """Bytes of the layer's slots, on the device if it computes on one."""
        return self.window.memory.nbytes if self.on_device is None else self.on_device.memory.nbytes

    def release(self) -> None:
        """Give the slots' memory back. Nothing can be computed afterwards."""
        if self.on_device is None:
            self.window.release()
        else:
            self.on_device.release()

    def __deepcopy__(self, memo: dict[int, Any]) -> FlashExperts:
        """A layer with its own parameters. Weights on flash are only read, so everything that reads them is shared."""
        memo |= {id(self.__dict__[name]): self.__dict__[name] for name in _SHARED if name in self.__dict__}
        copied: FlashExperts = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__dict__, memo))  # type: ignore[no-untyped-call]
        if self.engine is not None:
            copied._runtime = self.engine.runtime()  # it refers only to the original layers: no cycle
        return copied

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # numpy, locks, system calls: not for tracing
    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        engine = usable_engine(self.engine, self, hidden_states, self.layer.width, self.layer.name)
        with engine.lock, torch.no_grad(), torch.autocast(hidden_states.device.type, enabled=False):
            engine.check_open()
            x = hidden_states.detach().to(engine.dtype).contiguous()
            index = top_k_index.detach().to(torch.int64).contiguous()
            weights = top_k_weights.detach().contiguous()
            if index.ndim != 2 or weights.shape != index.shape or x.shape != (len(index), self.layer.width):
                raise UsageError(
                    "experts are called with tokens, and the experts of each of them with their weights",
                    where=self.layer.name,
                    expected=f"[tokens, {self.layer.width}], [tokens, k], [tokens, k]",
                    got=f"{list(x.shape)}, {list(index.shape)}, {list(weights.shape)}",
                )
            with self._whole_or_nothing(engine):
                if self.on_device is not None:
                    out = self.on_device.run(self, x, index, weights)
                elif x.is_cpu:
                    out = self._on_cpu(engine, x, index.numpy(), weights)
                else:  # the rest of the model is on a device
                    out = self._on_cpu(engine, x.cpu(), index.cpu().numpy(), weights.cpu()).to(x.device)
        return without_backward(out.to(hidden_states.dtype), hidden_states, top_k_weights)

    def _on_cpu(self, engine: ExpertEngine, x: torch.Tensor, index: Ids, weights: torch.Tensor) -> torch.Tensor:
        if self.step is not None and self.step.takes(len(x), weights):
            out = self._in_one_call(engine, self.step, x, index, weights)
        else:
            engine.heap.prepare(x.nbytes)
            call = _Call(index, self.layer.experts)
            out = self._sum(call, self._run(engine, x, call), weights)
        if self.index == len(engine.reader.layers) - 1:
            engine.heap.prepare(0)
        return out

    def look_ahead(self, index: Ids) -> None:
        """Start to read experts that the next call will probably use. The guess never decides what is computed.

        Args:
            index: int64 [1, k] experts, contiguous.
        """
        engine = self.engine
        if engine is None or self.step is None:
            return
        with engine.lock:
            if engine.closed or self.passing.interrupted:
                return
            self.passing.interrupted = True
            engine.counters.ahead += self.step.ahead(index)
            engine.counters.read_bytes += self.step.call.read_bytes
            engine.counters.reads += self.step.call.chunks
            self.passing.interrupted = False

    # --- the main path

    def _in_one_call(
        self, engine: ExpertEngine, step: ExpertTokenStep, x: torch.Tensor, index: Ids, weights: torch.Tensor
    ) -> torch.Tensor:
        """All steps for a few tokens, in one call of the compiled part."""
        start, count, found = perf_counter(), engine.counters, step.call
        out = step.run(x, index, weights, (self._bias_here(self.layer.first), self._bias_here(SECOND)))
        if found.failed:
            reading = ExpertReading(engine.reader, self.index, found.failed - 1)
            reading.waited(found.error, 0.0)
        if found.damaged:
            raise ExpertReading(engine.reader, self.index, found.damaged - 1).damaged()
        if found.error:
            raise MemoryError(f"no memory for {index.size} pairs of a token and an expert")
        count.manage_s += found.managed_s
        count.io_s += found.waited_s
        count.compute_s += perf_counter() - start - found.managed_s - found.waited_s
        count.read_bytes += found.read_bytes
        count.reads += found.chunks
        count.ahead_used += found.ahead_used
        self._count(engine, len(x), found.used, found.hits)
        return out

    def _run(self, engine: ExpertEngine, x: torch.Tensor, call: _Call) -> torch.Tensor:
        """Each expert's output for each of its tokens, [pairs, d_model] in the order of `call.pairs`."""
        start = perf_counter()
        if self.step is not None:
            self.step.settle()
        room = self.window.make_room(call.used, call.last, call.tokens)
        missing = deque([*((expert, True) for expert in room.kept), *((expert, False) for expert in room.passing)])
        call.sort([*room.hits, *room.kept, *room.passing])
        out = torch.zeros(len(call.pairs), self.layer.width, dtype=engine.dtype, device="cpu")
        arriving: deque[_Arriving] = deque()
        self._start_reads(engine, missing, arriving)
        engine.counters.manage_s += perf_counter() - start
        self._compute(engine, x, call, self._groups(call, room.hits, self.window), self.window.memory, arriving, out)
        for expert in room.leaving:
            self.window.drop(expert)
        while missing or arriving:
            self._start_reads(engine, missing, arriving)
            came = arriving.popleft()
            self._take_in(engine, came)
            group = Group(came.expert, came.slot, *call.bounds[came.expert])
            self._compute(engine, x, call, [group], (self.window if came.kept else self.passing).memory, arriving, out)
            if not came.kept:
                self.passing.give(came.slot)
        self._count(engine, call.tokens, len(call.used), len(room.hits))
        return out

    def _start_reads(self, engine: ExpertEngine, missing: deque[tuple[int, bool]], arriving: deque[_Arriving]) -> None:
        """Start to read missing experts, as far as there are free slots, in the order in which they will be computed."""
        while missing:
            expert, kept = missing[0]
            slots: ExpertSlots | PassingSlots = self.window if kept else self.passing
            if not slots.free:
                return
            missing.popleft()
            slot = slots.take()
            arriving.append(_Arriving(expert, slot, engine.reader.start(self.index, expert, slots.memory, slot), kept))

    def _take_in(self, engine: ExpertEngine, came: _Arriving) -> None:
        """Wait for an expert that is being read, check it, and put it into the window if it is kept."""
        came.reading.wait()
        engine.counters.io_s += came.reading.waited_s
        engine.counters.add_read(came.reading.count)
        came.reading.check_scales((self.window if came.kept else self.passing).memory[came.slot])
        if came.kept:
            self.window.put(came.expert, came.slot)

    def _compute(
        self, engine: ExpertEngine, x: torch.Tensor, call: _Call, groups: Sequence[Group], slots: Bytes,
        arriving: deque[_Arriving], out: torch.Tensor,
    ) -> None:  # fmt: skip
        """Multiply tokens with experts, a few experts at once. During the last product, wait for the next expert to arrive."""
        start, memory = perf_counter(), Memory(slots, self._wide)
        reading = arriving[0].reading if arriving else None
        waited = reading.waited_s if reading else 0.0
        for some, is_last in self._together(groups):
            if not some:
                break
            begin, end = some[0].begin, some[-1].end
            pairs = call.pairs[begin:end]
            rows = x if call.tokens == 1 and len(pairs) == len(some) else x.index_select(0, torch.from_numpy(pairs // call.k))
            hidden = self._activate(self._up.multiply(rows, some, memory), call, pairs)
            out[begin:end] = self._finish(self._down.multiply(hidden, some, memory, reading if is_last else None), call, pairs)
        engine.counters.compute_s += perf_counter() - start - ((reading.waited_s - waited) if reading else 0.0)

    def _together(self, groups: Sequence[Group]) -> Iterator[tuple[Sequence[Group], bool]]:
        """Experts to compute at once, and whether they are the last: all of them if each has few tokens, else each alone."""
        few = [group for group in groups if self._up.few(group.end - group.begin)]
        parts = [[group] for group in groups] if len(few) < len(groups) else [list(groups)]
        for number, part in enumerate(parts):
            yield part, number == len(parts) - 1

    @staticmethod
    def _groups(call: _Call, experts: Sequence[int], slots: ExpertSlots) -> list[Group]:
        return [Group(expert, int(slots.slot_of[expert]), *call.bounds[expert]) for expert in experts]

    # --- what the stock module does between and behind the products

    def _activate(self, products: torch.Tensor, call: _Call, pairs: Ids) -> torch.Tensor:
        """The hidden values [pairs, neurons], by the stock module's own code."""
        self._add_bias(products, self.layer.first, call, pairs)
        return stock_gate(self, products).contiguous()

    def _finish(self, products: torch.Tensor, call: _Call, pairs: Ids) -> torch.Tensor:
        stock: Any = self
        self._add_bias(products, SECOND, call, pairs)
        if not stock.has_post_expert_norm:
            return products
        normed: torch.Tensor = stock.post_expert_norm(products.to(self.engine.device))  # type: ignore[union-attr]
        return normed.cpu()

    def _bias_here(self, param: str) -> torch.Tensor | None:
        """[`_bias_of`] in this machine's memory. It is copied for every call, since users may change it without a trace."""
        bias = self._bias_of(param)
        return None if bias is None else bias.cpu()

    def _bias_of(self, param: str) -> torch.Tensor | None:
        """The biases of all experts [experts, outputs] in the compute dtype, if there are any."""
        stock: Any = self
        if not stock.has_bias:
            return None
        bias: torch.Tensor = getattr(self, f"{param}_bias")
        wanted = (self.layer.experts, sum(piece.outputs for piece in self.layer.of(param)))
        if tuple(bias.shape) != wanted or not is_plain(bias):
            raise UsageError(
                "these biases do not fit the experts", where=f"{self.layer.name}.{param}_bias", expected=wanted, got=bias.shape
            )
        return bias.detach().to(self.engine.dtype).contiguous()  # type: ignore[union-attr]  # it is called with one

    def _add_bias(self, products: torch.Tensor, param: str, call: _Call, pairs: Ids) -> None:
        bias = self._bias_here(param)
        if bias is not None:
            products.add_(bias.index_select(0, torch.from_numpy(call.experts_of(pairs))))

    def _sum(self, call: _Call, pairs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Sum each token's experts with the router's weights, in the router's order, as `grouped_mm` of transformers does."""
        rows = torch.from_numpy(call.row).view(call.tokens, call.k)
        out = torch.empty(call.tokens, self.layer.width, dtype=torch.promote_types(pairs.dtype, weights.dtype), device="cpu")
        for at in range(0, call.tokens, _SUMMED):
            part = slice(at, at + _SUMMED)
            found = pairs.index_select(0, rows[part].reshape(-1)).view(-1, call.k, self.layer.width)
            out[part] = (found * weights[part].unsqueeze(-1)).sum(dim=1)
        return out

    def _count(self, engine: ExpertEngine, tokens: int, used: int, hits: int) -> None:
        count = engine.counters
        count.calls += 1
        count.tokens += tokens
        count.selected += used
        count.hits += hits
        count.missing_bytes += (used - hits) * self.layer.expert_bytes

    # --- around it

    @contextmanager
    def _whole_or_nothing(self, engine: ExpertEngine) -> Iterator[None]:
        """A context for a call. After an interruption nobody knows which slots are whole: the next call forgets them all."""
        if self.passing.interrupted:
            engine.reader.forget()
            if engine.on_device is not None:
                engine.on_device.transfers.synchronize()
            self.passing.forget()
        self.passing.interrupted = True
        yield
        self.passing.interrupted = False


def put_on_flash(module: Any, index: int, layer: ExpertLayer) -> FlashExperts:
    """Make a stock module read its experts from flash: it loses their parameters, and gets a subclass of both classes.

    Args:
        module: the module, with its parameters on the meta device.
        index: number of the layer among those with experts.
        layer: the experts on flash.
    """
    for param in (layer.first, SECOND):
        delattr(module, param)
    stock = type(module)
    module.__class__ = type(stock.__name__, (FlashExperts, stock), {"__module__": stock.__module__, "__doc__": stock.__doc__})
    module.index, module.layer = index, layer
    mark_as_initialized(module)
    found: FlashExperts = module
    return found
