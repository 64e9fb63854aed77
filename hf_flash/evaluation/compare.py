"""What sparsity costs on a given model and text: predictors side by side, against the dense model.

One dense pass over the text (flash mode, every neuron) gives the truth: which neurons are active, and how strongly. Every
predictor in the store is asked about the same inputs (judging.py):

    missed   active and not predicted (false negatives): changes the answer
    lost     the energy of what is missed: sum of (activation * norm of the down column) ** 2, over that of all active ones
    extra    predicted and not active (false positives), of the inactive: costs reads, changes nothing
    selected predicted neurons per active one

Then each predictor runs by itself: perplexity on the text, and time per token when generating (measuring.py). A mixture of
experts has no predictor, and gets these two figures alone (mixtures.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from huggingface_hub.utils import tqdm
from rich.console import Group, RenderableType

from hf_flash.base.sizes import format_bytes
from hf_flash.base.tables import Figures, Paragraph, section
from hf_flash.calibration.text import Text, seen_share, token_windows
from hf_flash.evaluation.candidates import candidates, install, load_for
from hf_flash.evaluation.judging import BINS, Tally, judging, mean_use, total
from hf_flash.evaluation.measuring import perplexity, time_tokens, window_length
from hf_flash.evaluation.mixtures import describe_mixture, evaluate_mixture
from hf_flash.families.base import longest_sequence
from hf_flash.packing.checkpoint_folder import repacked_config
from hf_flash.packing.expert_folder import mixture_in
from hf_flash.predictors.base import read_tensors
from hf_flash.predictors.quantized import quantized_formats
from hf_flash.runtime.model import close, find_runtime
from hf_flash.store.layout import FlashStore

_PROMPT: Final = 32  # tokens


def evaluate(
    folder: str | os.PathLike[str],
    text: Text,
    *,
    tokens: int = 40_960,
    context: int | None = None,
    new_tokens: int = 32,
    memory_budget: int | str | None = None,
    dtype: str | torch.dtype = "auto",
) -> dict[str, Any]:
    """Compare all predictors of a repacked model on a text.

    Args:
        folder: a repacked checkpoint, or a mixture of experts as it is; with its tokenizer.
        text: as in [`hf_flash.calibrate`]; taken from its beginning. It should not be what the predictors were trained on;
            the share of it that is gets reported.
        tokens: of the text to use at most.
        context: tokens in a window. Default: 256, or the model's maximum if that is less.
        new_tokens: to generate when timing.
        memory_budget: ceiling on weight bytes in DRAM, all predictors together included.
        dtype: of compute.

    Returns:
        `text`, `perplexity` (dense), `predictors`: by name, with `layers`; plain values for JSON. Of a mixture of experts, in
        place of predictors, what a token takes.

    Raises:
        ConfigError: the context is too short, or longer than the model's. CalibrationError: the text is empty, too short, or
            does not fit the model. Others as in `from_pretrained`.
    """
    folder = Path(folder).resolve()
    if mixture_in(folder) is not None:
        return evaluate_mixture(folder, text, tokens, context, new_tokens, memory_budget, dtype)
    store = FlashStore.open_folder(folder)
    repacked_config(folder)
    every = candidates(store)
    model = load_for(every, folder, store, memory_budget, dtype)
    longest = longest_sequence(model.config)
    context = window_length(context, longest)
    windows = token_windows(folder, text, context, model.config.vocab_size, most=max(1, tokens // context))
    with judging(find_runtime(model).ffns, store, every, context) as judges:
        dense_perplexity = perplexity(model, windows)
    report = _about(model, store, windows) | {
        "perplexity": dense_perplexity,
        "use": mean_use([judge.use for judge in judges]),
        "rounding": {fmt.variant: [judge.rounding(fmt.variant) for judge in judges] for fmt in quantized_formats(store)},
        "predictors": {},
    }
    prompt, new_tokens = windows[0, : min(_PROMPT, context - 1)], min(new_tokens, longest - _PROMPT)
    for candidate in tqdm(every, desc="Running each predictor", unit="predictor", delay=1):
        tallies = [judge.tallies[candidate.name] for judge in judges]
        nbytes = install(candidate, model, store)
        reached = perplexity(model, windows) if candidate.fmt else dense_perplexity
        report["predictors"][candidate.name] = {
            "bytes": nbytes,
            "share_of_model": nbytes / find_runtime(model).plan.dense_bytes,
            "perplexity": reached,
            "change": reached / dense_perplexity - 1,
            **total(tallies).rates(),
            **time_tokens(model, prompt, new_tokens),
            **_by_layer(tallies),
        }
    report["bins"] = BINS.tolist()
    close(model)
    return report


def _about(model: Any, store: FlashStore, windows: torch.Tensor) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "model": {
            "source": store.metadata["source"],
            "layers": len(store.layers),
            "d_ff": max(store.widths),
            "d_model": store.unit.width,
        },
        "text": {"tokens": windows.numel(), "context": windows.shape[1], "seen_in_calibration": _seen(store, windows)},
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def _seen(store: FlashStore, windows: torch.Tensor) -> float:
    """Share of the text that the predictors of a store were trained on."""
    if store.calibration is None:
        return 0.0
    return seen_share(windows, read_tensors(store.calibration, "calibration")["text"])


def _by_layer(tallies: Sequence[Tally]) -> dict[str, Any]:
    """What plots are drawn from."""
    return {
        "layers": [tally.rates() for tally in tallies],
        "use": mean_use([tally.use for tally in tallies]),
        "predicted_at": np.sum([tally.predicted_at for tally in tallies], axis=0).tolist(),
        "missed_at": np.sum([tally.missed_at for tally in tallies], axis=0).tolist(),
    }


def describe(report: dict[str, Any]) -> Group:
    """A report, to be printed by rich."""
    if "predictors" not in report:
        return describe_mixture(report)
    text, found = report["text"], report["predictors"].items()
    answers = [
        (name, f"{one['perplexity']:.3f}", f"{one['change']:+.3%}", f"{one['missed']:.3%}", f"{one['lost']:.4%}")
        for name, one in found
    ]
    costs = [
        (
            name, format_bytes(one["bytes"]), f"{one['share_of_model']:.1%}", f"{one['selected']:.2f}", f"{one['extra']:.2%}",
            f"{one['predict_ms']:.2f}", f"{one['ms_per_token']:.1f}",
        )
        for name, one in found
    ]  # fmt: skip
    return Group(
        Paragraph(f"{text['tokens']} tokens in windows of {text['context']}, {report['dtype']}"),
        section("The answers", Figures(("predictor", "perplexity", "change", "missed", "lost"), answers), Paragraph(_ANSWERS)),
        section(
            "The cost", Figures(("predictor", "size", "share", "chosen", "extra", "ms", "token"), costs), Paragraph(_COSTS)
        ),
        *_rounding(report["rounding"]),
        *_warnings(text),
    )


_ANSWERS: Final = "missed: of the active neurons, not chosen; lost: their share of the squares of all activations."
_COSTS: Final = (
    "share: of the model without its embeddings; chosen: neurons for one that is active; extra: of the inactive, chosen; ms: "
    "to choose, for a token; token: ms of a whole token."
)


def _rounding(report: dict[str, Any]) -> Iterator[RenderableType]:
    for variant, layers in report.items():
        worst = max(layers, key=lambda layer: layer["real_over_assumed"])
        beyond = max(layer["beyond_three"] for layer in layers)
        yield ""
        yield Paragraph(
            f"{variant}: rounding errors are at most {worst['real_over_assumed']:.2f} x what the margin assumes "
            f"(mean square, by layer); beyond three deviations: up to {beyond:.2%} (a normal distribution: 0.27%)"
        )


def _warnings(text: dict[str, Any]) -> Iterator[RenderableType]:
    if text["seen_in_calibration"] > 0.01:
        yield ""
        yield Paragraph(
            f"WARNING: the predictors were trained on {text['seen_in_calibration']:.0%} of this text", "bold yellow"
        )
