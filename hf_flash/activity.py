"""What a layer's neurons do on real text: what windows, placement and planning are worked out from (paper: section 3.1)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch

LONGEST: Final = 16  # tokens, the longest window that is measured
PARTNERS: Final = 8  # neighbours kept per neuron
_TOKENS: Final = 8192  # tokens that co-activation is counted on
_ROWS: Final = 1024


@dataclass
class Use:
    """Aggregated use s_agg(k): how many different neurons the last k tokens used, for k = 1 to 16 (paper: figure 4a).

    Feed it sequences; `mean` and `most` are lists by k. `most[k - 1]` is what a window of k tokens needs, the paper's Req_i.
    """

    tokens: int = 0
    total: np.ndarray[Any, Any] = field(default_factory=lambda: np.zeros(LONGEST, dtype=np.int64))
    peak: np.ndarray[Any, Any] = field(default_factory=lambda: np.zeros(LONGEST, dtype=np.int64))

    def add(self, used: torch.Tensor) -> None:
        """Count one sequence, bool [tokens, d_ff]. Its first tokens, whose windows are not full, are not counted."""
        mask = used.numpy()
        when = np.arange(1, len(mask) + 1, dtype=np.int32)[:, None]
        last = np.maximum.accumulate(np.where(mask, when, np.int32(-LONGEST)), axis=0)
        age = (when - last)[LONGEST - 1 :]  # tokens since a neuron was used
        for k in range(LONGEST):
            union = (age <= k).sum(axis=1)
            self.total[k] += union.sum()
            self.peak[k] = max(self.peak[k], union.max(initial=0))
        self.tokens += len(age)

    def to_dict(self) -> dict[str, list[float]]:
        """`mean` and `most` neurons, by k."""
        return {"mean": [round(float(v), 2) for v in self.total / max(1, self.tokens)], "most": [int(v) for v in self.peak]}


def frequency(masks: Iterable[torch.Tensor]) -> torch.Tensor:
    """How many tokens used each neuron, int32 [d_ff], over bool masks [tokens, d_ff]."""
    total: torch.Tensor | None = None
    for mask in masks:
        total = mask.sum(0, dtype=torch.int32) + (0 if total is None else total)
    assert total is not None
    return total


def partners(masks: Iterable[torch.Tensor], d_ff: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The neurons that are most often active together with each one.

    Args:
        masks: bool [tokens, d_ff]; only the first 8192 tokens are counted.

    Returns:
        ids int32 [d_ff, 8] and in how many tokens, int16 [d_ff, 8], most first.
    """
    packed, count = [], 0
    for mask in masks:
        packed.append(np.packbits(mask[: _TOKENS - count].numpy(), axis=1))
        count += len(packed[-1])
        if count >= _TOKENS:
            break
    ids, counts = [], []
    for start in range(0, d_ff, _ROWS):
        together = torch.zeros(min(_ROWS, d_ff - start), d_ff)
        for bits in packed:
            active = torch.from_numpy(np.unpackbits(bits, axis=1, count=d_ff)).float()
            together.addmm_(active[:, start : start + _ROWS].T, active)
        together[torch.arange(len(together)), torch.arange(start, start + len(together))] = -1.0  # itself
        top = together.topk(min(PARTNERS, d_ff), dim=1)
        ids.append(top.indices.to(torch.int32))
        counts.append(top.values.clamp_(0, _TOKENS).to(torch.int16))
    return torch.cat(ids), torch.cat(counts)
