"""`ModelSlice`: a few layers in a model's real shape, which generate as the model would.

A slice has made-up weights. It generates through transformers with the real `FlashFFN`, window, reader and predictor. Only
what a token needs is prescribed: so many neurons, of which so many are not in DRAM. So caches are as cold and Python as slow as
in the real model, and reads come from the disk as they will, at random, in batches of a layer's size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any, Final

import numpy as np
import torch
from transformers import StoppingCriteria

from hf_flash.base.buffers import aligned_empty
from hf_flash.config_arguments import ARGUMENTS
from hf_flash.families.base import longest_sequence
from hf_flash.families.decoder import decoder_layers
from hf_flash.planning.model import PlannedModel
from hf_flash.predictors.base import NoPredictor, Predictor
from hf_flash.runtime.engine import Engine
from hf_flash.runtime.window import ResidentWindow

WINDOW_BYTES: Final = 64 << 20  # of a slice's layer
_MISSES: Final = (0.0, 1 / 128, 1 / 32, 1 / 8, 1 / 2)  # shares of a token's neurons that are read, in turn
_TOKENS: Final = 9  # timed for each


class ModelSlice:
    """Some layers of a model in its real shape, whose predictors name the neurons that are prescribed.

    Args:
        neurons: that a token computes in a layer.
        predicted: neurons that are named for one that is active.
        engine: reads files of `rows` neurons a layer.
        capacity: of the real model's windows.

    Attributes:
        needed: neurons that a token computes in a layer of the slice.
        misses: how many of them are read, in turn: what [`run`] is to be called with.
    """

    def __init__(
        self, model: PlannedModel, neurons: float, predicted: float, engine: Engine, layers: int, rows: int, capacity: int
    ) -> None:
        d_ff = model.shape.d_ff
        self.engine, self.layers, self.rows, self.all = engine, layers, rows, model.fmt is None
        self.needed = rows if self.all else max(1, min(round(neurons), rows // 2))
        self.misses = [rows] if self.all else sorted({0, 1, *(round(share * self.needed) for share in _MISSES)})
        room = max(2 * self.needed, min(capacity, WINDOW_BYTES // model.unit.row_bytes))
        room = 0 if self.all else min(room, rows - self.needed)
        self.model, self.ffns = model.skeleton((layers, rows))
        self.decoder_layers = decoder_layers(self.model, model.family)
        _fill(self.model)
        self.generator = np.random.default_rng(0)
        self.predictors = [PrescribedPredictor(model, d_ff, rows) for _ in self.ffns]
        for ffn, predictor in zip(self.ffns, self.predictors, strict=True):
            window = ResidentWindow(rows, engine.arithmetic.matrix(room), ARGUMENTS["window"].default)
            window.matrix.fill_(0.01)
            ids = np.sort(self.generator.permutation(rows)[:room])
            window.commit(ids, window.reserve(room))
            ffn.attach(engine, window, NoPredictor() if self.all else predictor)
            bias = ffn.projections[model.unit.deciding].bias
            if bias is not None:  # large beside anything that is added to it: so many are active and no more
                idle = torch.from_numpy(self.generator.random(rows) * max(1.0, predicted) >= 1.0)
                bias.data = torch.where(idle, -100.0, 100.0).to(model.dtype)

    def run(self, missing: int) -> dict[str, float]:
        """Generate some tokens for which every layer reads `missing` neurons; medians in seconds.

        Returns:
            `io`, `manage`, `predict`, `compute` and `rest` of a layer, `head` of a token.
        """
        clock = _TokenClock(self, missing)
        tokens = min(_TOKENS + 1, longest_sequence(self.model.config) - 1)  # and the first, which is not timed
        with clock.watching(self.decoder_layers):
            start = torch.full((1, 1), 4, dtype=torch.int64, device="cpu")
            self.model.generate(
                start, attention_mask=torch.ones_like(start), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
                num_beams=1, stopping_criteria=[clock],
            )  # fmt: skip
        return {part: float(np.median([token[part] for token in clock.found])) for part in clock.found[0]}

    def prescribe(self, missing: int) -> None:
        """Choose what the next token needs: neurons at random, `missing` of them not in DRAM."""
        for ffn, predictor in zip(self.ffns, self.predictors, strict=True):
            resident = ffn.window.slot_of >= 0
            hits = self.generator.permutation(np.flatnonzero(resident))[: self.needed - missing]
            new = self.generator.permutation(np.flatnonzero(~resident))[:missing]
            predictor.answer = torch.zeros(1, self.rows, dtype=torch.bool, device="cpu")
            predictor.answer[0, torch.from_numpy(np.concatenate([hits, new]))] = True


def _fill(model: Any) -> None:
    """Give a model without memory weights that are small and all alike, aligned as loaded ones are."""
    model.to_empty(device="cpu")
    model.tie_weights()
    model.eval()
    for tensor in {id(t): t for t in [*model.parameters(), *model.buffers()]}.values():
        tensor.data = aligned_empty(tuple(tensor.shape), tensor.dtype).fill_(0.01)


class _TokenClock(StoppingCriteria):
    """Takes a token's times where it is chosen, and prescribes the next one's neurons outside of them. Never stops a run."""

    def __init__(self, cut: ModelSlice, missing: int) -> None:
        self._cut, self._missing, self.found = cut, missing, list[dict[str, float]]()
        self._start, self._entered, self._in_layers, self._first = 0.0, 0.0, 0.0, True
        cut.prescribe(missing)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        whole, count, layers = perf_counter() - self._start, self._cut.engine.counters, self._cut.layers
        if not self._first:  # that one had the prompt's work in it
            parts = {name: getattr(count, f"{name}_s") / layers for name in ("io", "manage", "predict", "compute")}
            rest = self._in_layers / layers - sum(parts.values())
            self.found.append(parts | {"rest": rest, "head": whole - self._in_layers})
        self._first = False
        self._cut.prescribe(self._missing)
        count.reset()
        self._start = perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device="cpu")

    @contextmanager
    def watching(self, layers: Any) -> Iterator[None]:
        """Take the time from the first layer's beginning to the last one's end."""

        def enter(*args: Any) -> None:
            self._entered = perf_counter()

        def leave(*args: Any) -> None:
            self._in_layers = perf_counter() - self._entered

        handles = [layers[0].register_forward_pre_hook(enter), layers[-1].register_forward_hook(leave)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class PrescribedPredictor(Predictor):
    """A predictor that takes as long as the model's own, and answers what is prescribed.

    It is a real one of the model's shape with made-up weights, whose answer is thrown away.

    Attributes:
        answer: bool [1, rows], what `select` returns.
    """

    def __init__(self, model: PlannedModel, d_ff: int, rows: int) -> None:
        self.answer = torch.zeros(1, rows, dtype=torch.bool, device="cpu")
        self._real = NoPredictor() if model.fmt is None else model.fmt.made_up(d_ff, model.shape.d_model)
        self.nbytes = self._real.nbytes

    def select(self, x: torch.Tensor, allowed: torch.Tensor | None = None) -> torch.Tensor:
        self._real.select(x)
        return self.answer
