"""What the rows of a benchmark are held against: the window law, the disk, and what no program could beat.

Of every row of hf_flash, from its own counters and from the speeds that the same run measured:

    expected_bytes    per token, by the window law: a window of the last k tokens reads s(k + 1) - s(k) neurons of a layer, s(k)
                      being what k tokens in a row use together (paper: figure 4). Averages of s need long texts; so the law
                      is applied token by token to what this run selected, k being the most tokens before it whose union fits
                      into the layer's window (`window_tokens`: its mean). A run begins with empty windows, so k grows with
                      it. `expected_ratio` is the bytes that were read, wrong guesses and rounding to pages included, to
                      these: below 1, what is kept is chosen better.
    disk_rate_share   bytes read per second of I/O, to what the disk's curve has at the row's mean size of a read, with as many
                      at a time as a layer asks for at once; the curve is the mean of one before the row and one after. I/O is
                      counted from the list of neurons to the last byte: issuing the reads is in it, as it is in the curve, and
                      so is the end of each batch, when few reads are left; the curve has none. The curve reads with threads, so
                      io_uring may be above 1, and so are reads that lookahead hides behind attention: they take no time of the
                      token. None where the page cache answers (reader "mmap"), or nothing was read.
    floor_ms          the least a token takes: weights it goes through in DRAM at DRAM's speed, and missing neurons at the
                      disk's best speed for reads of this size; the larger of both if they overlap, their sum if they do
                      not. Left out: the KV cache, activations, and that small products do not reach the speed of large ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_flash.config_arguments import DIRECT
from hf_flash.machine.disk import DiskPoint, rate_at


def window_law(used: npt.NDArray[np.bool_], first: int, capacity: int) -> tuple[int, int]:
    """What the paper's window reads of one layer: neurons that the last k tokens did not use.

    Args:
        used: [tokens, d_ff], from the beginning of the prompt.
        first: the first token that counts.
        capacity: neurons that fit. k is, at every token, how many of the tokens before it do.

    Returns:
        Neurons read, and the ks, both summed over the tokens that count.
    """
    tokens, d_ff = used.shape
    read = kept = 0
    age = np.full(d_ff, tokens + 1)  # tokens since a neuron was used, 1: the one before; never: more than there are
    for number, mask in enumerate(used):
        if number >= first:
            union = np.bincount(age, minlength=number + 1)[1 : number + 1].cumsum()  # of the last 1, 2, ... tokens
            k = int(np.searchsorted(union, capacity, side="right"))
            read += int((mask & (age > k)).sum())
            kept += k
        age += 1
        age[mask] = 1
    return read, kept


def add_checks(
    row: dict[str, Any], points: Sequence[DiskPoint], dram_gb_per_s: float, bus_gb_per_s: float | None = None
) -> dict[str, Any]:
    """A row of hf_flash with `expected_ratio`, `disk_rate_share`, `floor_ms` and `bus_ms`; other rows as they are.

    Args:
        dram_gb_per_s: of the memory where layers compute. bus_gb_per_s: to it from this machine's, if that is another.
    """
    if "stats" not in row:
        return row
    expected, count = row["expected_bytes"], row["stats"]["counters"]
    dram_ms, disk_ms = 1e3 * row["touched_bytes"] / (1e9 * dram_gb_per_s), 0.0
    if bus_gb_per_s is not None:
        row = row | {"bus_ms": 1e3 * row["bus_bytes"] / (1e9 * bus_gb_per_s)}
    share = None
    if row["stats"]["reader"] == DIRECT and count["reads"]:
        size, depth = row["run_bytes"], count["reads"] / count["calls"]
        share = row["read_gb_per_s"] / rate_at(points, size, depth)
        disk_ms = 1e3 * row["missing_bytes"] / (1e9 * rate_at(points, size))
    return row | {
        "expected_ratio": row["read_bytes"] / expected if expected else None,
        "disk_rate_share": share,
        "floor_ms": {"dram": dram_ms, "disk": disk_ms, "overlapped": max(dram_ms, disk_ms), "in_turn": dram_ms + disk_ms},
    }
