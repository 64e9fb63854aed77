"""The runtime behind a loaded flash model, `stats` and `close`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil
from torch import nn

from hf_flash.budget.expert_plan import ExpertPlan
from hf_flash.budget.plan import MemoryPlan
from hf_flash.config import FlashOffloadConfig
from hf_flash.errors import UsageError
from hf_flash.families.base import Shape
from hf_flash.predictors.base import NoPredictor, PredictorFormat
from hf_flash.runtime.counters import ExpertStats, FlashStats, NeuronStats
from hf_flash.runtime.engine import Engine, ExpertEngine
from hf_flash.runtime.experts import FlashExperts
from hf_flash.runtime.flash_embedding import FlashEmbedding
from hf_flash.runtime.flash_weights import Matrix, StoredWeight
from hf_flash.runtime.layer import FlashFFN
from hf_flash.store.checkpoint import Checkpoint
from hf_flash.store.layout import FlashStore


@dataclass
class FlashRuntime:
    """Everything behind a loaded model except the modules themselves. `find_runtime(model)` returns it."""

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

    def stats(self) -> NeuronStats:
        plan = self.plan
        return NeuronStats(
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
            scratch_bytes=self.engine.scratch_bytes if plan.host is None else plan.scratch_bytes,
            device=plan.device,
            beside_device=plan.beside.device if plan.beside else None,
            beside_bytes=plan.beside.resident_bytes if plan.beside else 0,
            host_bytes=plan.host.nbytes if plan.host else 0,
            window_bytes=sum(ffn.window.matrix.nbytes for ffn in self.ffns),
            dense_bytes=plan.dense_bytes,
            process_bytes=int(psutil.Process().memory_info().rss),
            kv_cache_bytes_per_token=self.shape.kv_bytes(self.engine.dtype.itemsize),
            counters=replace(self.engine.counters),
        )

    def stored_weights(self) -> list[StoredWeight]:
        """The parameters on flash, in the order of the layers."""
        return [Matrix(layer, name, self.engine.dtype) for layer in self.store.layers for name in layer.plain_specs]

    def release(self) -> None:
        """Give the windows' memory back."""
        for ffn in self.ffns:
            ffn.window.release()
            if self.plan.host is not None:  # the predictor takes memory on a device, which is scarce
                ffn.predictor = NoPredictor()
        self.engine.arithmetic.release()


@dataclass
class ExpertRuntime:
    """Everything behind a loaded mixture of experts except the modules themselves."""

    config: FlashOffloadConfig
    plan: ExpertPlan
    checkpoint: Checkpoint
    engine: ExpertEngine
    ffns: Sequence[FlashExperts]
    table: FlashEmbedding | None  # the table of embeddings, if it is on flash
    kv_bytes: int  # of the KV cache, per token of a sequence

    def __deepcopy__(self, memo: Any) -> ExpertRuntime:
        """A copied model reads the same files through the same slots."""
        return self

    def stats(self) -> ExpertStats:
        plan, reader = self.plan, self.engine.reader
        return ExpertStats(
            layers=plan.layers,
            experts=max(plan.experts),
            all_experts=sum(plan.experts),
            experts_bytes=reader.places.nbytes,
            experts_per_token=plan.used,
            resident_experts=tuple(layer.window.resident for layer in self.ffns),
            capacity=plan.capacity,
            reader=reader.name,
            reads_with=reader.reads_with,
            budget_bytes=plan.budget_bytes,
            minimum_bytes=plan.minimum_bytes,
            resident_bytes=plan.resident_bytes,
            scratch_bytes=plan.scratch_bytes,
            device=plan.device,
            beside_device=plan.beside.device if plan.beside else None,
            beside_bytes=plan.beside.resident_bytes if plan.beside else 0,
            host_bytes=plan.host.nbytes if plan.host else 0,
            window_bytes=sum(layer.window_bytes for layer in self.ffns),
            dense_bytes=plan.dense_bytes,
            process_bytes=int(psutil.Process().memory_info().rss),
            kv_cache_bytes_per_token=self.kv_bytes,
            counters=replace(self.engine.counters),
        )

    def stored_weights(self) -> list[StoredWeight]:
        """The parameters on flash, in the order of the layers."""
        modules = [*([self.table] if self.table else []), *self.ffns]
        return [stored for module in modules for stored in module.flash_weights.values()]

    def release(self) -> None:
        """Give the slots' memory back."""
        for layer in self.ffns:
            layer.release()
        if self.engine.on_device is not None:
            self.engine.on_device.release()
        if self.table:
            self.table.table.close()


def runtime_of(model: Any) -> FlashRuntime | ExpertRuntime:
    """The runtime of a flash model, of a pipeline around one, or of any module that contains one.

    Raises:
        UsageError: `model` contains no flash model.
    """
    module = getattr(model, "model", model) if not isinstance(model, nn.Module) else model
    for part in module.modules() if isinstance(module, nn.Module) else ():
        if isinstance(part, FlashFFN | FlashExperts) and part.engine is not None:
            runtime = part.engine.runtime()
            if isinstance(runtime, FlashRuntime | ExpertRuntime):
                return runtime
    raise UsageError(
        "not a flash model",
        got=type(model).__name__,
        hint="load it with from_pretrained(..., quantization_config=FlashOffloadConfig())",
    )


def find_runtime(model: Any) -> FlashRuntime:
    """As [`runtime_of`], for a model whose feed-forward layers are neurons.

    Raises:
        UsageError: `model` contains no flash model, or a mixture of experts.
    """
    runtime = runtime_of(model)
    if isinstance(runtime, FlashRuntime):
        return runtime
    raise UsageError(
        "this is for feed-forward layers of neurons, not for a mixture of experts",
        got=type(model).__name__,
        hint="its router says what a token needs: there is nothing to predict or repack",
    )


def stats(model: Any, *, reset: bool = False) -> FlashStats:
    """What a flash model did since loading, or since the last reset, and what it holds in memory.

    Args:
        model: a flash model, or a pipeline around one.
        reset: start the counters again from zero.

    Returns:
        A snapshot; `print` it, or take `to_dict()`.

    Raises:
        UsageError: `model` contains no flash model.
    """
    runtime = runtime_of(model)
    with runtime.engine.lock:
        snapshot = runtime.stats()
        if reset:
            runtime.engine.counters.reset()
    return snapshot


def close(model: Any) -> None:
    """Close a flash model's files and give the windows' memory back. May be called twice.

    Neither the model nor any copy of it can run afterwards.

    Raises:
        UsageError: `model` contains no flash model.
    """
    runtime = runtime_of(model)
    with runtime.engine.lock:
        runtime.engine.close()
        runtime.release()
