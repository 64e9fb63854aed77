"""Types of the arrays that travel between rooms: ids of neurons, masks over neurons, bytes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Bytes = npt.NDArray[np.uint8]


def runs(ascending: npt.NDArray[np.integer[Any]]) -> Iterator[tuple[int, int]]:
    """Yield the runs of consecutive ids, each as the index of its first id and the index after its last."""
    breaks = (np.flatnonzero(np.diff(ascending) != 1) + 1).tolist()
    return ((begin, end) for begin, end in pairwise([0, *breaks, len(ascending)]) if begin < end)


def count_uses(selected: Mask) -> Ids:
    """Count how many tokens use each neuron, int64 [d_ff], from bool [tokens, d_ff]."""
    total = np.zeros(selected.shape[1], dtype=np.int64)
    for at in range(0, len(selected), 255):  # 255 uses fit in a byte, and bytes add much faster than wider integers
        total += np.add.reduce(selected[at : at + 255].view(np.uint8), axis=0, dtype=np.uint8)
    return total
