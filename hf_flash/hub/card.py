"""The model card of a folder that is pushed: where it comes from, how to load it, what it needs and what was measured.

The card claims only what is known: recall only after calibration, speed only if a report of `hf-flash bench` is given.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from hf_flash.base.files import read_json
from hf_flash.base.tables import printed
from hf_flash.bench.report import describe as describe_bench
from hf_flash.budget.expert_plan import ExpertPlan
from hf_flash.budget.plan import MemoryPlan
from hf_flash.errors import ConfigError
from hf_flash.hub.card_subjects import CardSubject, subject_of
from hf_flash.packing.readme import body, merged

TAGS: Final = ("hf_flash", "flash-offload")
_CARD_WIDTH: Final = 120  # columns of the table of speed
_TASKS: Final = {  # ending of the architecture -> pipeline_tag; the auto class has the same ending
    "ForCausalLM": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForQuestionAnswering": "question-answering",
}


def model_card(
    folder: str | os.PathLike[str], name: str, before: str = "", *, bench: str | os.PathLike[str] | None = None
) -> str:
    """Write the model card of a folder, as text.

    Args:
        folder: as [`repack`] or `save_pretrained` made it.
        name: the name of the repository that the card is for.
        before: the card so far, for example the source's: its front matter is merged, its text is kept below ours.
        bench: a JSON report of `hf-flash bench` on this model.

    Raises:
        StoreError: the folder was made by neither.
        ConfigError: the front matter of `before` cannot be read, or `bench` is a report of another model.
    """
    return card_of(subject_of(Path(folder)), name, before, bench=bench)


def card_of(subject: CardSubject, name: str, before: str, *, bench: str | os.PathLike[str] | None) -> str:
    """Like [`model_card`], for a folder whose contents [`subject_of`] has described."""
    task = next((end for end in _TASKS if str((subject.config.get("architectures") or [""])[0]).endswith(end)), None)
    entries: dict[str, Any] = {"library_name": "transformers", "tags": list(TAGS)}
    entries |= {"base_model": subject.base} if subject.base else {}
    entries |= {"pipeline_tag": _TASKS[task]} if task else {}
    budget = _some_budget(subject.plan)
    parts = [
        *(f"# {name.rpartition('/')[2]}", "", f"{subject.origin}, {subject.opening}"),
        *_loading(name, task or "", budget, subject.without),
        *subject.memory,
        *subject.predictors,
        *_speed(name, budget, subject.measured, bench),
        *(["", "The card of the source follows."] if body(before).strip() else []),
    ]
    return merged(before, entries, "\n".join(parts))


def _loading(name: str, task: str, budget: str, without: str) -> Iterator[str]:
    auto = f"AutoModel{task}"
    yield from (
        "",
        "## Load it",
        "",
        "It needs the package hf_flash, installed as its README says, and the import.",
        "",
        "```python",
    )
    yield "import hf_flash"
    yield f"from transformers import {auto}"
    yield f'model = {auto}.from_pretrained("{name}")'
    yield from ("```", "")
    yield (
        f'`quantization_config=hf_flash.FlashOffloadConfig(memory_budget="{budget}")` sets a ceiling on the weights in memory; '
        "left out, it is most of what is free."
    )
    yield from ("", without)


def _some_budget(plan: MemoryPlan | ExpertPlan) -> str:
    """Return a budget to show as an example: half of the model, or its minimum plus a fifth if that is more."""
    size = max(plan.dense_bytes // 2, plan.minimum_bytes * 6 // 5)
    return f"{-(-size // 2**30)}GiB" if size > 3 * 2**30 else f"{-(-size // 2**20)}MiB"


def _speed(name: str, budget: str, measured: dict[str, Any], bench: str | os.PathLike[str] | None) -> Iterator[str]:
    yield from ("", "## Speed", "")
    if bench is None:
        yield f"Not measured for this card. `hf-flash plan {name} --memory {budget}` predicts it for your machine."
        return
    report = read_json(Path(bench))
    found = report.get("model")
    theirs = {key: found.get(key) for key in measured} if isinstance(found, dict) else found
    if theirs != measured:
        raise ConfigError(
            "not a report of `hf-flash bench` on this model", where=bench, expected=json.dumps(measured), got=theirs
        )
    yield from ("As `hf-flash bench` measured it:", "", "```", printed(describe_bench(report), _CARD_WIDTH), "```")
