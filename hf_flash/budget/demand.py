"""What tokens need of the layers' neurons, and what windows of a given size leave to be read. Arithmetic, nothing else.

All of it follows from the *aggregated use* s(k): how many different neurons of a layer the last k tokens used (paper: figure
4a). A window with room for c neurons holds about what the last k tokens used, and a token reads what they did not use:

    misses(c) = s(k + 1) - s(k)   with k from s(k) = c

For a window that drops what was used least recently this is so by definition. `ResidentWindow` protects the last tokens'
neurons and of the others drops those that are used least: on recorded activations it reads a tenth more or less than this says
(docs/experiments.md).

s(k) is known up to some k: 256 tokens if the model was calibrated (16 in older calibrations), 5 if nothing is known but how
many neurons are active and how many of these 4 tokens left unused. *Beyond, a neuron that was not used yet is as likely to be
used by the next token as by the last ones known*: d_ff - s(k) falls exponentially. That is right if all neurons are alike. Real
ones are not, and those still unused are the rare ones: so the tail promises more reads than there will be, not fewer.

*Dividing room.* Layers differ: one uses 110 neurons a token, the next one 2. Every layer gets room for the same number of
tokens, c_l = s_l(k). With equally many neurons a busy layer would read again and again what an idle one has no use for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Curve = npt.NDArray[np.float64]

ACTIVE, FRESH = 0.03, 0.24  # OPT-6.7B, in the paper: active neurons; of these, not used by the 4 tokens before
PREDICTED: Final = {"quantized": 1.5, "lowrank": 3.0}  # neurons named for one that is active, where nobody measured
LONGEST: Final = 4096  # tokens that s(k) is continued to
_WORD_OF_4: Final = 4  # tokens that `fresh` looks back


@dataclass(frozen=True, eq=False)
class Demand:
    """What tokens need.

    Attributes:
        source: `"measured"` (a calibration), `"assumed"` (the paper's figures) or `"given"`.
        widths: neurons of each layer.
        active: share of them that a token leaves non-zero.
        predicted: neurons that are named for one that is active.
        use: aggregated use of *named* neurons, [layers, 4097], for k = 0 to 4096 tokens.
    """

    source: str
    widths: tuple[int, ...]
    active: float
    predicted: float
    use: Curve

    @property
    def selected(self) -> float:
        """Neurons that a token computes in a layer."""
        return float(self.use[:, 1].mean())

    def misses(self, capacities: Sequence[int], seen: tuple[int, int] | None = None) -> list[float]:
        """Neurons a token has to read in each layer.

        Args:
            capacities: neurons that each layer's window holds.
            seen: how many tokens came before: first and last. `None`: as many as it takes.
        """
        found, at = [], np.arange(LONGEST + 1)
        for curve, capacity in zip(self.use, capacities, strict=True):
            room = float(np.interp(capacity, curve, at))  # tokens that fit
            before = np.full(1, room) if seen is None else np.minimum(room, np.arange(seen[0], seen[1] + 1))
            found.append(float(np.mean(np.interp(before + 1, at, curve) - np.interp(before, at, curve))))
        return found

    def divide(self, total: int) -> tuple[int, ...]:
        """Room for `total` neurons divided among the layers: windows of equally many tokens, none larger than its layer."""
        tokens = float(np.interp(total, self.use.sum(0), np.arange(LONGEST + 1)))
        low = min(int(tokens), LONGEST - 1)
        exact = self.use[:, low] + (tokens - low) * (self.use[:, low + 1] - self.use[:, low])
        rooms = np.minimum(exact + 1e-6, self.widths).astype(np.int64)
        unused = np.array(self.widths) - rooms  # what 4096 tokens do not use: filled when everything else is
        rooms += (unused * (total - rooms.sum()) / max(total - rooms.sum(), unused.sum(), 1)).astype(np.int64)
        return tuple(int(room) for room in rooms)

    def held(self, tokens: int) -> int:
        """Neurons that so many tokens use, in all layers together: the room that `divide` gives each a window of them with."""
        return int(np.ceil(self.use[:, tokens]).sum())


def measured(
    layers: Sequence[Mapping[str, Any]], variant: str, kind: str, widths: Sequence[int], predicted: float | None = None
) -> Demand:
    """From a calibration's report.

    Args:
        layers: the report's `layers`.
        variant: the predictor's name there; `kind`: `"quantized"` or `"lowrank"`.
        widths: neurons of each layer.
        predicted: neurons named for one that is active, if not as measured.
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
    """From shares, the paper's where none are given: all layers alike, s(1) to s(5) a power of k, and the tail from there."""
    share, over = active or ACTIVE, predicted or PREDICTED[kind]
    grid = np.linspace(1e-6, 1.0, 10_001)
    power = float(np.interp(fresh or FRESH, (_WORD_OF_4 + 1.0) ** grid - _WORD_OF_4**grid, grid))
    tokens = range(1, _WORD_OF_4 + 2)
    curves = {d_ff: _named(curve(tokens, [share * d_ff * k**power for k in tokens], d_ff), over, d_ff) for d_ff in set(widths)}
    source = "assumed" if active is None and fresh is None else "given"
    return Demand(source, tuple(widths), share, over, np.stack([curves[d_ff] for d_ff in widths]))


def everything(widths: Sequence[int]) -> Demand:
    """Without a predictor: every token needs every neuron."""
    curves = [np.append(0.0, np.full(LONGEST, float(d_ff))) for d_ff in widths]
    return Demand("given", tuple(widths), 1.0, 1.0, np.stack(curves))


def _known(use: Mapping[str, Sequence[float]], d_ff: int) -> Curve:
    """The curve of what [`activity.AggregatedUse`] wrote down."""
    return curve([*range(1, len(use["mean"]) + 1), *use.get("far_tokens", ())], [*use["mean"], *use.get("far", ())], d_ff)


def curve(tokens: Sequence[float], used: Sequence[float], d_ff: int) -> Curve:
    """s(0) to s(4096) from some points: straight between them, continued as the module says, concave, at most d_ff."""
    at, known = np.array([0, *tokens]), np.minimum([0.0, *used], d_ff)
    every = np.arange(LONGEST + 1)
    back = min(int(np.searchsorted(at, 0.75 * at[-1])), len(at) - 2)
    left = np.maximum(d_ff - known, 1e-9)
    likely = max(0.0, np.log(left[back] / left[-1])) / (at[-1] - at[back])  # that an unused neuron is used by a token
    tail = d_ff - left[-1] * np.exp(-likely * (every - at[-1]))
    whole = np.where(every <= at[-1], np.interp(every, at, known), tail)
    steps = np.minimum.accumulate(np.maximum(np.diff(whole), 0.0))
    return np.append(0.0, np.minimum(np.cumsum(steps), d_ff))


def _named(use: Curve, predicted: float, d_ff: int) -> Curve:
    """Use of named neurons from that of active ones: as if each were used by that many more tokens, so never beyond d_ff."""
    one = min(use[1] / d_ff, 1 - 1e-9)
    if one <= 0.0:
        return use
    more = np.log1p(-min(predicted * one, 1 - 1e-9)) / np.log1p(-one)
    return np.asarray(d_ff * -np.expm1(more * np.log1p(-np.minimum(use / d_ff, 1 - 1e-12))))
