"""A loaded flash model: what its layers run on, what it did and holds, how it is closed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil
from torch import nn

from hf_flash.budget.plan import MemoryPlan
from hf_flash.config import FlashOffloadConfig
from hf_flash.errors import UsageError
from hf_flash.families.base import Shape
from hf_flash.predictors.base import PredictorFormat
from hf_flash.runtime.counters import FlashStats
from hf_flash.runtime.engine import Engine
from hf_flash.runtime.layer import FlashFFN
from hf_flash.store.checkpoint import Checkpoint
from hf_flash.store.layout import FlashStore


@dataclass
class FlashRuntime:
    """Everything behind a loaded model but the modules themselves. Reach it with `find_runtime(model)`."""

    config: FlashOffloadConfig
    plan: MemoryPlan
    store: FlashStore
    checkpoint: Checkpoint
    fmt: PredictorFormat | None
    shape: Shape
    engine: Engine
    ffns: Sequence[FlashFFN]

    def __deepcopy__(self, memo: Any) -> FlashRuntime:
        """A copied model reads the same store through the same windows."""
        return self

    def stats(self) -> FlashStats:
        plan = self.plan
        return FlashStats(
            layers=plan.layers,
            d_ff=plan.d_ff,
            neurons=sum(plan.widths),
            window=self.config.window,
            capacity=plan.capacity,
            predictor=self.fmt.variant if self.fmt else "none",
            reader=self.engine.reader.name,
            reads_with=self.engine.reader.reads_with,
            budget_bytes=plan.budget_bytes,
            minimum_bytes=plan.minimum_bytes,
            resident_bytes=plan.resident_bytes,
            predictor_bytes=sum(ffn.predictor.nbytes for ffn in self.ffns),
            scratch_bytes=self.engine.scratch_bytes,
            window_bytes=sum(ffn.window.matrix.nbytes for ffn in self.ffns),
            dense_bytes=plan.dense_bytes,
            process_bytes=int(psutil.Process().memory_info().rss),
            kv_cache_bytes_per_token=self.shape.kv_bytes(self.engine.dtype.itemsize),
            counters=replace(self.engine.counters),
        )


def find_runtime(model: Any) -> FlashRuntime:
    """The runtime of a flash model, of a pipeline around one, or of any module that contains one.

    Raises:
        UsageError: there is no flash model in it.
    """
    module = getattr(model, "model", model) if not isinstance(model, nn.Module) else model
    for part in module.modules() if isinstance(module, nn.Module) else ():
        if isinstance(part, FlashFFN) and part.engine is not None:
            runtime = part.engine.runtime()
            if isinstance(runtime, FlashRuntime):
                return runtime
    raise UsageError(
        "not a flash model",
        got=type(model).__name__,
        hint="load it with from_pretrained(..., quantization_config=FlashOffloadConfig())",
    )


def stats(model: Any, *, reset: bool = False) -> FlashStats:
    """What a flash model did since loading, or since the last reset, and what it holds in DRAM.

    Args:
        model: a flash model, or a pipeline around one.
        reset: start the counters again from zero.

    Returns:
        A snapshot; `print` it, or take `to_dict()`.
    """
    runtime = find_runtime(model)
    with runtime.engine.lock:
        snapshot = runtime.stats()
        if reset:
            runtime.engine.counters.reset()
    return snapshot


def close(model: Any) -> None:
    """Close the store's files and give the windows' memory back. May be called twice.

    Neither the model nor any copy of it can run afterwards.
    """
    runtime = find_runtime(model)
    with runtime.engine.lock:
        runtime.engine.close()
        for ffn in runtime.ffns:
            ffn.window.release()
