"""What the model card of a repacked checkpoint says: where it comes from, how to load it, what it needs and what was measured.

Nothing is claimed that is not in the folder: recall is there after calibration only, speed where a report of `hf-flash bench`
is given.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch

from hf_flash.base.files import read_json
from hf_flash.base.sizes import format_bytes
from hf_flash.bench.report import describe as describe_bench
from hf_flash.budget.divide import divide_memory, stored_report
from hf_flash.budget.plan import MemoryPlan
from hf_flash.config import FlashOffloadConfig
from hf_flash.config_arguments import ARGUMENTS
from hf_flash.errors import ConfigError
from hf_flash.families import family_of
from hf_flash.families.base import Shape
from hf_flash.packing.checkpoint_folder import other_weights, repacked_config
from hf_flash.packing.readme import body, merged
from hf_flash.predictors.choice import formats_in, stored_format
from hf_flash.store.checkpoint import Checkpoint
from hf_flash.store.layout import FlashStore

TAGS: Final = ("hf_flash", "flash-offload")
_TASKS: Final = {  # ending of the architecture -> pipeline_tag; the class to load it with is named alike
    "ForCausalLM": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForQuestionAnswering": "question-answering",
}
_PAPER: Final = '["LLM in a flash"](https://arxiv.org/abs/2312.11514)'


def model_card(
    folder: str | os.PathLike[str], name: str, before: str = "", *, bench: str | os.PathLike[str] | None = None
) -> str:
    """The model card of a repacked folder.

    Args:
        folder: as [`repack`] or `save_pretrained` made it.
        name: of the repository it is for.
        before: the card so far, the source's for example: its front matter is merged, its text is kept below.
        bench: a JSON report of `hf-flash bench` on this model.

    Raises:
        StoreError: the folder is no repacked checkpoint.
        ConfigError: the front matter of `before` cannot be read, or `bench` is a report of another model.
    """
    folder = Path(folder)
    store, config = FlashStore.open_folder(folder), repacked_config(folder)
    task = next((end for end in _TASKS if str((config.get("architectures") or [""])[0]).endswith(end)), None)
    base = base_model(store)
    entries: dict[str, Any] = {"library_name": "transformers", "tags": list(TAGS)}
    entries |= {"base_model": base} if base else {}
    entries |= {"pipeline_tag": _TASKS[task]} if task else {}
    plan, dtype, shape = _plan(folder, store, config)
    budget = _some_budget(plan)
    parts = [
        *_origin(name, store, base),
        *_loading(name, task or "", budget, store),
        *_memory(plan, dtype, shape, store),
        *_predictors(store, config, shape),
        *_speed(name, budget, store, bench),
        *(["", "The card of the source follows."] if body(before).strip() else []),
    ]
    return merged(before, entries, "\n".join(parts))


def base_model(store: FlashStore) -> str | None:
    """The Hub repository that a store was made from, if it was one."""
    return "/".join(store.metadata["source"].split("/")[:2]) if store.metadata["revision"] else None


def _origin(name: str, store: FlashStore, base: str | None) -> Iterator[str]:
    revision = store.metadata["revision"]
    source = f"`{store.metadata['source']}`"
    if base:
        source = f"[{store.metadata['source']}](https://huggingface.co/{base}/tree/{revision}), revision `{revision}`"
    yield f"# {name.rpartition('/')[2]}"
    yield ""
    yield (
        f"{source}, repacked for hf_flash, which runs models larger than memory through transformers. The "
        "feed-forward weights stay on the disk, bit for bit those of the source; a predictor says which neurons a token will "
        f"use, and only those are read. The method is that of {_PAPER}."
    )


def _loading(name: str, task: str, budget: str, store: FlashStore) -> Iterator[str]:
    auto, matrix = f"AutoModel{task}", store.layers[0].names[0]
    yield from ("", "## Load it", "", "It needs the package and the import: `pip install hf-flash`.", "", "```python")
    yield "import hf_flash"
    yield f"from transformers import {auto}"
    yield f'model = {auto}.from_pretrained("{name}")'
    yield from ("```", "")
    yield (
        f'`quantization_config=hf_flash.FlashOffloadConfig(memory_budget="{budget}")` sets a ceiling on the weights in memory; '
        "left out, it is most of what is free. Computing is done on the CPU."
    )
    yield ""
    yield (
        'Without `import hf_flash`, transformers warns of an "Unknown quantization type", lists a tensor that says '
        f"what is missing, and stops at the feed-forward weights, such as `{matrix}`, whose sizes do not match. Do not get "
        "around that with `ignore_mismatched_sizes=True`: the feed-forward weights would be random."
    )


def _some_budget(plan: MemoryPlan) -> str:
    """An example: half of the model, or what it needs and a fifth."""
    size = max(plan.dense_bytes // 2, plan.minimum_bytes * 6 // 5)
    return f"{-(-size // 2**30)}GiB" if size > 3 * 2**30 else f"{-(-size // 2**20)}MiB"


def _memory(plan: MemoryPlan, dtype: torch.dtype, shape: Shape, store: FlashStore) -> Iterator[str]:
    name = str(dtype).removeprefix("torch.")
    token = shape.kv_bytes(dtype.itemsize)
    yield from ("", f"## Memory, in {name}", "", "| | |", "|---|---|")
    yield f"| embeddings, attention, norms, biases | {format_bytes(plan.resident_bytes)} |"
    yield f"| predictor | {format_bytes(plan.predictor_bytes)} |"
    yield f"| buffers | {format_bytes(plan.scratch_bytes)} |"
    yield f"| **the least `memory_budget`** | **{format_bytes(plan.minimum_bytes)}** |"
    yield f"| the whole model, as stock transformers holds it | {format_bytes(plan.dense_bytes)} |"
    yield ""
    yield (
        "What a budget has beyond the least keeps neurons that recent tokens used, so that they are not read again. On top "
        f"come the interpreter with its libraries (about 0.3 GB), activations and the KV cache, {format_bytes(token)} a token. "
        f"On disk: {format_bytes(sum(path.stat().st_size for path in {*store.files, *store.others}))}."
    )


def _plan(folder: Path, store: FlashStore, config: dict[str, Any]) -> tuple[MemoryPlan, torch.dtype, Shape]:
    """What must stay in DRAM, and the dtype it is counted in: that of the config."""
    first = store.layers[0]
    dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or ""), first.dtype)
    wish = FlashOffloadConfig.from_dict(dict(config["quantization_config"]))
    family = family_of(config)
    fmt = stored_format(wish, family, config, store)
    specs = other_weights(Checkpoint.open_folder(folder), store)
    if config.get("tie_word_embeddings", True):
        specs.pop("lm_head.weight", None)
    resident = sum(
        torch.Size(shape).numel() * (dtype if kind.is_floating_point else kind).itemsize for kind, shape in specs.values()
    )
    shape, reading = family.shape(config), {name: ARGUMENTS[name].default for name in ("reader", "io_threads")}
    plan = divide_memory(1 << 59, resident, fmt, shape, first.unit, dtype, demand=None, **reading)
    return plan, dtype, shape


def _predictors(store: FlashStore, config: dict[str, Any], shape: Shape) -> Iterator[str]:
    report, stored = stored_report(store), config["quantization_config"].get("predictor")
    formats = formats_in(store)
    yield from ("", "## Predictors", "")
    if not formats:
        yield "None is stored: every neuron is read for every token."
        return
    yield "| | on disk | in memory | active neurons found | named for one that is active |"
    yield "|---|---|---|---|---|"
    for fmt in formats:
        about = f"`{fmt.kind}`, {fmt.detail}"
        size = format_bytes(store.predictors[fmt.variant].stat().st_size)
        held = format_bytes(fmt.dram_bytes(shape))
        cells = (about + (", the default" if fmt.kind == stored else ""), size, held, *_measured(report, fmt.variant))
        yield f"| {' | '.join(cells)} |"
    yield ""
    if report is None:
        yield "Not calibrated: no text was needed to make them, and none was used to measure them."
        return
    text, targets = report["text"], report["targets"]
    yield (
        f"Calibrated on {text['tokens']} tokens of {_text_name(text)}, in windows of {text['context']}; {text['held_out']} of "
        "them were held out of the training, and the figures are those. The low-rank predictor was to find "
        f"{targets['recall']:.0%} of the active neurons and name at most {targets['extra']:.0%} of the others: "
        f"{'reached' if report['reached'] else 'not reached'} in every layer."
    )


def _measured(report: dict[str, Any] | None, variant: str) -> tuple[str, str]:
    """Share of the active neurons that are found, and how many are named for one, over all layers."""
    layers = [(layer["active"], layer[variant]) for layer in report["layers"] if variant in layer] if report else []
    active = sum(count for count, _ in layers)
    if not active:
        return "not measured", "not measured"
    found, named = (sum(count * layer[name] for count, layer in layers) / active for name in ("recall", "selected"))
    return f"{found:.2%}", f"{named:.2f}"


def _text_name(text: dict[str, Any]) -> str:
    return (
        f"`{text['name']}`" if text.get("name") else f"a text without a name (SHA-256 of its tokens: `{text['sha256'][:16]}`)"
    )


def _speed(name: str, budget: str, store: FlashStore, bench: str | os.PathLike[str] | None) -> Iterator[str]:
    yield from ("", "## Speed", "")
    if bench is None:
        yield f"Not measured for this card. `hf-flash plan {name} --memory {budget}` predicts it for your machine."
        return
    report = read_json(Path(bench))
    source, found = store.metadata["source"], report.get("model")
    mine = {"source": source, "layers": len(store.layers), "d_ff": max(store.widths), "d_model": store.unit.width}
    theirs = {key: found.get(key) for key in mine} if isinstance(found, dict) else found
    if theirs != mine:
        raise ConfigError("not a report of `hf-flash bench` on this model", where=bench, expected=json.dumps(mine), got=theirs)
    yield from ("As `hf-flash bench` measured it:", "", "```", describe_bench(report), "```")
