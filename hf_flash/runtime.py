"""A loaded flash model: what its layers run on, what it holds, how it is saved, pushed and closed."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MethodType
from typing import Any

import huggingface_hub
import torch
from torch import nn

from .budget import MemoryPlan
from .checkpoint import Checkpoint
from .config import FlashOffloadConfig
from .errors import ConfigError, UsageError
from .ffn import Engine, FlashFFN, Scratch
from .memory import load_into_memory, trim_heap
from .predictor import DEFAULT_MARGIN, NoPredictor, Predictor, QuantizedFormat, find_predictor, load_quantized
from .reader import open_reader
from .repack import save_folder
from .stats import FlashStats
from .store import FlashStore
from .window import ResidentWindow


@dataclass
class FlashRuntime:
    """Everything behind a loaded model but the modules themselves. Reach it with `find_runtime(model)`."""

    config: FlashOffloadConfig
    plan: MemoryPlan
    store: FlashStore
    checkpoint: Checkpoint
    form: QuantizedFormat | None
    engine: Engine
    ffns: Sequence[FlashFFN]

    def stats(self) -> FlashStats:
        plan = self.plan
        return FlashStats(
            layers=plan.layers,
            d_ff=plan.d_ff,
            window=self.config.window,
            capacity=plan.capacity,
            predictor=self.form.variant if self.form else "none",
            reader=self.engine.reader.name,
            budget_bytes=plan.budget_bytes,
            minimum_bytes=plan.minimum_bytes,
            resident_bytes=plan.resident_bytes,
            predictor_bytes=sum(ffn.predictor.nbytes for ffn in self.ffns),
            scratch_bytes=self.engine.scratch_bytes,
            window_bytes=sum(ffn.window.high_water_bytes for ffn in self.ffns),
            window_limit_bytes=plan.window_bytes,
            dense_bytes=plan.dense_bytes,
            counters=replace(self.engine.counters),
        )


def attach(
    model: nn.Module,
    config: FlashOffloadConfig,
    plan: MemoryPlan,
    store: FlashStore,
    checkpoint: Checkpoint,
    form: QuantizedFormat | None,
    ffns: Sequence[FlashFFN],
    dtype: torch.dtype,
    spare_bytes: int,
) -> None:
    """Bring a model whose other weights are loaded to life: weights into memory, predictors, windows, reader.

    Args:
        spare_bytes: memory beyond the budget that the page cache may use.
    """
    load_into_memory({id(t): t for t in [*model.parameters(), *model.buffers()]}.values())
    first = store.layers[0]
    scratch = Scratch(first.d_ff, first.d_model, dtype)
    engine = Engine(open_reader(store, config.reader, config.io_threads, dtype, spare_bytes), scratch, dtype)
    path = find_predictor(store, form) if form else None
    margin = config.predictor_margin if config.predictor_margin is not None else DEFAULT_MARGIN[config.predictor_bits]
    for ffn, layer in zip(ffns, store.layers, strict=True):
        predictor: Predictor = NoPredictor()
        if path is not None and form is not None:
            predictor = load_quantized(path, layer, ffn.bias, form, margin)
        window = ResidentWindow(layer.d_ff, layer.d_model, plan.capacity, config.window, dtype, scratch.gathered)
        ffn.attach(engine, window, predictor)
    trim_heap()
    engine.runtime = FlashRuntime(config, plan, store, checkpoint, form, engine, ffns)
    model.save_pretrained = MethodType(save_pretrained, model)  # type: ignore[assignment]
    model.push_to_hub = MethodType(push_to_hub, model)  # type: ignore[assignment]


def find_runtime(model: Any) -> FlashRuntime:
    """The runtime of a flash model, of a pipeline around one, or of any module that contains one.

    Raises:
        UsageError: there is no flash model in it.
    """
    module = getattr(model, "model", model) if not isinstance(model, nn.Module) else model
    for part in module.modules() if isinstance(module, nn.Module) else ():
        if isinstance(part, FlashFFN) and part.engine is not None and part.engine.runtime is not None:
            runtime: FlashRuntime = part.engine.runtime
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
    """Close the store's files and give the windows' memory back. The model cannot run afterwards. May be called twice."""
    runtime = find_runtime(model)
    runtime.engine.close()
    for ffn in runtime.ffns:
        ffn.window.release()


def save_pretrained(
    model: Any,
    save_directory: Any,
    is_main_process: bool = True,
    state_dict: Any = None,
    push_to_hub: bool = False,
    max_shard_size: int | str = "5GB",
    variant: str | None = None,
    token: str | bool | None = None,
    **kwargs: Any,
) -> None:
    """Save a flash model: the store is copied as it is, tensors that were changed are written as they are now.

    Takes the place of `PreTrainedModel.save_pretrained` on the instance. With a PEFT adapter on it, the adapter alone is
    saved, as transformers does.

    Raises:
        ConfigError: `state_dict` or `variant` is given: the store has no use for them.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        type(model).save_pretrained(
            model, save_directory, is_main_process=is_main_process, push_to_hub=push_to_hub, token=token, **kwargs
        )
        return
    if state_dict is not None or variant is not None:
        raise ConfigError(
            "a flash model is saved from its store",
            where="save_pretrained",
            got="state_dict or variant",
            hint="leave them out, or `hf_flash.restore` the plain checkpoint first",
        )
    if is_main_process:
        _save(model, Path(save_directory))
    if push_to_hub:
        repo_id = kwargs.pop("repo_id", Path(save_directory).name)
        push(save_directory, repo_id, token=token, **kwargs)


def _save(model: Any, folder: Path) -> None:
    runtime = find_runtime(model)
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    config = json.loads(model.config.to_json_string())
    changed = _changed(model.state_dict(), runtime.checkpoint, runtime.store)
    save_folder(folder, runtime.checkpoint, runtime.store, config, changed)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _changed(state: dict[str, torch.Tensor], checkpoint: Checkpoint, store: FlashStore) -> dict[str, torch.Tensor]:
    """Tensors of the model that are not what its checkpoint says, under the checkpoint's names, and those it has not."""
    ffn = {name for layer in store.layers for name in (layer.up_name, layer.down_name)}
    seen: set[int] = set()
    changed: dict[str, torch.Tensor] = {}
    matched: set[str] = set()
    for name in checkpoint.specs:
        mine = next((n for n in (name, f"model.{name}", name.removeprefix("model.")) if n in state), None)
        if mine is None or name in ffn:
            continue
        value, stored = state[mine], checkpoint.tensor(name)
        matched.add(mine)
        seen.add(value.data_ptr())
        if value.shape != stored.shape or not torch.equal(value, stored.to(value.dtype)):
            changed[name] = value
    return changed | {n: v for n, v in state.items() if n not in matched and v.data_ptr() not in seen}


def push_to_hub(
    model: Any,
    repo_id: str,
    *,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> Any:
    """Upload a flash model: store, other weights, config. Takes the place of `PreTrainedModel.push_to_hub` on the instance."""
    beside = find_runtime(model).store.layers[0].path.parent.parent
    with tempfile.TemporaryDirectory(dir=beside, prefix=".hf_flash-push-") as folder:
        _save(model, Path(folder))
        return push(
            folder,
            repo_id,
            commit_message=commit_message,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
        )


def push(
    folder: Any,
    repo_id: str,
    *,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> Any:
    """Upload a repacked folder to the Hub, its files as they are.

    Args:
        folder: as [`repack`] or `save_pretrained` made it.
        repo_id: the repository, created if it is not there.

    Returns:
        The Hub's `CommitInfo`.

    Raises:
        StoreError: the folder holds no valid store.
    """
    FlashStore.open_folder(folder)
    api = huggingface_hub.HfApi(token=token)
    name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    return api.upload_folder(
        repo_id=name,
        folder_path=folder,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message or "Upload flash model",
        ignore_patterns=["*.tmp", ".*"],
    )
