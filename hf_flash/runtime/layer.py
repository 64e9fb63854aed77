"""`FlashFFN`: one feed-forward layer whose weights stay on flash.

How a token flows through it (paper: section 3; the stock layer is `down(act(up(x) + b))`):

    1. predict   the predictor names the neurons this token uses; with several tokens in a call, each its own
    2. evict     if room is needed: what was used least, outside the window of the last tokens
    3. read      named neurons that are not in DRAM are read from flash into the window's free slots
    4. compute   up, activation and down over exactly the named neurons, in the order of their ids
    5. count     bytes, hits, seconds

What is computed depends on the weights, the predictor and the tokens alone (contract C3): the window decides how bytes
arrive, never the arithmetic. To keep results bit-identical whatever is resident, a call's neurons are worked off in *blocks*
that follow from the call alone (`_Call`), and in the order of their ids.

One token whose neurons fit into the window is the rule in decoding: steps 2 to 4 are one call of the compiled part then, where
there is one (`step.py`). All others go step by step (`_run`).

*Lookahead* starts step 3 early: while the layer's attention runs, on what the predictor says of the layer's own input
(`look_ahead`). That brings most neurons in time; what it missed is read as ever.

When a call's neurons do not all fit into the window (prefill, a tight budget), or several tokens miss more than a block of
them, blocks are *streamed* through two buffers, one of them being filled while the other is computed: what is missing is
read, straight through small gaps where that is faster (`BundleReader.bridged`), and what is worth keeping goes on to the
window. So after prefill it holds what the prompt's last tokens used, without a second read. Behind the last block what is
empty of the next layer's window begins to be filled, so that the disk has something to do during attention.
"""

from __future__ import annotations

import copy
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from time import perf_counter
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from hf_flash.base.arrays import Ids, Mask
from hf_flash.compute.arithmetic import OneToken, block_rows, is_relu
from hf_flash.errors import HfFlashError, StoreReadError, UsageError
from hf_flash.predictors.base import Predictor
from hf_flash.reading.reader import Reading
from hf_flash.runtime.engine import Engine, _after_fork, _after_fork_in_child, _before_fork
from hf_flash.runtime.flash_weights import OnFlash, is_plain, refuse_dtype, refuse_tracing, stand_in
from hf_flash.runtime.observing import Observer
from hf_flash.runtime.stream import _Block, _Call, _note, _union
from hf_flash.runtime.token_step import TokenStep
from hf_flash.runtime.window import ResidentWindow

_SHARED: Final = ("engine", "window", "predictor", "step", "matrix", "_all_ids", "_on_the_way")  # by copies of a layer
_ON_FLASH: Final = "weights on flash, LoRA only on attention"  # what PEFT quotes when it refuses a layer


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)


class FlashFFN(OnFlash):
    """Stands where the up projection stood and does the whole FFN but the down projection's bias.

    Input [tokens, d_model] in the dtype of compute, output [tokens, d_model] float32: the sum before bias and rounding,
    which [`DownBias`] adds. Keeps the parameter name `bias` of the module it replaces.

    Args:
        d_ff: neurons.
        d_model: width.
        bias: whether the up projection has a bias.
        activation: elementwise function on [tokens, d_ff].
    """

    def __init__(
        self, index: int, d_ff: int, d_model: int, bias: bool, activation: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        super().__init__()
        self.index, self.d_ff, self.d_model, self.activation = index, d_ff, d_model, activation
        self.bias = nn.Parameter(torch.empty(d_ff, dtype=torch.float32, device="cpu"), requires_grad=False) if bias else None
        self.engine: Engine | None = None
        self.observer: Observer | None = None
        self._on_the_way: list[tuple[Ids, Ids, Reading]] = []

    def attach(self, engine: Engine, window: ResidentWindow, predictor: Predictor) -> None:
        """Give the layer what it runs on. Called once the rest of the model is loaded."""
        self.engine, self.window, self.predictor = engine, window, predictor
        self._all_ids: Ids = np.arange(self.d_ff)
        self._on_the_way = []
        store = engine.reader.layers[self.index]
        kernel = engine.scratch.kernel
        self.step = TokenStep(kernel.room, window, store) if kernel.compiled and is_relu(self.activation) else None

    @property
    def _ahead(self) -> tuple[Ids, Ids, Reading] | None:
        """Neurons on their way to the window and the slots they go to; shared by copies of the layer, as the window is."""
        return self._on_the_way[0] if self._on_the_way else None

    @_ahead.setter
    def _ahead(self, reading: tuple[Ids, Ids, Reading] | None) -> None:
        self._on_the_way[:] = [] if reading is None else [reading]

    def __deepcopy__(self, memo: dict[int, Any]) -> FlashFFN:
        """A layer with parameters of its own. What is on flash is only read, so everything that reads it is shared."""
        memo |= {id(self.__dict__[name]): self.__dict__[name] for name in _SHARED if name in self.__dict__}
        copied: FlashFFN = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__dict__, memo))  # type: ignore[no-untyped-call]
        copied.observer = None
        if self.engine is not None:
            copied._runtime = self.engine.runtime()  # which knows the original layers alone: no cycle
        return copied

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # numpy, locks, system calls: not for tracing
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        engine = self._usable(x)
        with engine.lock, torch.no_grad(), torch.autocast("cpu", enabled=False):
            engine.check_open()
            self.predictor.bias = self._checked_bias(engine.dtype)
            with self._changing(engine):
                engine.heap.prepare(x.nbytes)
                out = self._run(engine, x.detach().to(engine.dtype))
                if self.index == len(engine.reader.layers) - 1:
                    engine.heap.prepare(0)
        if not (torch.is_grad_enabled() and (x.requires_grad or (self.bias is not None and self.bias.requires_grad))):
            return out
        tracked: torch.Tensor = _NoBackward.apply(x, self.bias, out)  # type: ignore[no-untyped-call]
        return tracked

    def _run(self, engine: Engine, x: torch.Tensor) -> torch.Tensor:
        """The main path: predict, make room, read, compute, count."""
        count, window, tokens = engine.counters, self.window, x.shape[0]
        start = perf_counter()
        selected = self.predictor.select(x)
        predicted = perf_counter()
        waited = self._arrive(engine, selected)
        count.predict_s += predicted - start
        if tokens == 1 and selected is not None and (whole := self._whole(engine, x, selected)) is not None:
            count.io_s += waited
            return whole
        ids = self._all_ids if selected is None else _union(selected)
        window.note_use(None if selected is None else selected.numpy(), tokens, ids)
        missing = window.missing(ids)
        managed, out = perf_counter(), torch.zeros(tokens, self.d_model, dtype=torch.float32, device="cpu")
        streamed = len(ids) > window.capacity or (tokens > 1 and len(missing) >= block_rows(self.d_ff, tokens))
        call = _Call(engine.scratch, self, x, selected, ids, streamed)
        if not streamed:
            slots = self._reserve(missing, ids)
            managed, before = perf_counter(), waited
            if call.one_block:
                waited += self._read_and_compute(engine, x, ids, missing, slots, out)
            else:
                if len(missing):
                    waited += self._take_in(engine, missing, slots, self._start(engine, missing, slots))
                for block in call.blocks:
                    call.add(window.matrix, window.slot_of[block], block, out)
        else:
            before, keep = waited, np.zeros(self.d_ff, dtype=np.bool_)
            keep[window.worth_keeping(ids)] = True
            unused = (window.slot_of >= 0) & ~keep
            unused[ids] = False
            window.evict(np.flatnonzero(unused))
            waited += self._stream(engine, call, keep, out)
        self._count(engine, tokens, len(ids), len(missing))
        count.manage_s += managed - predicted - before
        count.io_s += waited
        count.compute_s += perf_counter() - managed - (waited - before)
        return out

    def _whole(self, engine: Engine, x: torch.Tensor, selected: torch.Tensor) -> torch.Tensor | None:
        """The main path of one token by the compiled part alone, if that can be."""
        if self.step is None:
            return None
        start, count, did = perf_counter(), engine.counters, self.step.did
        out = self.step.run(x.contiguous(), selected.contiguous(), self.bias, engine.reader.step_file(self.index))
        if out is None:
            return None
        self._count(engine, 1, did.used, did.missing)
        count.read_bytes += did.nbytes
        count.reads += did.chunks
        count.manage_s += did.managed
        count.io_s += did.job.waited
        count.compute_s += perf_counter() - start - did.managed - did.job.waited
        return out

    def _count(self, engine: Engine, tokens: int, selected: int, missing: int) -> None:
        """A call of so many tokens used `selected` neurons, of which `missing` were not there."""
        count = engine.counters
        count.calls += 1
        count.tokens += tokens
        count.selected += selected
        count.hits += selected - missing
        count.missing_bytes += missing * engine.reader.layers[self.index].bundle_bytes

    # --- lookahead

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def look_ahead(self, x: torch.Tensor) -> None:
        """Start to read what the next forward will probably need, as far as there is room for it.

        Args:
            x: [1, d_model] a guess at that forward's input. It decides which bytes come early, never what is computed.
        """
        engine = self.engine
        if engine is None:
            return
        with engine.lock, torch.no_grad(), torch.autocast("cpu", enabled=False):
            if engine.closed or engine.reader.converts or self._ahead is not None:
                return
            self._start_ahead(engine, x.to(engine.dtype))

    def _start_ahead(self, engine: Engine, x: torch.Tensor) -> None:
        start, window = perf_counter(), self.window
        self.predictor.bias = self._checked_bias(engine.dtype)
        selected = self.predictor.select(x)
        predicted = perf_counter()
        engine.counters.predict_s += predicted - start
        if selected is None:
            return
        ids = _union(selected)
        missing = window.missing(ids)
        missing = missing[: window.spare(ids)]  # a guess pushes nothing out that recent tokens used
        self._read_ahead(engine, missing, ids)
        engine.counters.manage_s += perf_counter() - predicted

    def _start_next_layer(self, engine: Engine) -> None:
        """This call uses most of this layer, so it will of the next: fill what is empty of that window, behind attention."""
        runtime = engine.runtime()
        if runtime is None or not engine.early or engine.reader.converts or self.index + 1 == len(runtime.ffns):
            return
        after: FlashFFN = runtime.ffns[self.index + 1]
        if after._ahead is None:
            after._read_ahead(engine, after.window.missing(after._all_ids)[: after.window.free], after._all_ids)

    def _read_ahead(self, engine: Engine, missing: Ids, ids: Ids) -> None:
        """Start to read `missing` into the window, without evicting any of `ids`; the next forward takes it in."""
        if not len(missing):
            return
        with self._changing(engine):
            slots = self._reserve(missing, ids)
            with suppress(StoreReadError):  # the forward reads it again, and says what is wrong
                self._ahead = missing, slots, self._start(engine, missing, slots, background=True)

    def _arrive(self, engine: Engine, selected: torch.Tensor | None) -> float:
        """Take in what was read ahead; returns the seconds that had to be waited."""
        if self._ahead is None:
            return 0.0
        start, (ids, slots, reading) = perf_counter(), self._ahead
        self._ahead = None
        try:
            waited = self._take_in(engine, ids, slots, reading)
        except StoreReadError:  # the forward reads what it needs again, and says what is wrong
            return perf_counter() - start
        engine.counters.ahead += len(ids)
        engine.counters.ahead_used += len(ids) if selected is None else int(selected[:, torch.from_numpy(ids)].any(0).sum())
        return waited

    def _reserve(self, missing: Ids, ids: Ids) -> Ids:
        """Slots for `missing`, without evicting any of `ids`."""
        self.window.make_room(len(missing), ids)
        return self.window.reserve(len(missing))

    @contextmanager
    def _changing(self, engine: Engine) -> Iterator[None]:
        """The block may be interrupted anywhere, and so may the clearing up after it: then the next call does that."""
        if not self.window.consistent:
            self._forget(engine)
        self.window.consistent = False
        try:
            yield
        except HfFlashError:  # nothing was committed that is not whole
            self.window.consistent = True
            raise
        except BaseException:
            self._forget(engine)
            raise
        self.window.consistent = True

    def _forget(self, engine: Engine) -> None:
        """After an interruption: nobody knows which rows are whole."""
        engine.reader.forget()
        self._ahead = None
        self.window.forget()
        self.window.consistent = True

    @contextmanager
    def _given_back_on_failure(self, slots: Ids) -> Iterator[None]:
        try:
            yield
        except StoreReadError:
            self.window.give_back(slots)
            raise

    def _start(self, engine: Engine, ids: Ids, slots: Ids, *, background: bool = False) -> Reading:
        """Start to read bundles into slots of the window."""
        with self._given_back_on_failure(slots):
            return engine.reader.start(self.index, ids, self.window.matrix, slots, background=background)

    def _take_in(self, engine: Engine, ids: Ids, slots: Ids, reading: Reading) -> float:
        """Wait for what [`_start`] started, and count it; returns the seconds it took."""
        start = perf_counter()
        with self._given_back_on_failure(slots):
            count = reading.wait()
        self.window.commit(ids, slots)
        _note(engine.counters, count)
        return perf_counter() - start

    def _read_and_compute(
        self, engine: Engine, x: torch.Tensor, ids: Ids, missing: Ids, slots: Ids, out: torch.Tensor
    ) -> float:
        """One token whose neurons fit into the window: compute with those that are there while the others are read.

        Returns:
            Seconds spent on reading and nothing else.
        """
        window, rows = self.window, self.window.slot_of[ids]
        away = rows < 0
        rows[away] = slots
        token = OneToken(engine.scratch, self.activation, x, self.bias, window.matrix, rows, ids, one_block=True)
        spent, start = 0.0, perf_counter()
        if len(missing):
            reading = self._start(engine, missing, slots)
            spent = perf_counter() - start
            if token.compiled:
                token.up(np.flatnonzero(~away), np.flatnonzero(away))
            spent += self._take_in(engine, missing, slots, reading)
        token.finish(out)
        return spent

    def _stream(self, engine: Engine, call: _Call, keep: Mask, out: torch.Tensor) -> float:
        """Work off what does not fit into the window, the next block on its way while one is computed.

        Args:
            keep: [d_ff] which neurons should be in the window afterwards.

        Returns:
            Seconds spent on reading and nothing else.
        """
        rows, waited = engine.scratch.rows, 0.0
        free = [rows[at : at + call.step] for at in range(0, len(rows), call.step)]
        blocks = [_Block(self, call, ids) for ids in call.blocks]
        waiting = deque(blocks)
        try:
            for block in blocks:
                start = perf_counter()
                while waiting and (free or waiting[0].complete):
                    waiting.popleft().start(engine, free)
                block.arrive(engine)
                if block is blocks[-1] and call.most:
                    self._start_next_layer(engine)
                waited += perf_counter() - start
                block.compute(engine, call, out)
                block.keep(engine, keep)
                if not block.complete:
                    free.append(block.buffer)
        except BaseException:
            engine.reader.forget()  # nothing may write to the buffers any more
            raise
        return waited

    def _usable(self, x: torch.Tensor) -> Engine:
        """The engine, if this input can be computed; a clear error otherwise."""
        where = f"FFN of layer {self.index}"
        if tracer := stand_in(x):
            refuse_tracing(tracer)
        if self.training:
            raise UsageError("a flash model is for inference only", where=where, got="model.train()", hint="call model.eval()")
        if self.engine is None:
            raise UsageError("the layer has no store", where=where, hint="load the model with from_pretrained")
        if x.device.type != "cpu":
            raise UsageError(
                "the FFN computes on the CPU",
                where=where,
                expected="input on cpu",
                got=x.device,
                hint='move the model back with model.to("cpu"), or load it with device_map="cpu"',
            )
        if x.dtype != self.engine.dtype and not torch.is_autocast_enabled("cpu"):
            refuse_dtype(x.dtype, self.engine.dtype, where)
        return self.engine

    def _checked_bias(self, dtype: torch.dtype) -> torch.Tensor | None:
        """The bias as it is now. Others may have put it there, and it goes to the compiled part by its address."""
        bias = self.bias
        if bias is None or (
            bias.dtype == dtype and bias.shape == (self.d_ff,) and bias.is_cpu and bias.is_contiguous() and is_plain(bias)
        ):
            return bias
        raise UsageError(
            "this bias does not fit the up projection",
            where=f"FFN of layer {self.index}",
            expected=f"[{self.d_ff}] {dtype} on cpu, contiguous",
            got=f"{list(bias.shape)} {bias.dtype} on {bias.device}{'' if bias.is_contiguous() else ', not contiguous'}",
            hint="convert it before you put it there",
        )

    def extra_repr(self) -> str:
        return f"layer={self.index}, d_model={self.d_model}, d_ff={self.d_ff}, {_ON_FLASH}"


class _NoBackward(torch.autograd.Function):
    """Lets a forward run with gradients enabled, and refuses a backward that would silently skip the FFN."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise UsageError(
            "a flash model has no gradients: its FFN weights are on flash", hint="use the plain checkpoint to train"
        )
