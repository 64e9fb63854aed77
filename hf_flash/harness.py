"""Zero-shot tasks with lm-evaluation-harness, through its ordinary `hf` model, from the `eval` extra."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .errors import ConfigError


def run_tasks(
    model: Any, tokenizer: Any, tasks: Sequence[str], *, limit: int | None = None, include_path: str | None = None
) -> dict[str, dict[str, float]]:
    """Evaluate a loaded model, flash or stock.

    Args:
        tasks: names that lm-evaluation-harness knows, such as `"arc_easy"`.
        limit: questions per task at most.
        include_path: a folder with further tasks.

    Returns:
        By task, its metrics: `acc`, `acc_norm`, ...

    Raises:
        ConfigError: the library is not installed, or there is no such task.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError("zero-shot tasks need lm-eval", hint="pip install hf-flash[eval]") from error
    manager = TaskManager(include_path=include_path)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise ConfigError("lm-eval has no such tasks", where="tasks", got=", ".join(unknown), hint="see `lm-eval ls tasks`")
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    found = simple_evaluate(model=wrapped, tasks=list(tasks), limit=limit, task_manager=manager, bootstrap_iters=0)
    return {
        task: {key.removesuffix(",none"): value for key, value in metrics.items() if isinstance(value, float)}
        for task, metrics in found["results"].items()
    }
