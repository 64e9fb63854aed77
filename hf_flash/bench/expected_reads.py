"""What the windows of a run should have read: its tokens are generated again while the selections are recorded.

The answer does not depend on what is in memory (contract C3), so the second run selects what the first one did. Recording
costs the run that is measured nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hf_flash.base.arrays import Ids
from hf_flash.bench.checks import window_law
from hf_flash.compute.arithmetic import Values
from hf_flash.errors import HfFlashError
from hf_flash.predictors.base import Predictor
from hf_flash.runtime.layer import FlashFFN
from hf_flash.runtime.model import find_runtime


def expected_reads(
    model: Any, prompts: list[list[int]], tokens: list[int], generate: Callable[[], list[int]]
) -> dict[str, float | None]:
    """`expected_bytes` per token and `window_tokens` (bench/checks.py), from what the tokens of the run selected.

    `None` for a batch: the law is of tokens that come one after the other.

    Args:
        tokens: what was generated.
        generate: generates it again, and returns it.
    """
    runtime = find_runtime(model)
    bundle_bytes, ffns = runtime.store.layers[0].bundle_bytes, runtime.ffns
    if runtime.fmt is None:  # every token uses everything
        neurons = sum(ffn.d_ff for ffn in ffns if ffn.window.capacity < ffn.d_ff)
        return {"expected_bytes": float(neurons * bundle_bytes), "window_tokens": None}
    if len(prompts) > 1:
        return {"expected_bytes": None, "window_tokens": None}
    first = len(prompts[0])
    recorders = [SelectionRecorder(ffn, first + len(tokens)) for ffn in ffns]
    if generate() != tokens:
        raise HfFlashError("the same prompt gave other tokens the second time")
    found = [window_law(recorder.used(), first, ffn.window.capacity) for recorder, ffn in zip(recorders, ffns, strict=True)]
    read, kept = np.sum(found, axis=0) / (len(tokens) - 1)
    return {"expected_bytes": float(read) * bundle_bytes, "window_tokens": float(kept) / len(ffns)}


class SelectionRecorder(Predictor):
    """A predictor that passes on what the layer's own predictor says and records it, once for each forward.

    Lookahead asks the predictor too, before a forward does; the forward's answer is the last, and the one that is kept. A
    prompt asks nobody (runtime/prompts.py): of its tokens what they really used is recorded, as the window learns it. All
    records go to one array that is allocated before: small pieces that stay, between large ones that go, would make the heap
    grow into the cap.

    Args:
        ffn: the layer; its predictor is replaced.
        tokens: in all forwards together.
    """

    def __init__(self, ffn: FlashFFN, tokens: int) -> None:
        self._predictor, self._d_ff, self.nbytes = ffn.predictor, ffn.d_ff, ffn.predictor.nbytes
        self._last: torch.Tensor | None = None
        self._active = np.zeros((0, ffn.d_ff), dtype=np.bool_)  # of a prompt, block by block
        self._is_active = ffn.activation.active
        self._bits = np.zeros((tokens, -(-ffn.d_ff // 8)), dtype=np.uint8)
        self._count = 0
        ffn.predictor, ffn.observer = self, self._observe
        ffn.register_forward_hook(self._keep)

    def select(self, x: torch.Tensor, allowed: torch.Tensor | None = None) -> torch.Tensor | None:
        self._predictor.bias = self.bias
        selected = self._predictor.select(x, allowed)
        self._last = None if selected is None else selected.cpu()
        return selected

    def _observe(self, x: torch.Tensor, ids: Ids, found: Values) -> None:
        if len(self._active) != len(x):
            self._active = np.zeros((len(x), self._d_ff), dtype=np.bool_)
        self._active[:, ids] = self._is_active(found.before).cpu().numpy()

    def _keep(self, *args: Any) -> None:
        used = self._active if self._last is None else self._last.numpy()
        end = self._count + len(used)
        self._bits[self._count : end] = np.packbits(used, axis=1)
        self._count, self._last = end, None

    def used(self) -> npt.NDArray[np.bool_]:
        """What was selected, [tokens, d_ff]."""
        return np.unpackbits(self._bits[: self._count], axis=1, count=self._d_ff).astype(bool)
