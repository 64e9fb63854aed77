"""What a model card says about one folder: a repacked checkpoint, or a mixture of experts that `save_pretrained` made.

card.py puts the card together; this module has what is specific to a kind of model, as lines of Markdown.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from hf_flash.base.sizes import format_bytes
from hf_flash.budget.divide import divide_memory, stored_report
from hf_flash.budget.expert_plan import ExpertPlan
from hf_flash.budget.plan import MemoryPlan
from hf_flash.config import FlashOffloadConfig
from hf_flash.config_arguments import ARGUMENTS
from hf_flash.families import family_of
from hf_flash.families.base import Shape
from hf_flash.families.experts import kv_cache_bytes
from hf_flash.packing.checkpoint_folder import other_weights, repacked_config
from hf_flash.packing.expert_folder import Mixture, open_mixture
from hf_flash.planning.planner import needs
from hf_flash.predictors.choice import formats_in, stored_format
from hf_flash.store.checkpoint import Checkpoint
from hf_flash.store.layout import FlashStore

_PAPER: Final = '["LLM in a flash"](https://arxiv.org/abs/2312.11514)'


@dataclass(frozen=True)
class CardSubject:
    """What a folder holds, in the form that its card needs.

    Attributes:
        config: its config.json.
        source: `source` and `revision`: where it comes from.
        plan: the memory plan for an unlimited budget.
        opening: text: what was made of the source.
        without: text: what happens if hf_flash is not imported.
        memory, predictors: sections of the card.
        measured: what a report of `hf-flash bench` on this folder has as its `model`.
    """

    config: dict[str, Any]
    source: dict[str, str]
    plan: MemoryPlan | ExpertPlan
    opening: str
    without: str
    memory: tuple[str, ...]
    predictors: tuple[str, ...]
    measured: dict[str, Any]

    @property
    def base(self) -> str | None:
        """The Hub repository that it was made from; `None` if it was not made from one."""
        return "/".join(self.source["source"].split("/")[:2]) if self.source["revision"] else None

    @property
    def origin(self) -> str:
        """Where it comes from, with a link."""
        name, revision = self.source["source"], self.source["revision"]
        if self.base is None:
            return f"`{name}`"
        return f"[{name}](https://huggingface.co/{self.base}/tree/{revision}), revision `{revision}`"


def subject_of(folder: Path) -> CardSubject:
    """Describe what a folder holds: a repacked checkpoint, or a mixture of experts.

    Raises:
        StoreError: the folder holds neither.
    """
    mixture = open_mixture(folder)
    return _of_store(folder) if mixture is None else _of_mixture(mixture)


def _memory(
    dtype: torch.dtype, rows: dict[str, int], plan: MemoryPlan | ExpertPlan, kept: str, token: int, on_disk: int
) -> Iterator[str]:
    """Yield the section about memory.

    Args:
        rows: bytes of each part of the least budget, by name.
        kept: text: what a budget beyond the least is used for.
        token: bytes of the KV cache per token.
        on_disk: bytes of the folder's weight files.
    """
    yield from ("", f"## Memory, in {str(dtype).removeprefix('torch.')}", "", "| | |", "|---|---|")
    yield from (f"| {name} | {format_bytes(size)} |" for name, size in rows.items())
    yield f"| **the least `memory_budget`** | **{format_bytes(plan.minimum_bytes)}** |"
    yield f"| the whole model, as stock transformers holds it | {format_bytes(plan.dense_bytes)} |"
    yield ""
    yield (
        f"{kept} On top come the interpreter with its libraries (about 0.3 GB), activations and the KV cache, "
        f"{format_bytes(token)} a token. On disk: {format_bytes(on_disk)}."
    )


# --- mixtures of experts -----------------------------------------------------------------------------------------------


def _of_mixture(mixture: Mixture) -> CardSubject:
    folder, layers = mixture.folder, mixture.places.layers
    config, plan = repacked_config(folder), needs(folder)
    assert isinstance(plan, ExpertPlan)
    always = f"{'' if plan.table_bytes else 'embeddings, '}attention, routers, norms"
    rows = {always: plan.all_resident_bytes - plan.table_bytes, "buffers": plan.scratch_bytes}
    experts, expert = max(layer.experts for layer in layers), max(layer.expert_bytes for layer in layers)
    kept = (
        f"An expert is {format_bytes(expert)}; {len(layers)} layers have {experts} of them, of which a token uses "
        f"{mixture.used} in each: {format_bytes(mixture.active_bytes)} a token, and only what is not in memory is read. What "
        "a budget has beyond the least keeps experts that recent tokens used, so that they are not read again"
        + (f", and at last the table of embeddings, {format_bytes(plan.table_bytes)}." if plan.table_bytes else ".")
    )
    on_disk = sum(path.stat().st_size for path in mixture.checkpoint.files)
    return CardSubject(
        config=config,
        source=mixture.source,
        plan=plan,
        opening="as it is, for hf_flash, which runs models larger than memory through transformers. Nothing is repacked: the "
        "experts stay on the disk, the router says which ones a token needs, and only those are read. Answers are exact: "
        "nothing is predicted and nothing is left out.",
        without='It is a plain checkpoint. Without `import hf_flash`, transformers warns of an "Unknown quantization type" and '
        "loads all of it into memory. Without `quantization_config` in config.json it does so without the warning; "
        "`hf_flash.restore(folder, target)` makes such a folder.",
        memory=tuple(_memory(mixture.model.config.dtype, rows, plan, kept, kv_cache_bytes(mixture.model), on_disk)),
        predictors=(),
        measured={
            "layers": len(layers), "d_ff": max(layer.neurons for layer in layers), "d_model": layers[0].width,
            "experts": experts, "experts_per_token": mixture.used, "expert_bytes": expert,
        },
    )  # fmt: skip


# --- repacked checkpoints ----------------------------------------------------------------------------------------------


def _of_store(folder: Path) -> CardSubject:
    store, config = FlashStore.open_folder(folder), repacked_config(folder)
    plan, dtype, shape = _plan(folder, store, config)
    rows = {
        "embeddings, attention, norms, biases": plan.resident_bytes, "predictor": plan.predictor_bytes,
        "buffers": plan.scratch_bytes,
    }  # fmt: skip
    kept = "What a budget has beyond the least keeps neurons that recent tokens used, so that they are not read again."
    on_disk = sum(path.stat().st_size for path in {*store.files, *store.others})
    return CardSubject(
        config=config,
        source={name: store.metadata[name] for name in ("source", "revision")},
        plan=plan,
        opening="repacked for hf_flash, which runs models larger than memory through transformers. The feed-forward weights "
        "stay on the disk, bit for bit those of the source; a predictor says which neurons a token will use, and only those "
        f"are read. The method is that of {_PAPER}.",
        without='Without `import hf_flash`, transformers warns of an "Unknown quantization type", lists a tensor that says '
        f"what is missing, and stops at the feed-forward weights, such as `{store.layers[0].names[0]}`, whose sizes do not "
        "match. Do not get around that with `ignore_mismatched_sizes=True`: the feed-forward weights would be random.",
        memory=tuple(_memory(dtype, rows, plan, kept, shape.kv_bytes(dtype.itemsize), on_disk)),
        predictors=tuple(_predictors(store, config, shape)),
        measured={
            "source": store.metadata["source"], "layers": len(store.layers), "d_ff": max(store.widths),
            "d_model": store.unit.width,
        },
    )  # fmt: skip


def _plan(folder: Path, store: FlashStore, config: dict[str, Any]) -> tuple[MemoryPlan, torch.dtype, Shape]:
    """Return the memory plan, the dtype it is counted in, which is the config's, and the model's shape."""
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
    """Return the share of active neurons that are found, and the neurons named per active one, over all layers."""
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
