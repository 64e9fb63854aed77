"""`FlashFFN`: one feed-forward layer whose weights stay on flash.

How a token flows through it (paper: section 3; the stock layer is `down(act(up(x) + b))`), in `_run`:

    1. choose     the predictor names the neurons that each token of the call uses; a prompt uses all of them (prompts.py)
    2. make room  if room is needed, the window evicts the least used neurons that the last tokens did not use
    3. read       named neurons that are not in DRAM are read from flash into the window's free slots
    4. compute    up, activation and down over exactly the named neurons, in the order of their ids
    5. count      bytes, hits, seconds

What is computed depends on the weights, the predictor and the tokens alone (contract C3): the window decides how bytes
arrive, never the arithmetic. To keep results bit-identical whatever is resident, a call's neurons are computed in *blocks*
that follow from the call alone (stream.py), and in the order of their ids.

Decoding mostly has calls of a few tokens whose neurons fit into the window. With the compiled part, steps 2 to 4 are then one
call of it (token_step.py). All other calls go step by step.

When a call's neurons do not all fit into the window (prefill, a tight budget), or many tokens miss more than a block of
them, blocks are *streamed* through two buffers (stream.py). Neurons worth keeping are copied from there into the window, so
after prefill it holds what the prompt's last tokens used, without a second read. After the last block, reads into the empty
slots of the next layer's window begin, so that the disk is busy during attention.

*Lookahead* starts step 3 early: it reads while the layer's attention runs, and guesses the neurons by giving the predictor the
layer's own input (`look_ahead`). Most neurons arrive in time; step 3 reads the ones that the guess missed.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from hf_flash.base.arrays import Ids, count_uses
from hf_flash.compute.activation import Activation
from hf_flash.compute.arithmetic import block_rows
from hf_flash.compute.kernels import Biases
from hf_flash.errors import UsageError
from hf_flash.predictors.base import NoPredictor, Predictor
from hf_flash.reading.reader import Reading
from hf_flash.runtime.engine import Engine
from hf_flash.runtime.flash_weights import is_plain
from hf_flash.runtime.inference_only import usable_engine, without_backward
from hf_flash.runtime.stream import Call, Observer, start_early, stream
from hf_flash.runtime.token_step import MOST_TOKENS, TokenStep, token_step
from hf_flash.runtime.window import ResidentWindow
from hf_flash.runtime.window_reads import WindowReads
from hf_flash.store.unit import Role

_SHARED: Final = (
    "engine",
    "window",
    "predictor",
    "step",
    "reads",
    "flash_weights",
    "activation",
    "_all_ids",
)  # by copies of a layer


@dataclass
class _Work:
    """The work that a call needs, once there is room for it.

    Attributes:
        call: what is computed, and in which blocks.
        ids: neurons that the call uses.
        missing: the ones of these that are not in the window.
        slots: the window's slots for `missing`; `None`: the call is streamed past the window.
    """

    call: Call
    ids: Ids
    missing: Ids
    slots: Ids | None


class FlashFFN(nn.Module):
    """A whole feed-forward block: maps an input [..., d_model] to an output of the same shape, in the compute dtype.

    Its subclasses define how it fits into a model, and under which names (sites.py).

    Args:
        index: the layer's index.
        d_ff: number of neurons.
        d_model: width of the hidden states.
        activation: the function between the matrices.
    """

    def __init__(self, index: int, d_ff: int, d_model: int, activation: Activation) -> None:
        super().__init__()
        self.index, self.d_ff, self.d_model, self.activation = index, d_ff, d_model, activation
        self.engine: Engine | None = None
        self.observer: Observer | None = None

    @property
    def projections(self) -> dict[Role, Any]:
        """The modules that replace the linear layers, with their biases."""
        raise NotImplementedError

    def attach(self, engine: Engine, window: ResidentWindow, predictor: Predictor) -> None:
        """Give the layer its engine, window and predictor. Called once the rest of the model is loaded."""
        self.engine, self.window, self.predictor = engine, window, predictor
        self.reads = WindowReads(engine, self.index, window)
        self._all_ids: Ids = np.arange(self.d_ff)
        self.step: TokenStep | None = token_step(engine.arithmetic, window, engine.reader.layers[self.index])

    def __deepcopy__(self, memo: dict[int, Any]) -> FlashFFN:
        """A layer with its own parameters. Weights on flash are only read, so everything that reads them is shared."""
        memo |= {id(self.__dict__[name]): self.__dict__[name] for name in _SHARED if name in self.__dict__}
        copied: FlashFFN = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__dict__, memo))  # type: ignore[no-untyped-call]
        copied.observer = None
        if self.engine is not None:
            copied._runtime = self.engine.runtime()  # it refers only to the original layers: no cycle
        return copied

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # numpy, locks, system calls: not for tracing
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        engine = usable_engine(self.engine, self, x, self.d_model, f"FFN of layer {self.index}")
        with engine.lock, torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            engine.check_open()
            biases = self._checked_biases(engine, x)
            rows = x.detach().reshape(-1, self.d_model).to(engine.dtype).contiguous()
            if is_elsewhere := not x.is_cpu and engine.arithmetic.device.type == "cpu":  # the rest of the model is on a device
                rows = rows.cpu()
            with self.reads.changing(), engine.turn():
                engine.heap.prepare(x.nbytes)
                total = self._run(engine, rows, biases, is_prompt=self._is_prompt(engine, x))
                if self.index == len(engine.reader.layers) - 1:
                    engine.heap.prepare(0)
            down = biases["down"]
            out = (total if down is None else total.add_(down)).to(engine.dtype).view(x.shape)
            out = out.to(x.device) if is_elsewhere else out
        found = [bias for module in self.projections.values() if (bias := module.bias) is not None]
        return without_backward(out, x, *found)

    # --- the main path

    def _run(self, engine: Engine, x: torch.Tensor, biases: Biases, *, is_prompt: bool) -> torch.Tensor:
        """The output before the last bias, float32 [tokens, d_model], for `x` [tokens, d_model] in the compute dtype."""
        selected = self._choose(engine, x, biases, is_prompt=is_prompt)
        if selected is not None and (out := self._in_one_call(engine, x, biases, selected)) is not None:
            return out
        work = self._make_room(engine, x, biases, selected, is_prompt=is_prompt)
        reading = self._read(engine, work)
        out = self._compute(engine, x, biases, work, reading)
        self._count(engine, len(x), len(work.ids), len(work.missing))
        return out

    def _is_prompt(self, engine: Engine, x: torch.Tensor) -> bool:
        """Whether these tokens are computed whole although there is a predictor."""
        return not isinstance(self.predictor, NoPredictor) and engine.sequences.is_prompt(x)

    def _choose(self, engine: Engine, x: torch.Tensor, biases: Biases, *, is_prompt: bool) -> torch.Tensor | None:
        """Which neurons each token uses, bool [tokens, d_ff]; `None`: all. Also takes in the neurons that were read ahead."""
        start = perf_counter()
        self.predictor.bias = biases[engine.arithmetic.unit.deciding]
        selected = None if is_prompt else self.predictor.select(x)
        selected = None if selected is None else selected.cpu()
        engine.counters.predict_s += perf_counter() - start
        engine.counters.io_s += self.reads.arrive(selected)
        return selected

    def _in_one_call(self, engine: Engine, x: torch.Tensor, biases: Biases, selected: torch.Tensor) -> torch.Tensor | None:
        """Steps 2 to 5 for a few tokens, with steps 2 to 4 in one call of the compiled part. `None`: go step by step."""
        if self.step is None or len(x) > MOST_TOKENS:
            return None
        start = perf_counter()
        out = self.step.run(x, selected.contiguous(), biases, engine.reader.step_file(self.index))
        if out is None:
            return None
        self.step.count(engine.counters, perf_counter() - start)
        self._count(engine, len(x), self.step.used, self.step.missing)
        return out

    def _make_room(
        self, engine: Engine, x: torch.Tensor, biases: Biases, selected: torch.Tensor | None, *, is_prompt: bool
    ) -> _Work:
        """Record which neurons are used, decide whether the call is streamed, and if not make room for missing neurons."""
        start, window, tokens = perf_counter(), self.window, len(x)
        ids = self._all_ids if selected is None else _used_by_any(selected)
        if is_prompt:  # which neurons are active is known only once they are computed
            window.advance(tokens)
        else:
            window.note_use(None if selected is None else selected.numpy(), tokens, ids)
        missing = window.missing(ids)
        few = tokens == 1 or (selected is not None and tokens <= MOST_TOKENS)
        streamed = len(ids) > window.capacity or (not few and len(missing) >= block_rows(self.d_ff, tokens))
        call = Call(
            engine.arithmetic, x, biases, selected, ids, self.d_ff,
            streamed=streamed, observer=self.observer, learner=window if is_prompt else None,
        )  # fmt: skip
        slots = None if streamed else self.reads.reserve(missing, ids)
        engine.counters.manage_s += perf_counter() - start
        return _Work(call, ids, missing, slots)

    def _read(self, engine: Engine, work: _Work) -> Reading | None:
        """Start to read missing neurons, unless the call is streamed."""
        if work.slots is None or not len(work.missing):
            return None
        start = perf_counter()
        reading = self.reads.start(work.missing, work.slots)
        engine.counters.io_s += perf_counter() - start
        return reading

    def _compute(self, engine: Engine, x: torch.Tensor, biases: Biases, work: _Work, reading: Reading | None) -> torch.Tensor:
        """Compute with the neurons in the window while missing ones are read; then with those."""
        start, window, waited = perf_counter(), self.window, 0.0
        out = torch.zeros(len(x), self.d_model, dtype=torch.float32, device=x.device)
        if work.slots is None:
            waited = stream(engine, self.index, window, work.call, out, functools.partial(self._begin_next_layer, work.call))
        elif work.call.one_block:
            rows = window.slot_of[work.ids]
            absent = rows < 0
            rows[absent] = work.slots
            token = engine.arithmetic.one_token(x, biases, window.matrix, rows, work.ids, one_block=True)
            if reading is not None:
                token.multiply_present(np.flatnonzero(~absent), np.flatnonzero(absent))
                waited = self.reads.take_in(work.missing, work.slots, reading)
            token.finish(out)
        else:
            if reading is not None:
                waited = self.reads.take_in(work.missing, work.slots, reading)
            for block in work.call.blocks:
                work.call.add(window.matrix, window.slot_of[block], block, out)
        engine.counters.io_s += waited
        engine.counters.compute_s += perf_counter() - start - waited
        return out

    def _count(self, engine: Engine, tokens: int, selected: int, missing: int) -> None:
        """Count a call of `tokens` tokens that used `selected` neurons, `missing` of which were not in the window."""
        count = engine.counters
        count.calls += 1
        count.tokens += tokens
        count.selected += selected
        count.hits += selected - missing
        count.missing_bytes += missing * engine.reader.layers[self.index].bundle_bytes

    # --- ahead of time

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def look_ahead(self, x: torch.Tensor) -> None:
        """Start to read the neurons that the next forward will probably need, as far as there is room for them.

        Args:
            x: [1, d_model] a guess at that forward's input. It decides which bytes come early, never what is computed.
        """
        engine = self.engine
        if engine is None:
            return
        with engine.lock, torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            if engine.closed or engine.reader.converts or self.reads.under_way:
                return
            start, window, counters = perf_counter(), self.window, engine.counters
            self.predictor.bias = self._checked_biases(engine, x)[engine.arithmetic.unit.deciding]
            selected = self.predictor.select(x.to(engine.dtype))
            selected = None if selected is None else selected.cpu()
            predicted = perf_counter()
            counters.predict_s += predicted - start
            if selected is None:
                return
            ids = _used_by_any(selected)
            missing = window.missing(ids)[: window.spare(ids)]  # a guess evicts nothing that recent tokens used
            self.reads.read_ahead(missing, ids)
            counters.manage_s += perf_counter() - predicted

    def _begin_next_layer(self, call: Call, free: list[torch.Tensor]) -> None:
        """Read for the next layer during attention: a call that uses most of this layer will use most of the next.

        Empty slots of the next layer's window are filled. If it has none, and the call uses all neurons, the read of its first
        block is started.

        Args:
            call: the call of this layer.
            free: buffers that this call does not need any more.
        """
        engine = self.engine
        runtime = None if engine is None else engine.runtime()
        if engine is None or runtime is None or not engine.fills_next or engine.reader.converts:
            return
        after = runtime.ffns[self.index + 1 : self.index + 2]
        if not after or after[0].reads.under_way:
            return
        window, every = after[0].window, after[0]._all_ids
        if window.free:
            after[0].reads.read_ahead(window.missing(every)[: window.free], every)
        elif call.uses_all and after[0].d_ff == self.d_ff:
            start_early(engine, after[0].index, window, call.step, free)

    # --- what it refuses

    def _checked_biases(self, engine: Engine, x: torch.Tensor) -> Biases:
        """The current biases, in the memory where they are used. They are checked, since users may have replaced them, and the
        compiled part gets only their addresses.

        Raises:
            UsageError: a bias has another shape, dtype, device or layout than the layer needs.
        """
        biases: dict[Role, torch.Tensor | None] = {role: module.bias for role, module in self.projections.items()}
        for role, bias in biases.items():
            if bias is None or role == "down":
                continue
            if not (
                bias.dtype == engine.dtype
                and bias.shape == (self.d_ff,)
                and bias.device == x.device
                and bias.is_contiguous()
                and is_plain(bias)
            ):
                raise UsageError(
                    f"this bias does not fit the {role} projection",
                    where=f"FFN of layer {self.index}",
                    expected=f"[{self.d_ff}] {engine.dtype} on {x.device}, contiguous",
                    got=f"{list(bias.shape)} {bias.dtype} on {bias.device}{'' if bias.is_contiguous() else ', not contiguous'}",
                    hint="convert it before you put it there",
                )
        if x.is_cpu or engine.arithmetic.device.type != "cpu":
            return biases
        return {role: None if bias is None else bias.cpu() for role, bias in biases.items()}


def _used_by_any(selected: torch.Tensor) -> Ids:
    """Sorted ids of the neurons that any token selected."""
    return np.flatnonzero(selected[0].numpy() if len(selected) == 1 else count_uses(selected.numpy()))
