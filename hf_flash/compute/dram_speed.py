"""The bandwidth of DRAM, as decoding sees it."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import torch

from hf_flash.base.buffers import aligned_empty
from hf_flash.compute import library as native
from hf_flash.compute.kernels import linear


def dram_gb_per_s(nbytes: int = 256 << 20, repeats: int = 5) -> float:
    """GB/s at which a matrix-vector product reads a weight matrix in DRAM, with torch's current number of threads.

    It bounds decoding, because every weight in memory is read once per token. torch and the compiled part both make the
    product, and the faster result counts.
    """
    ways: list[Callable[..., torch.Tensor]] = [torch.nn.functional.linear, *([] if native.library() is None else [linear])]
    d_model = 4096
    weight = aligned_empty((max(1, nbytes // (4 * d_model)), d_model), torch.float32).fill_(1.0)  # memory as of weights
    x, best = torch.ones(1, d_model, dtype=torch.float32, device="cpu"), float("inf")
    with torch.no_grad():
        for way in ways * repeats:
            start = perf_counter()
            way(x, weight, None)
            best = min(best, perf_counter() - start)
    return weight.nbytes / 1e9 / best
