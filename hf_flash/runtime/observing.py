"""Watch what every token reads and reuses, layer by layer, by comparing windows before and after a forward.

Layers have hooks only while somebody watches, so the main path of a token has no code for it. Counters tell what a call cost,
and the window's own tables tell which neurons were involved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter, sleep
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import StoppingCriteria

from hf_flash.base.arrays import Ids, Mask
from hf_flash.compute.arithmetic import Values
from hf_flash.runtime.counters import Counters
from hf_flash.runtime.experts import FlashExperts
from hf_flash.runtime.layer import FlashFFN
from hf_flash.runtime.model import runtime_of


@dataclass(frozen=True)
class LayerSeen:
    """One layer after a token. All arrays are [d_ff], one entry per neuron; in a mixture [experts]."""

    read: Mask  # used, and not in DRAM before: read now, or ahead of this forward
    reused: Mask  # used, and in DRAM already
    resident: Mask  # in DRAM now
    age: npt.NDArray[np.int64]  # tokens since the last use; huge if there was none


@dataclass(frozen=True)
class TokenSeen:
    """One call of the model, and the token that it produced."""

    number: int  # 0: the prompt
    token: int  # the id that was chosen
    tokens: int  # how many went through the model: the prompt's, then one at a time
    ms: float
    read_bytes: int
    reads: int
    layers: tuple[LayerSeen, ...]

    @property
    def read(self) -> int:
        """Neurons, or experts, that were read, over all layers."""
        return sum(int(layer.read.sum()) for layer in self.layers)

    @property
    def reused(self) -> int:
        """Neurons, or experts, that were used and already in DRAM, over all layers."""
        return sum(int(layer.reused.sum()) for layer in self.layers)

    @property
    def hit_rate(self) -> float:
        return self.reused / max(1, self.read + self.reused)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON. Layers have counts instead of arrays."""
        layers = [{name: int(getattr(layer, name).sum()) for name in ("read", "reused", "resident")} for layer in self.layers]
        plain = {name: getattr(self, name) for name in ("number", "token", "tokens", "ms", "read_bytes", "reads", "hit_rate")}
        return plain | {"layers": layers}


class _LayerWatch:
    """Watches one layer. Neurons that are read ahead enter the window within the forward, so they count as read."""

    def __init__(self, ffn: FlashFFN | FlashExperts) -> None:
        self._window: Any = ffn.window
        self.seen: LayerSeen | None = None
        self._handles = [ffn.register_forward_pre_hook(self._before), ffn.register_forward_hook(self._after)]

    def _before(self, *args: Any) -> None:
        self._resident, self._clock = self._window.slot_of >= 0, self._window.clock

    def _after(self, *args: Any) -> None:
        window, before = self._window, self._resident
        used, age = window.last_used > self._clock, np.minimum(window.clock - window.last_used, 1 << 40)
        self.seen = LayerSeen(used & ~before, used & before, window.slot_of >= 0, age)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


class _Watcher(StoppingCriteria):
    """Called by `generate` after every token; never stops it."""

    def __init__(self, counters: Counters, layers: list[_LayerWatch], show: Callable[[TokenSeen], None], pace: float) -> None:
        self._counters, self._layers, self._show, self._pace = counters, layers, show, pace
        self._before, self._number, self._start = replace(counters), 0, perf_counter()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        now, before, start = replace(self._counters), self._before, perf_counter()
        self._show(TokenSeen(
            number=self._number,
            token=int(input_ids[0, -1]),
            tokens=(now.tokens - before.tokens) // len(self._layers),
            ms=1e3 * (start - self._start),
            read_bytes=now.read_bytes - before.read_bytes,
            reads=now.reads - before.reads,
            layers=tuple(layer.seen for layer in self._layers if layer.seen is not None),
        ))  # fmt: skip
        sleep(max(0.0, self._pace - (perf_counter() - start)))
        self._before, self._number, self._start = now, self._number + 1, perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device="cpu")


@contextmanager
def watched(model: Any, show: Callable[[TokenSeen], None], pace: float = 0.0) -> Iterator[StoppingCriteria]:
    """Watch every token of one call of `generate` for a single sequence.

    Args:
        model: a flash model.
        show: called after every token. Its time, and the pause, do not count as the next token's.
        pace: seconds from one call of `show` until the next token begins, at least.

    Yields:
        A stopping criterion for `generate(..., stopping_criteria=[it])`.
    """
    runtime = runtime_of(model)
    layers = [_LayerWatch(ffn) for ffn in runtime.ffns]
    try:
        yield _Watcher(runtime.engine.counters, layers, show, pace)
    finally:
        for layer in layers:
            layer.close()


@contextmanager
def observed(ffn: FlashFFN, record: Callable[[torch.Tensor, Values], None]) -> Iterator[None]:
    """Give every forward's input x [tokens, d_model] and the values of every neuron [tokens, d_ff] to `record`.

    Only for forwards of several tokens that compute every neuron: of a layer without a predictor, or of a prompt.
    """
    whole: list[torch.Tensor] = []

    def observe(x: torch.Tensor, ids: Ids, found: Values) -> None:
        if ids[0] == 0:
            whole[:] = (torch.empty(len(x), ffn.d_ff, dtype=part.dtype, device="cpu") for part in found)
        for part, of_block in zip(whole, found, strict=True):
            part[:, ids[0] : ids[-1] + 1] = of_block
        if ids[-1] == ffn.d_ff - 1:
            record(x, Values(*whole))
            whole.clear()

    ffn.observer = observe
    try:
        yield
    finally:
        ffn.observer = None
