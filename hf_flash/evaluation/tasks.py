"""Zero-shot tasks with lm-evaluation-harness, through its ordinary `hf` model, from the `eval` extra."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_flash.base.installing import with_extra
from hf_flash.base.tables import Figures
from hf_flash.errors import ConfigError
from hf_flash.evaluation.candidates import candidates, install, load_for
from hf_flash.evaluation.mixtures import load_mixture
from hf_flash.packing.expert_folder import mixture_in
from hf_flash.runtime.model import close
from hf_flash.store.layout import FlashStore


class TaskRunner:
    """Runs the same tasks with one model after another.

    Args:
        tasks: names that lm-evaluation-harness knows, such as `"arc_easy"`.
        limit: questions per task at most.
        include_path: a folder with further tasks.

    Raises:
        ConfigError: the library is not installed, or there is no such task.
    """

    def __init__(self, tasks: Sequence[str], *, limit: int | None = None, include_path: str | None = None) -> None:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise ConfigError("zero-shot tasks need lm-eval", hint=with_extra("eval")) from error
        self._tasks, self._limit = list(tasks), limit
        self._manager = TaskManager(include_path=include_path, include_defaults=False)
        if not set(tasks) <= set(self._manager.all_subtasks):  # reading lm-eval's own 13 000 files takes half a minute
            self._manager = TaskManager(include_path=include_path)
        unknown = [task for task in tasks if not self._manager.match_tasks([task])]
        if unknown:
            raise ConfigError("lm-eval has no such tasks", where="tasks", got=", ".join(unknown), hint="see `lm-eval ls tasks`")

    def run(self, model: Any, tokenizer: Any) -> dict[str, dict[str, float]]:
        """Evaluate a loaded model, flash or stock; by task, its metrics: `acc`, `acc_norm`, ..."""
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
        found = simple_evaluate(
            model=wrapped, tasks=self._tasks, limit=self._limit, task_manager=self._manager, bootstrap_iters=0
        )  # fmt: skip
        return {
            task: {key.removesuffix(",none"): value for key, value in metrics.items() if isinstance(value, float)}
            for task, metrics in found["results"].items()
        }


def evaluate_tasks(
    folder: str | os.PathLike[str],
    tasks: TaskRunner,
    *,
    stock: str | os.PathLike[str] | None = None,
    memory_budget: int | str | None = None,
    dtype: str | torch.dtype = "auto",
) -> dict[str, dict[str, dict[str, float]]]:
    """Run lm-evaluation-harness tasks with every predictor of a repacked model, and with the stock model beside it.

    Args:
        tasks: what runs them.
        stock: the plain checkpoint; unset: the dense figures are those of predictor "none", whose logits are the same.

    Returns:
        By predictor ("stock" first, if asked for) and task, the metrics. A mixture of experts has "none".
    """
    folder = Path(folder).resolve()
    store = FlashStore.open_folder(folder) if mixture_in(folder) is None else None
    tokenizer = AutoTokenizer.from_pretrained(folder)
    results = {}
    if stock is not None:
        results["stock"] = tasks.run(AutoModelForCausalLM.from_pretrained(stock, dtype=dtype).eval(), tokenizer)
    if store is None:
        model = load_mixture(folder, memory_budget, dtype)
        results["none"] = tasks.run(model, tokenizer)
    else:
        every = candidates(store)
        model = load_for(every, folder, store, memory_budget, dtype)
        for candidate in every:
            install(candidate, model, store)
            results[candidate.name] = tasks.run(model, tokenizer)
    close(model)
    return results


def describe_tasks(results: dict[str, dict[str, dict[str, float]]]) -> Figures:
    """Task results as a table, one predictor a row, to be printed by rich."""
    columns = [(task, metric) for task, metrics in next(iter(results.values())).items() for metric in metrics]
    columns = [column for column in columns if not column[1].endswith("stderr")]
    rows = [(name, *(f"{found[task][metric]:.4f}" for task, metric in columns)) for name, found in results.items()]
    return Figures(["predictor", *(f"{task} {metric}" for task, metric in columns)], rows)
