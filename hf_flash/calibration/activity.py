"""What a layer's neurons do on real text: recorded activations, and the statistics that predictors, windows, placement and
planning are based on (paper: section 3.1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch

from hf_flash.errors import CalibrationError

LONGEST_MEASURED: Final = 16  # tokens: use is measured for every window up to this length
FAR: Final = (20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256)  # longer windows, in tokens
_EVERY: Final = 4  # for longer windows only every fourth token is counted: its neighbours give the same result
PARTNERS: Final = 8  # partners kept per neuron
_TOKENS: Final = 4096  # tokens that co-activation is counted on
_ROWS: Final = 1024  # neurons whose co-activation is counted at a time
CHUNK: Final = 256  # tokens processed at a time, as many as predictors take, so that sums are rounded alike
_BINS: Final = 1 << 16


@dataclass(frozen=True)
class Activations:
    """What one layer did on text, in mapped files.

    Attributes:
        x: bfloat16 [tokens, d_model], the FFN's input as a predictor sees it.
        bits: uint8 [tokens, d_ff / 8, rounded up], which neurons were active.
        d_ff: number of neurons.
        held_out: how many tokens at the end are never trained on.
    """

    x: torch.Tensor
    bits: torch.Tensor
    d_ff: int
    held_out: int

    def active(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """Which neurons were active for some of the tokens, bool [rows, d_ff]."""
        bits = np.unpackbits(self.bits[rows].numpy(), axis=-1, count=self.d_ff, bitorder="little")
        return torch.from_numpy(bits).bool()

    @property
    def trained_on(self) -> int:
        return len(self.x) - self.held_out

    def chunks(self, start: int, stop: int) -> Iterator[slice]:
        return (slice(at, min(at + CHUNK, stop)) for at in range(start, stop, CHUNK))

    @property
    def held_out_chunks(self) -> Iterator[slice]:
        return self.chunks(self.trained_on, len(self.x))

    def judge(self, select: Callable[[torch.Tensor], torch.Tensor]) -> tuple[int, int, int]:
        """How many neurons are active, selected, and both, summed over all held-out tokens.

        Args:
            select: gets x [tokens, d_model], and returns the selected neurons, bool [tokens, d_ff].
        """
        counts = [0, 0, 0]
        for rows in self.held_out_chunks:
            active, selected = self.active(rows), select(self.x[rows])
            for number, mask in enumerate((active, selected, active & selected)):
                counts[number] += int(mask.sum())
        return counts[0], counts[1], counts[2]


def pack_bits(active: torch.Tensor) -> torch.Tensor:
    """bool [tokens, n] to uint8 [tokens, n / 8], rounded up."""
    return torch.from_numpy(np.packbits(active.numpy(), axis=-1, bitorder="little"))


def moments(data: Activations) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [d_model] and covariance [d_model, d_model] of the inputs that are trained on, float32.

    Raises:
        CalibrationError: the activations contain NaN or infinite values.
    """
    count, d_model = data.trained_on, data.x.shape[1]
    mean, products = (
        torch.zeros(d_model, dtype=torch.float64, device="cpu"),
        torch.zeros(d_model, d_model, dtype=torch.float32, device="cpu"),
    )
    for rows in data.chunks(0, count):
        mean += data.x[rows].sum(0, dtype=torch.float64) / count
    for rows in data.chunks(0, count):
        x = (data.x[rows] - mean).float()  # subtracted before the products: a mean may be much larger than the spread
        products.addmm_(x.T, x)
    products.div_(count)
    if not torch.isfinite(products).all():
        raise CalibrationError(
            "the activations contain NaN or infinite values", hint="load in another dtype, or check the checkpoint"
        )
    return mean.float(), products


def reached_by(share: float, values: Callable[[], Iterable[torch.Tensor]]) -> float | None:
    """The largest threshold (almost) that at least `share` of all values reach; `None` if there are no values.

    Args:
        share: from 0 to 1.
        values: returns all values, in parts; called twice. They are counted, not kept.
    """
    low, high, count = math.inf, -math.inf, 0
    for part in values():
        if len(part):
            low, high, count = min(low, float(part.min())), max(high, float(part.max())), count + len(part)
    if not count:
        return None
    bins = torch.zeros(_BINS, dtype=torch.float64, device="cpu")
    width = max(high - low, 1e-6 * max(1.0, abs(low), abs(high))) / (_BINS - 1)
    for part in values():
        bins += torch.bincount(((part.double() - low) / width).long().clamp_(0, _BINS - 1), minlength=_BINS)
    above = bins.flip(0).cumsum(0).flip(0)  # values in a bin and all higher ones
    last = int((above >= math.ceil(share * count)).nonzero()[-1])
    return low + (last - 0.01) * width  # a little lower, so that values on the edge count


@dataclass
class AggregatedUse:
    """Counts aggregated use s_agg(k): how many different neurons the last k tokens used (paper: figure 4a).

    Add sequences, then call `to_dict`. Its `mean` and `most` are lists for k = 1 to 16; `most[k - 1]` is the room that a window
    of k tokens needs, the paper's Req_i. `far` has the mean for larger k, listed in `far_tokens`: up to 256 tokens, as far as
    the sequences are long enough.
    """

    tokens: int = 0
    total: np.ndarray[Any, Any] = field(default_factory=lambda: np.zeros(LONGEST_MEASURED, dtype=np.int64))
    peak: np.ndarray[Any, Any] = field(default_factory=lambda: np.zeros(LONGEST_MEASURED, dtype=np.int64))
    far_count: np.ndarray[Any, Any] = field(default_factory=lambda: np.zeros(len(FAR), dtype=np.int64))
    far_total: np.ndarray[Any, Any] = field(default_factory=lambda: np.zeros(len(FAR), dtype=np.int64))

    def add(self, used: torch.Tensor) -> None:
        """Count one sequence, bool [tokens, d_ff]. Its first tokens, whose windows are not full, are not counted."""
        mask = used.numpy()
        when = np.arange(1, len(mask) + 1, dtype=np.int32)[:, None]
        since = when - np.maximum.accumulate(np.where(mask, when, np.int32(-FAR[-1])), axis=0)  # 0: used by this token
        age = since[LONGEST_MEASURED - 1 :]
        for k in range(LONGEST_MEASURED):
            union = (age <= k).sum(axis=1)
            self.total[k] += union.sum()
            self.peak[k] = max(self.peak[k], union.max(initial=0))
        self.tokens += len(age)
        for number, k in enumerate(FAR):
            rows = since[k - 1 :: _EVERY]
            self.far_total[number] += (rows < k).sum()
            self.far_count[number] += len(rows)

    def to_dict(self) -> dict[str, list[float]]:
        """Numbers of neurons: `mean` and `most` for each k from 1 on, `far` for each of `far_tokens`."""
        far = {k: total / count for k, total, count in zip(FAR, self.far_total, self.far_count, strict=True) if count}
        return {
            "mean": [round(float(v), 2) for v in self.total / max(1, self.tokens)],
            "most": [int(v) for v in self.peak],
            "far_tokens": list(far),
            "far": [round(float(v), 2) for v in far.values()],
        }


def frequency(masks: Iterable[torch.Tensor]) -> torch.Tensor:
    """How many tokens used each neuron, int32 [d_ff], over bool masks [tokens, d_ff]."""
    total: torch.Tensor | None = None
    for mask in masks:
        total = mask.sum(0, dtype=torch.int32) + (0 if total is None else total)
    assert total is not None
    return total


def partners(masks: Iterable[torch.Tensor], d_ff: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For each neuron, the neurons that are most often active together with it.

    Args:
        masks: bool [tokens, d_ff]; only the first 4096 tokens are counted.
        d_ff: number of neurons.

    Returns:
        Their ids, int32 [d_ff, 8], and the number of tokens that use both, int16 [d_ff, 8]; the most frequent first.
    """
    packed, count = [], 0
    for mask in masks:
        packed.append(np.packbits(mask[: _TOKENS - count].numpy(), axis=1))
        count += len(packed[-1])
        if count >= _TOKENS:
            break
    ids, counts = [], []
    for start in range(0, d_ff, _ROWS):
        together = torch.zeros(min(_ROWS, d_ff - start), d_ff, dtype=torch.float32, device="cpu")
        for bits in packed:
            active = torch.from_numpy(np.unpackbits(bits, axis=1, count=d_ff)).float()
            together.addmm_(active[:, start : start + _ROWS].T, active)
        together[
            torch.arange(len(together), dtype=torch.int64, device="cpu"),
            torch.arange(start, start + len(together), dtype=torch.int64, device="cpu"),
        ] = -1.0  # itself
        top = together.topk(min(PARTNERS, d_ff), dim=1)
        ids.append(top.indices.to(torch.int32))
        counts.append(top.values.clamp_(0, _TOKENS).to(torch.int16))
    return torch.cat(ids), torch.cat(counts)
