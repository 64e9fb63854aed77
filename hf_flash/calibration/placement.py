"""Placement: neurons that are active together lie side by side on flash, so that fewer reads fetch them (after Neuralink).

A read costs several microseconds whatever its size, so what counts is how many neurons one read brings: the *run length*. If
neurons u and v are neighbours, every token that misses both saves a read. The order that saves most is a path through all
neurons whose steps weigh as much as possible, which is taken greedily: the strongest link that still fits, again and again.

    weight(u, v) = tokens that use both / sqrt(tokens that use u * tokens that use v)

It is relative because the neurons that are used all the time are in DRAM and never read. Counting what a window of some size
really misses instead is as good at that size, and no better (docs/experiments.md).

Neurons only move within a *block*, the neurons that a call of several tokens works on at a time (compute/arithmetic.py). A
prompt needs most of a block, and still finds it in one piece; were neurons to move freely, prefill would take a read for every
neuron. Ids stay as they are (store/layout.py), so that nothing that is computed changes, not even by rounding.
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

_TOKENS: Final = 8192  # counted; 36 000 save another 0.5 % of the reads
_WINDOW: Final[int] = ARGUMENTS["window"].default  # tokens
_SHARE: Final = 3  # reads are counted with room for one neuron in so many
_LEAST_SAVED: Final = 0.02  # of the reads must be saved for a file to be written again
_DECODED: Final = 2048  # tokens that reads are counted on
_EDGES: Final = 4096  # looked at at a time

Place = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Reads:
    """What a window of `capacity` neurons has to read on held-out tokens."""

    capacity: int
    missing: float  # neurons a token
    before: float  # reads a token in the order of ids
    after: float  # reads a token as placed

    @property
    def saves_enough(self) -> bool:
        """Whether enough is saved to write a layer's file again."""
        return self.after <= (1 - _LEAST_SAVED) * self.before and self.before > 0

    def to_dict(self) -> dict[str, Any]:
        return {name: round(value, 3) for name, value in asdict(self).items()} | {"worth": self.saves_enough}


def place_neurons(data: Activations) -> Place:
    """The row of each neuron, int32 [d_ff], from the tokens that are trained on."""
    d_ff, place = data.d_ff, np.empty(data.d_ff, dtype=np.int32)
    chunks = list(data.chunks(0, data.trained_on))
    step = max(1, len(chunks) * (chunks[0].stop - chunks[0].start) // _TOKENS)  # from all over the text
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
    """All of 0 to n - 1 in an order in which neighbours weigh much: a path through `weight` [n, n], symmetric.

    Of equal links the one between the nearest numbers comes first, so that what is never used stays in order.
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
    """Decode the held-out tokens one by one, with a window as a model has it, and count what is read."""
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
    """Reads that fetch these rows, ascending."""
    return int(np.count_nonzero(np.diff(rows) != 1)) + 1 if len(rows) else 0
