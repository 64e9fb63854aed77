"""Zero-shot tasks with lm-evaluation-harness, through its ordinary `hf` model, from the `eval` extra."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .errors import ConfigError


class Harness:
    """Tasks to run with one model after another.

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
            raise ConfigError("zero-shot tasks need lm-eval", hint='pip install "hf-flash[eval]"') from error
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
