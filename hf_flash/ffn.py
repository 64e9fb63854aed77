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
import itertools
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from time import perf_counter
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from .compute import OneToken, Scratch, SeveralTokens, block_rows, is_relu
from .counters import Counters
from .errors import HfFlashError, StoreReadError, UsageError
from .matrices import OnFlash, is_plain, refuse_dtype, refuse_tracing, stand_in
from .memory import Heap
from .native import addresses, copy_rows, release_threads
from .predictor import Predictor
from .reader import BundleReader, ReadCount, Reading
from .step import TokenStep
from .window import Ids, Mask, ResidentWindow, uses

_SHARED: Final = ("engine", "window", "predictor", "step", "matrix", "_all_ids", "_on_the_way")  # by copies of a layer
_ON_FLASH: Final = "weights on flash, LoRA only on attention"  # what PEFT quotes when it refuses a layer

Observer = Callable[[torch.Tensor, Ids, torch.Tensor], None]
"""Called with a layer's input x [tokens, d_model], the ids of a block and their pre-activations [tokens, ids]."""


class Engine:
    """What the layers of one model share: the reader, the scratch buffers, the counters, and the lock around them."""

    def __init__(self, reader: BundleReader, scratch: Scratch, dtype: torch.dtype, *, early: bool = True) -> None:
        self.reader, self.scratch, self.dtype, self.early = reader, scratch, dtype, early
        self.counters, self.heap = Counters(), Heap()
        self.lock = threading.RLock()
        self.closed = False
        self.runtime: Callable[[], Any] = lambda: None  # weak reference to the `FlashRuntime`, for `hf_flash.stats(model)`
        _engines[id(self)] = self

    @property
    def scratch_bytes(self) -> int:
        """DRAM of the buffers that all layers share."""
        return self.scratch.nbytes + self.reader.buffer_bytes

    def check_open(self) -> None:
        """Refuse to run on a closed store. Call with the lock held."""
        if self.closed:
            where = self.reader.layers[0].path.parent
            raise UsageError("the model's store is closed", where=where, hint="load the model again")

    def __deepcopy__(self, memo: Any) -> Engine:
        return self

    def __copy__(self) -> Engine:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UsageError("a loaded flash model cannot be pickled", hint="load it again in the other process")

    def close(self) -> None:
        with self.lock:
            if not self.closed:
                self.closed = True
                self.reader.close()


_engines: weakref.WeakValueDictionary[int, Engine] = weakref.WeakValueDictionary()
_forking = threading.local()


def _before_fork() -> None:
    """Wait for layers that other threads run, and for reads: a child would wait for ever, and not know which rows are whole."""
    found = (reference() for reference in _engines.valuerefs())
    _forking.held = []
    for engine in sorted((engine for engine in found if engine is not None), key=id):  # one order for all who fork
        engine.lock.acquire()
        _forking.held.append(engine)
        if not engine.closed:
            engine.reader.settle()
    _forking.alone = release_threads()


def _after_fork() -> None:
    while _forking.held:
        _forking.held.pop().lock.release()


def _after_fork_in_child() -> None:
    _after_fork()
    if not _forking.alone and torch.get_num_threads() > 1:
        torch.set_num_threads(1)  # it would wait for threads that it does not have


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


class FlashActivation(nn.Module):
    """Stands where the activation stood, and passes on what [`FlashFFN`] has activated already.

    If somebody has put a plain up projection in its place, what comes is as wide as that, and is activated here.
    """

    def __init__(self, activation: Callable[[torch.Tensor], torch.Tensor], d_model: int) -> None:
        super().__init__()
        self.activation, self.d_model = activation, d_model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.shape[-1] == self.d_model else self.activation(x)


class DownBias(OnFlash):
    """Stands where the down projection stood: adds its bias to the fp32 sum and rounds once to the dtype of compute.

    Keeps the parameter name `bias` of the module it replaces.
    """

    def __init__(self, index: int, d_model: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.index, self.d_model, self.dtype = index, d_model, dtype
        self.bias = nn.Parameter(torch.empty(d_model, dtype=torch.float32, device="cpu"), requires_grad=False) if bias else None

    def extra_repr(self) -> str:
        return _ON_FLASH

    def forward(self, total: torch.Tensor) -> torch.Tensor:
        if total.shape[-1] != self.d_model:
            raise UsageError(
                "the up projection in front was replaced by something that is not on flash, this one was not",
                where=f"FFN of layer {self.index}",
                expected=f"the sum of the layer, [tokens, {self.d_model}]",
                got=list(total.shape),
                hint="replace both projections of the layer",
            )
        return (total if self.bias is None else total + self.bias.float()).to(self.dtype)


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


@contextmanager
def observed(ffn: FlashFFN, record: Callable[[torch.Tensor, torch.Tensor], None]) -> Iterator[None]:
    """Hand every forward's input x [tokens, d_model] and pre-activations [tokens, d_ff] to `record`.

    For a layer without a predictor, and for several tokens: the two ways of computing that see every neuron's.
    """
    whole = torch.empty(0, ffn.d_ff, dtype=torch.float32, device="cpu")

    def observe(x: torch.Tensor, ids: Ids, before: torch.Tensor) -> None:
        nonlocal whole
        if ids[0] == 0:
            whole = torch.empty(len(x), ffn.d_ff, dtype=before.dtype, device="cpu")
        whole[:, ids[0] : ids[-1] + 1] = before
        if ids[-1] == ffn.d_ff - 1:
            record(x, whole)

    ffn.observer = observe
    try:
        yield
    finally:
        ffn.observer = None


class _Call:
    """What one forward computes, and in which blocks.

    Attributes:
        blocks: sorted ids. One token: `step` neurons of those it uses. Several: those used of `step` neighbours, which lie
            together on flash; in the window, where that matters to nobody, `step` used ones if every token is on its own.
        one_block: whether one token is done with a single one.
        apart: whether rows are multiplied wherever they lie, each with the tokens that use it (`add_apart`).
        spans: whether blocks are of neighbours.
        most: whether these are most of the layer's neurons.
    """

    def __init__(
        self, scratch: Scratch, ffn: FlashFFN, x: torch.Tensor, selected: torch.Tensor | None, ids: Ids, streamed: bool
    ) -> None:
        self._scratch, self._ffn, self._x = scratch, ffn, x
        self.step = block_rows(ffn.d_ff, len(x))
        self.one_block = len(x) == 1 and len(ids) <= self.step
        self.most = 2 * len(ids) > ffn.d_ff
        self._several = SeveralTokens(scratch, ffn.activation, x, selected, len(ids), ffn.bias) if len(x) > 1 else None
        self.apart = self._several is not None and self._several.apart
        self.spans = self._several is not None and (streamed or not self.apart)
        if self.spans:
            ends = np.searchsorted(ids, np.arange(0, ffn.d_ff + self.step, self.step)).tolist()
            self.blocks = [ids[start:end] for start, end in itertools.pairwise(ends) if end > start]
        else:
            self.blocks = [ids[at : at + self.step] for at in range(0, len(ids), self.step)]

    def add(self, matrix: torch.Tensor, rows: Ids, ids: Ids, out: torch.Tensor) -> None:
        """Add a block's share to `out` [tokens, d_model] float32; `rows` of `matrix` [any, 2 * d_model] hold neurons `ids`."""
        ffn = self._ffn
        if self.apart:
            self.add_apart(addresses(matrix, rows), ids, out)
        elif self._several is not None:
            before = self._several.add(matrix, rows, ids, out)
            if ffn.observer is not None:
                ffn.observer(self._several.x, ids, before)
        else:
            token = OneToken(self._scratch, ffn.activation, self._x, ffn.bias, matrix, rows, ids, one_block=self.one_block)
            token.finish(out)

    def add_apart(self, places: Ids, ids: Ids, out: torch.Tensor) -> None:
        """Only if `apart`: the same for neurons at addresses `places`."""
        assert self._several is not None
        self._several.add_apart(places, ids, out)


class _Block:
    """Some neurons of a call: resident ones, and others that are to be read into a buffer. It is `complete` without those."""

    buffer: torch.Tensor

    def __init__(self, ffn: FlashFFN, call: _Call, ids: Ids) -> None:
        self._layer, self._window, self.ids = ffn.index, ffn.window, ids
        slots = ffn.window.slot_of[ids]
        self._there, self._away = np.flatnonzero(slots >= 0), np.flatnonzero(slots < 0)
        self.complete = len(self._away) == 0
        first = int(ids[0]) // call.step * call.step
        self._span = (first, min(first + call.step, ffn.d_ff)) if call.spans else None
        self._rows: Ids = ids - first if call.spans else np.arange(len(ids))
        self._reading: Reading | None = None

    def start(self, engine: Engine, free: list[torch.Tensor]) -> None:
        """Start to read what is missing, if anything is, into a buffer taken from `free`."""
        if self.complete:
            return
        self.buffer, missing, rows = free.pop(0), self.ids[self._away], self._rows[self._away]
        if self._span is not None:
            missing = engine.reader.bridged(self._layer, missing, *self._span, self.buffer)
            rows = missing - self._span[0]
        self._reading = engine.reader.start(self._layer, missing, self.buffer, rows, background=True)

    def arrive(self, engine: Engine) -> None:
        """Wait until what is read is there, and count it."""
        if self._reading is not None:
            _note(engine.counters, self._reading.wait())

    def compute(self, engine: Engine, call: _Call, out: torch.Tensor) -> None:
        """Add the share of these neurons to `out`."""
        matrix, slots, there = self._window.matrix, self._window.slot_of[self.ids[self._there]], self._there
        if self.complete:
            call.add(matrix, slots, self.ids, out)
        elif call.apart:
            places = addresses(self.buffer, self._rows)
            places[there] = addresses(matrix, slots)
            call.add_apart(places, self.ids, out)
        else:  # in id order in one matrix; over what was read through
            _copy_rows(engine.scratch, matrix, slots, self.buffer, self._rows[there])
            call.add(self.buffer, self._rows, self.ids, out)

    def keep(self, engine: Engine, keep: Mask) -> None:
        """Leave in the window, or take into it, what is worth keeping."""
        window, ids = self._window, self.ids
        there = ids[self._there]
        window.evict(there[~keep[there]])
        staying = self._away[keep[ids[self._away]]][: window.free]
        if len(staying):
            slots = window.reserve(len(staying))
            _copy_rows(engine.scratch, self.buffer, self._rows[staying], window.matrix, slots)
            window.commit(ids[staying], slots)


def _note(counters: Counters, read: ReadCount) -> None:
    counters.read_bytes += read.nbytes
    counters.reads += read.chunks


def _copy_rows(scratch: Scratch, source: torch.Tensor, those: Ids, target: torch.Tensor, places: Ids) -> None:
    """`target[places] = source[those]`; without the compiled part some rows at a time through a scratch buffer."""
    if copy_rows(source, those, target, places):
        return
    step = len(scratch.gathered)
    for at in range(0, len(those), step):
        part = torch.from_numpy(those[at : at + step])
        picked = torch.index_select(source, 0, part, out=scratch.gathered[: len(part)])
        target.index_copy_(0, torch.from_numpy(places[at : at + step]), picked)


def _union(selected: torch.Tensor) -> Ids:
    """Sorted ids of the neurons that any token selected."""
    return np.flatnonzero(selected[0].numpy() if len(selected) == 1 else uses(selected.numpy()))
