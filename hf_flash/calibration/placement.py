"""Placement: neurons that are active together lie side by side on flash, so that fewer reads fetch them (after Neuralink).

A read costs several microseconds whatever its size, so what counts is how many neurons one read brings: the *run length*. If
neurons u and v are neighbours, every token that misses both saves a read. The order that saves most is a path through all
neurons whose links weigh as much as possible. It is built greedily: the strongest link that still fits is added, again and
again.

    weight(u, v) = tokens that use both / sqrt(tokens that use u * tokens that use v)

The weight is relative because neurons that are used all the time are in DRAM and never read. Counting the neurons that a window
of some size really misses instead is as good at that size, and no better (docs/experiments.md).

Neurons only move within a *block*, the neurons that a call of several tokens works on at a time (compute/arithmetic.py). A
prompt needs most of a block, and still finds it in one piece. If neurons moved freely, prefill would need a read for every
neuron. Ids stay as they are (store/layout.py), so that no result changes, not even by rounding.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from hf_flash.base.arrays import Ids
from hf_flash.calibration.activity import Activations
from hf_flash.compute.arithmetic import block_rows
from hf_flash.config_arguments import ARGUMENTS
from hf_flash.runtime.window import ResidentWindow

_TOKENS: Final = 8192  # tokens that links are counted on; 36 000 save another 0.5 % of the reads
_WINDOW: Final[int] = ARGUMENTS["window"].default  # tokens
_SHARE: Final = 3  # reads are counted with a window that has room for one neuron in three
_LEAST_SAVED: Final = 0.02  # share of the reads that must be saved for a file to be rewritten
_DECODED: Final = 2048  # tokens that reads are counted on
_EDGES: Final = 4096  # links processed at a time

Place = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Reads:
    """What a window of `capacity` neurons has to read on held-out tokens."""

    capacity: int
    missing: float  # missing neurons per token
    before: float  # reads per token, with neurons in the order of ids
    after: float  # reads per token, with neurons as placed

    @property
    def saves_enough(self) -> bool:
        """Whether enough reads are saved to rewrite a layer's file."""
        return self.after <= (1 - _LEAST_SAVED) * self.before and self.before > 0

    def to_dict(self) -> dict[str, Any]:
        return {name: round(value, 3) for name, value in asdict(self).items()} | {"worth": self.saves_enough}


def place_neurons(data: Activations) -> Place:
    """The row on flash that each neuron should have, int32 [d_ff], based on the tokens that are trained on."""
    d_ff, place = data.d_ff, np.empty(data.d_ff, dtype=np.int32)
    chunks = list(data.chunks(0, data.trained_on))
    step = max(1, len(chunks) * (chunks[0].stop - chunks[0].start) // _TOKENS)  # spreads the tokens over the whole text
    size = block_rows(d_ff, tokens=2)
    for start in range(0, d_ff, size):
        count = min(size, d_ff - start)
        together = torch.zeros(count, count, dtype=torch.float32, device="cpu")
        for rows in chunks[::step]:
            active = data.active(rows)[:, start : start + count].float()
            together.addmm_(active.T, active)
        used = together.diagonal().clamp(min=1).sqrt()
        order = chain((together / used[:, None] / used).numpy())
        place[start + order] = np.arange(start, start + count)
    return place


def chain(weight: npt.NDArray[np.float32]) -> Ids:
    """The numbers 0 to n - 1 in an order in which neighbours have strong links.

    Among equal links, those between the nearest numbers come first, so that neurons that are never used stay in order.

    Args:
        weight: [n, n] the strength of each link, symmetric.
    """
    count = len(weight)
    first, second = np.triu_indices(count, 1)
    best = np.lexsort((first, second - first, -weight[first, second]))
    links: list[list[int]] = [[] for _ in range(count)]
    degree, far = np.zeros(count, dtype=np.int8), np.arange(count)  # the other end of the path that an end belongs to
    for at in range(0, len(best), _EDGES):
        a, b = first[best[at : at + _EDGES]], second[best[at : at + _EDGES]]
        free = (degree[a] < 2) & (degree[b] < 2) & (far[a] != b)
        for u, v in zip(a[free].tolist(), b[free].tolist(), strict=True):
            if degree[u] < 2 and degree[v] < 2 and far[u] != v:
                links[u].append(v)
                links[v].append(u)
                degree[u] += 1
                degree[v] += 1
                u, v = far[u], far[v]
                far[u], far[v] = v, u
    here, before, order = int(np.argmax(degree < 2)), -1, []
    while here >= 0:
        order.append(here)
        here, before = next((n for n in links[here] if n != before), -1), here
    return np.array(order)


def count_reads(data: Activations, place: Place) -> Reads:
    """Decode the held-out tokens one by one, with a window like a model's, and count the reads."""
    start = max(data.trained_on, len(data.x) - _DECODED)
    used = [np.flatnonzero(row) for rows in data.chunks(start, len(data.x)) for row in data.active(rows).numpy()]
    capacity = max(1, data.d_ff // _SHARE, *map(len, used))
    window = ResidentWindow(data.d_ff, torch.empty(capacity, 0, dtype=torch.bfloat16, device="cpu"), _WINDOW)
    missing = before = after = 0
    for ids in used:
        window.note_use(None, 1, ids)
        lacking = window.missing(ids)
        window.make_room(len(lacking), ids)
        window.commit(lacking, window.reserve(len(lacking)))
        missing += len(lacking)
        before += _runs(lacking)
        after += _runs(np.sort(place[lacking]))
    return Reads(capacity, *(count / max(1, len(used)) for count in (missing, before, after)))


def _runs(rows: Ids | Place) -> int:
    """Number of reads that fetch these rows, which are ascending."""
    return int(np.count_nonzero(np.diff(rows) != 1)) + 1 if len(rows) else 0
