"""How many of a layer's neurons tokens need, and how many a window of a given size leaves to be read. Only arithmetic.

All of it follows from the *aggregated use* s(k): how many different neurons of a layer the last k tokens used (paper: figure
4a). A window with room for c neurons holds about what the last k tokens used, and a token reads what they did not use:

    misses(c) = s(k + 1) - s(k)   with k from s(k) = c

For a window that drops the least recently used neurons this holds by definition. `ResidentWindow` protects the neurons of the
last tokens and drops the least used of the others: on recorded activations it reads a tenth more or less than this formula
predicts (docs/experiments.md).

s(k) is known up to some k: 256 tokens if the model was calibrated (16 in older calibrations), 5 if all that is known is how
many neurons are active and how many of these the 4 tokens before did not use. *Beyond that, an unused neuron is assumed to be
as likely to be used by the next token as by the last known ones*: d_ff - s(k) falls exponentially. This is right if all neurons
are alike. Real neurons are not, and the rare ones stay unused longest, so the tail predicts too many reads rather than too few.

*Dividing room.* Layers differ: one uses 110 neurons a token, the next one 2. Every layer gets room for the same number of
tokens, c_l = s_l(k). If each got room for the same number of neurons, a busy layer would reread its neurons all the time while
an idle layer had room to spare.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Curve = npt.NDArray[np.float64]

ACTIVE, FRESH = 0.03, 0.24  # OPT-6.7B, in the paper: share of active neurons; of these, share not used by the 4 tokens before
PREDICTED: Final = {"quantized": 1.5, "lowrank": 3.0}  # neurons named per active neuron, where nothing was measured
LONGEST: Final = 4096  # the largest k, in tokens, for which s(k) is worked out
_WORD_OF_4: Final = 4  # tokens that `fresh` looks back


@dataclass(frozen=True, eq=False)
class Demand:
    """How many neurons of each layer tokens need.

    Attributes:
        source: where the numbers come from: `"measured"` (a calibration), `"assumed"` (the paper's figures) or `"given"`.
        widths: neurons of each layer.
        active: share of the neurons that a token leaves non-zero.
        predicted: neurons that the predictor names per active neuron.
        use: aggregated use of *named* neurons, [layers, 4097], for k = 0 to 4096 tokens.
    """

    source: str
    widths: tuple[int, ...]
    active: float
    predicted: float
    use: Curve

    @property
    def selected(self) -> float:
        """Neurons that a token computes in a layer, on average."""
        return float(self.use[:, 1].mean())

    def misses(self, capacities: Sequence[int], seen: tuple[int, int] | None = None) -> list[float]:
        """Neurons a token has to read in each layer.

        Args:
            capacities: neurons that each layer's window holds.
            seen: how many tokens came before: the smallest and the largest number, between which the result is averaged.
                `None`: enough to fill the window.
        """
        found, at = [], np.arange(LONGEST + 1)
        for curve, capacity in zip(self.use, capacities, strict=True):
            room = float(np.interp(capacity, curve, at))  # tokens that fit
            before = np.full(1, room) if seen is None else np.minimum(room, np.arange(seen[0], seen[1] + 1))
            found.append(float(np.mean(np.interp(before + 1, at, curve) - np.interp(before, at, curve))))
        return found

    def divide(self, total: int) -> tuple[int, ...]:
        """Divide room for `total` neurons among the layers: windows of equally many tokens, none larger than its layer."""
        tokens = float(np.interp(total, self.use.sum(0), np.arange(LONGEST + 1)))
        low = min(int(tokens), LONGEST - 1)
        exact = self.use[:, low] + (tokens - low) * (self.use[:, low + 1] - self.use[:, low])
        rooms = np.minimum(exact + 1e-6, self.widths).astype(np.int64)
        unused = np.array(self.widths) - rooms  # neurons that these tokens do not use get the room that is left over
        rooms += (unused * (total - rooms.sum()) / max(total - rooms.sum(), unused.sum(), 1)).astype(np.int64)
        return tuple(int(room) for room in rooms)

    def held(self, tokens: int) -> int:
        """Neurons that so many tokens use, summed over all layers: with this room, `divide` makes windows of so many tokens."""
        return int(np.ceil(self.use[:, tokens]).sum())


def measured(
    layers: Sequence[Mapping[str, Any]], variant: str, kind: str, widths: Sequence[int], predicted: float | None = None
) -> Demand:
    """The demand that a calibration measured.

    Args:
        layers: the report's `layers`.
        variant: the predictor's name in the report.
        kind: `"quantized"` or `"lowrank"`.
        widths: neurons of each layer.
        predicted: neurons named per active neuron, instead of the measured number.
    """
    over, curves = [], []
    for layer, d_ff in zip(layers, widths, strict=True):
        own = layer.get(variant, {})
        over.append(float(predicted or own.get("selected") or PREDICTED[kind]))
        if predicted is None and "use" in own:
            curves.append(_known(own["use"], d_ff))
        else:
            curves.append(_named(_known(layer["use"], d_ff), over[-1], d_ff))
    active = float(np.mean([layer["active"] / d_ff for layer, d_ff in zip(layers, widths, strict=True)]))
    return Demand("measured", tuple(widths), active, float(np.mean(over)), np.stack(curves))


def supposed(widths: Sequence[int], kind: str, active: float | None, fresh: float | None, predicted: float | None) -> Demand:
    """The demand that follows from shares, the paper's where none are given. Layers are alike; up to k = 5, s(k) ~ k ** power.

    Args:
        widths: neurons of each layer.
        kind: `"quantized"` or `"lowrank"`.
        active: share of the neurons that a token leaves non-zero.
        fresh: share of these that the 4 tokens before did not use.
        predicted: neurons named per active neuron.
    """
    share, over = active or ACTIVE, predicted or PREDICTED[kind]
    grid = np.linspace(1e-6, 1.0, 10_001)
    power = float(np.interp(fresh or FRESH, (_WORD_OF_4 + 1.0) ** grid - _WORD_OF_4**grid, grid))
    tokens = range(1, _WORD_OF_4 + 2)
    curves = {d_ff: _named(curve(tokens, [share * d_ff * k**power for k in tokens], d_ff), over, d_ff) for d_ff in set(widths)}
    source = "assumed" if active is None and fresh is None else "given"
    return Demand(source, tuple(widths), share, over, np.stack([curves[d_ff] for d_ff in widths]))


def everything(widths: Sequence[int]) -> Demand:
    """The demand without a predictor: every token needs every neuron."""
    curves = [np.append(0.0, np.full(LONGEST, float(d_ff))) for d_ff in widths]
    return Demand("given", tuple(widths), 1.0, 1.0, np.stack(curves))


def _known(use: Mapping[str, Sequence[float]], d_ff: int) -> Curve:
    """The curve through the points that [`activity.AggregatedUse`] stored."""
    return curve([*range(1, len(use["mean"]) + 1), *use.get("far_tokens", ())], [*use["mean"], *use.get("far", ())], d_ff)


def curve(tokens: Sequence[float], used: Sequence[float], d_ff: int) -> Curve:
    """s(0) to s(4096) from some points: linear between them, then the exponential tail (see above); concave, at most d_ff."""
    at, known = np.array([0, *tokens]), np.minimum([0.0, *used], d_ff)
    every = np.arange(LONGEST + 1)
    back = min(int(np.searchsorted(at, 0.75 * at[-1])), len(at) - 2)
    left = np.maximum(d_ff - known, 1e-9)
    likely = max(0.0, np.log(left[back] / left[-1])) / (at[-1] - at[back])  # rate at which a token uses an unused neuron
    tail = d_ff - left[-1] * np.exp(-likely * (every - at[-1]))
    whole = np.where(every <= at[-1], np.interp(every, at, known), tail)
    steps = np.minimum.accumulate(np.maximum(np.diff(whole), 0.0))
    return np.append(0.0, np.minimum(np.cumsum(steps), d_ff))


def _named(use: Curve, predicted: float, d_ff: int) -> Curve:
    """The use of named neurons, from that of active ones: as if `more` times as many tokens used each, so at most d_ff."""
    one = min(use[1] / d_ff, 1 - 1e-9)
    if one <= 0.0:
        return use
    more = np.log1p(-min(predicted * one, 1 - 1e-9)) / np.log1p(-one)
    return np.asarray(d_ff * -np.expm1(more * np.log1p(-np.minimum(use / d_ff, 1 - 1e-12))))
