"""The dense pass of an evaluation: what each predictor would have selected, compared with what was active.

The model runs over the text with every neuron. In each layer a [`LayerJudge`] asks all candidates about the same inputs and
counts their mistakes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import numpy as np
import torch

from hf_flash.calibration.activity import AggregatedUse
from hf_flash.compute.arithmetic import Values
from hf_flash.evaluation.candidates import Candidate
from hf_flash.predictors.base import read_tensors
from hf_flash.predictors.quantized import QuantizedFormat, QuantizedPredictor
from hf_flash.runtime.layer import FlashFFN
from hf_flash.runtime.observing import observed
from hf_flash.store.layer_file import LayerStore
from hf_flash.store.layout import FlashStore

BINS: Final = np.linspace(-4.0, 6.0, 101)  # of pre-activations, in their layer's standard deviations
_USE_WINDOWS: Final = 8  # windows that aggregated use is counted on


@dataclass
class Tally:
    """Counts of one predictor in one layer, over all tokens.

    Attributes:
        neurons: that could have been selected: those of the layer, once for each token.
        energy: of active neurons, the sum of (hidden value * norm of the down column) ** 2. `lost`: of those that were missed.
        predicted_at, missed_at: neurons by their pre-activation, in `BINS`.
    """

    tokens: int = 0
    neurons: int = 0
    active: int = 0
    selected: int = 0
    missed: int = 0
    energy: float = 0.0
    lost: float = 0.0
    use: AggregatedUse = field(default_factory=AggregatedUse)
    predicted_at: np.ndarray[Any, Any] = field(default_factory=lambda: np.zeros(len(BINS) - 1, dtype=np.int64))
    missed_at: np.ndarray[Any, Any] = field(default_factory=lambda: np.zeros(len(BINS) - 1, dtype=np.int64))

    def add(
        self, selected: torch.Tensor, active: torch.Tensor, before: torch.Tensor, energy: torch.Tensor, scale: float
    ) -> None:
        """Compare what was selected with what was active, bool [tokens, d_ff].

        Args:
            before, energy: pre-activations and energy of each neuron. scale: standard deviation of the pre-activations.
        """
        missed = active & ~selected
        self.tokens += len(before)
        self.neurons += before.numel()
        self.active += int(active.sum())
        self.selected += int(selected.sum())
        self.missed += int(missed.sum())
        self.energy += float(energy.sum())
        self.lost += float(energy[missed].sum())
        self.predicted_at += np.histogram((before[selected] / scale).numpy(), BINS)[0]
        self.missed_at += np.histogram((before[missed] / scale).numpy(), BINS)[0]

    def rates(self) -> dict[str, float]:
        """Shares and averages; compare.py says what they are of."""
        return {
            "active": self.active / max(1, self.tokens),
            "missed": self.missed / max(1, self.active),
            "lost": self.lost / self.energy if self.energy else 0.0,
            "extra": (self.selected - self.active + self.missed) / max(1, self.neurons - self.active),
            "selected": self.selected / max(1, self.active),
        }


def total(tallies: Sequence[Tally]) -> Tally:
    """The counts of several layers together, without use and histograms."""
    summed = Tally()
    for name in ("tokens", "neurons", "active", "selected", "missed", "energy", "lost"):
        setattr(summed, name, sum(getattr(tally, name) for tally in tallies))
    return summed


def mean_use(uses: Sequence[AggregatedUse]) -> list[float]:
    """Aggregated use by window length, mean over layers."""
    return [float(v) for v in np.mean([use.to_dict()["mean"] for use in uses], axis=0)]


class LayerJudge:
    """Asks every candidate of one layer about the inputs of a dense forward, and counts.

    Args:
        ffn: the layer in the model that runs.

    Attributes:
        tallies: by candidate.
        use: of the neurons that were active.
    """

    def __init__(self, store: FlashStore, layer: LayerStore, ffn: FlashFFN, every: Iterable[Candidate]) -> None:
        self._activation, bias = ffn.activation, ffn.projections[layer.unit.deciding].bias
        self._predictors: dict[str, Any] = {}
        # Quantized predictors without a margin, and the errors they assume, [d_ff].
        self._without_margin: dict[str, tuple[QuantizedPredictor, torch.Tensor]] = {}
        for candidate in every:
            self._predictors[candidate.name] = self._load(store, layer, candidate, bias)
        self.tallies = {name: Tally() for name in self._predictors}
        down = layer.part("down")
        norms = (down[at : at + 1024].float().norm(dim=1) for at in range(0, layer.d_ff, 1024))
        self._down_norms = torch.cat(list(norms))  # [d_ff]
        self._scale, self._windows, self.use = 0.0, 0, AggregatedUse()
        # squared real, squared assumed, beyond three, count
        self._errors = {name: np.zeros(4) for name in self._without_margin}

    def _load(self, store: FlashStore, layer: LayerStore, candidate: Candidate, bias: torch.Tensor | None) -> Any:
        """A candidate's predictor; quantized ones that differ in the margin alone are loaded once."""
        fmt = candidate.fmt
        if not isinstance(fmt, QuantizedFormat):
            return candidate.load(store, layer, bias)
        if fmt.variant not in self._without_margin:
            whole = fmt.load(store, layer, bias)
            error = read_tensors(store.predictors[fmt.variant], f"{layer.prefix}.predictor")["error"]
            nothing = torch.zeros(layer.d_ff, dtype=torch.float32, device="cpu")
            self._without_margin[fmt.variant] = whole.with_margin(nothing, measured=True), error
        predictor, error = self._without_margin[fmt.variant]
        margin, measured = fmt.margins(candidate.visible(store), layer, error)
        return predictor.with_margin(margin, measured=measured)

    def release(self) -> None:
        """Drop the predictors; the tallies stay."""
        self._predictors, self._without_margin = {}, {}

    def look(self, context: int, x: torch.Tensor, found: Values) -> None:
        """Count a batch.

        Args:
            context: tokens in a window.
            x: the FFN's input [tokens, d_model]. found: of every neuron.
        """
        before = found.before.float()
        self._scale = self._scale or float(before.std())
        active = self._activation.active(before)
        energy = (found.hidden.float() * self._down_norms).square()
        for name, predictor in self._predictors.items():
            selected = predictor.select(x)
            selected = torch.ones_like(before, dtype=torch.bool) if selected is None else selected
            tally = self.tallies[name]
            tally.add(selected, active, before, energy, self._scale)
            self._add_use(tally.use, selected, context)
        self._add_use(self.use, active, context)
        self._windows += len(x) // context
        for name, (predictor, error) in self._without_margin.items():
            wrong = predictor.score(x) - before
            assumed = x.norm(dim=1, keepdim=True) * error / math.sqrt(x.shape[1])
            beyond = (wrong.abs() > 3 * assumed).sum()
            self._errors[name] += [wrong.square().sum(), assumed.square().sum(), beyond, wrong.numel()]

    def _add_use(self, use: AggregatedUse, used: torch.Tensor, context: int) -> None:
        """Count a batch, bool [tokens, d_ff], window by window, unless there were enough before it."""
        if self._windows < _USE_WINDOWS:
            for start in range(0, len(used), context):
                use.add(used[start : start + context])

    def rounding(self, variant: str) -> dict[str, float]:
        """Whether the errors of a quantized predictor are as its margin assumes."""
        real, assumed, beyond, count = self._errors[variant]
        return {"real_over_assumed": math.sqrt(real / assumed) if assumed else 0.0, "beyond_three": beyond / max(1.0, count)}


@contextmanager
def judging(
    ffns: Sequence[FlashFFN], store: FlashStore, every: Sequence[Candidate], context: int
) -> Iterator[list[LayerJudge]]:
    """Judge all candidates on what the model computes inside the block.

    Args:
        ffns: layers of the model, which has no predictor.
        context: tokens in a window; a forward takes whole windows.

    Yields:
        A judge for each layer.
    """
    judges = [LayerJudge(store, layer, ffn, every) for layer, ffn in zip(store.layers, ffns, strict=True)]
    with ExitStack() as stack:
        for ffn, judge in zip(ffns, judges, strict=True):
            stack.enter_context(observed(ffn, partial(judge.look, context)))
        yield judges
    for judge in judges:
        judge.release()
