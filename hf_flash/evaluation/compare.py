"""What sparsity costs on a given model and text: predictors side by side, against the dense model.

One dense pass over the text (flash mode, every neuron) gives the truth: which neurons are active, and how strongly. Every
predictor in the store is asked about the same inputs:

    missed   active and not predicted (false negatives): changes the answer
    lost     the energy of what is missed: sum of (activation * norm of the down column) ** 2, over that of all active ones
    extra    predicted and not active (false positives), of the inactive: costs reads, changes nothing
    selected predicted neurons per active one

Then each predictor runs for itself: perplexity on the text, and time per token when generating.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub.utils import tqdm
from transformers import AutoModelForCausalLM

from hf_flash.base.sizes import format_bytes
from hf_flash.budget.plan import ceiling_bytes
from hf_flash.calibration.activity import Use
from hf_flash.calibration.text import Text, seen_share, token_windows
from hf_flash.config import FlashOffloadConfig
from hf_flash.packing.checkpoint_folder import repacked_config
from hf_flash.predictors.base import NoPredictor, PredictorForm, find_predictor, read_tensors
from hf_flash.predictors.lowrank import LowRankFormat
from hf_flash.predictors.quantized import DEFAULT_MARGIN, QuantizedFormat, QuantizedPredictor, quantized_forms
from hf_flash.runtime.counters import Counters
from hf_flash.runtime.model import close, find_runtime, stats
from hf_flash.runtime.observing import observed
from hf_flash.store.layout import FlashStore, LayerStore

_BATCH: Final = 1024  # tokens through the model at a time
_USE_WINDOWS: Final = 8  # windows that aggregated use is counted on
_PROMPT: Final = 32  # tokens
_BINS: Final = np.linspace(-4.0, 6.0, 101)  # of pre-activations, in their layer's standard deviations


@dataclass(frozen=True)
class Candidate:
    """One predictor to evaluate: a form, and whether what calibration measured about it is used."""

    name: str
    form: PredictorForm | None
    measured: bool = True

    def load(self, store: FlashStore, layer: LayerStore, bias: torch.Tensor | None) -> Any:
        """The predictor of one layer."""
        if self.form is None:
            return NoPredictor()
        return self.form.load(self.store(store), layer, bias)

    def store(self, store: FlashStore) -> FlashStore:
        """The store as this candidate may see it."""
        return store if self.measured else replace(store, calibration=None)


def candidates(store: FlashStore) -> list[Candidate]:
    """None, and every predictor in a store; a quantized one that was calibrated with its assumed and its measured margin."""
    found = [Candidate("none", None)]
    for form in quantized_forms(store):
        find_predictor(store, form)
        found.append(Candidate(f"{form.variant}, margin {DEFAULT_MARGIN[form.bits]}", form, measured=False))
        if store.calibration is not None:
            found.append(Candidate(f"{form.variant}, measured margin", form))
    low = LowRankFormat.of(store)
    if low is not None:
        find_predictor(store, low)
        found.append(Candidate("lowrank", low))
    return found


@dataclass
class Tally:
    """Counts of one predictor in one layer, over all tokens."""

    tokens: int = 0
    active: int = 0
    selected: int = 0
    missed: int = 0
    energy: float = 0.0
    lost: float = 0.0
    use: Use = field(default_factory=Use)
    predicted_at: np.ndarray[Any, Any] = field(default_factory=lambda: np.zeros(len(_BINS) - 1, dtype=np.int64))
    missed_at: np.ndarray[Any, Any] = field(default_factory=lambda: np.zeros(len(_BINS) - 1, dtype=np.int64))

    def add(self, selected: torch.Tensor, before: torch.Tensor, energy: torch.Tensor, scale: float) -> None:
        """Compare what was selected, bool [tokens, d_ff], with the pre-activations `before` and the energy of each neuron."""
        active = before > 0
        missed = active & ~selected
        self.tokens += len(before)
        self.active += int(active.sum())
        self.selected += int(selected.sum())
        self.missed += int(missed.sum())
        self.energy += float(energy.sum())
        self.lost += float(energy[missed].sum())
        self.predicted_at += np.histogram((before[selected] / scale).numpy(), _BINS)[0]
        self.missed_at += np.histogram((before[missed] / scale).numpy(), _BINS)[0]

    def rates(self, d_ff: int) -> dict[str, float]:
        """Shares and means; see the module."""
        return {
            "active": self.active / max(1, self.tokens),
            "missed": self.missed / max(1, self.active),
            "lost": self.lost / self.energy if self.energy else 0.0,
            "extra": (self.selected - self.active + self.missed) / max(1, self.tokens * d_ff - self.active),
            "selected": self.selected / max(1, self.active),
        }


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
        folder: a repacked checkpoint, with its tokenizer.
        text: as in [`hf_flash.calibrate`]; taken from its beginning. It should not be what the predictors were trained on;
            the share of it that is gets reported.
        tokens: of the text to use at most.
        context: tokens in a window. Default: 256, or the model's maximum if that is less.
        new_tokens: to generate when timing.
        memory_budget: ceiling on weight bytes in DRAM, all predictors together included.
        dtype: of compute.

    Returns:
        `text`, `perplexity` (dense), `predictors`: by name, with `layers`; plain values for JSON.

    Raises:
        CalibrationError: the text is empty, too short, or does not fit the model. Others as in `from_pretrained`.
    """
    folder = Path(folder).resolve()
    store = FlashStore.open_folder(folder)
    repacked_config(folder)
    every = candidates(store)
    first, layers = store.layers[0], len(store.layers)
    model = _load(folder, store, every, memory_budget, dtype)
    longest = model.config.max_position_embeddings
    context = min(256, longest) if context is None else context
    windows = token_windows(folder, text, context, model.config.vocab_size, most=max(1, tokens // context))
    report: dict[str, Any] = {
        "model": {"source": store.metadata["source"], "layers": layers, "d_ff": first.d_ff, "d_model": first.d_model},
        "text": {"tokens": windows.numel(), "context": context, "seen_in_calibration": seen(store, windows)},
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    watches, report["perplexity"] = _observe(model, store, every, windows)
    report["use"] = _mean_use([watch.use for watch in watches])
    report["rounding"] = {form.variant: [watch.rounding(form.variant) for watch in watches] for form in quantized_forms(store)}
    dense = find_runtime(model).plan.dense_bytes
    report["predictors"] = {}
    for candidate in tqdm(every, desc="Running each predictor", unit="predictor", delay=1):
        tallies = [watch.tallies[candidate.name] for watch in watches]
        size = _install(model, store, candidate)
        perplexity = _perplexity(model, windows) if candidate.form else report["perplexity"]
        report["predictors"][candidate.name] = {
            "bytes": size,
            "share_of_model": size / dense,
            "perplexity": perplexity,
            "change": perplexity / report["perplexity"] - 1,
            **_together(tallies).rates(first.d_ff),
            **_timed(model, windows[0, : min(_PROMPT, context - 1)], min(new_tokens, longest - _PROMPT)),
            "layers": [tally.rates(first.d_ff) for tally in tallies],
            "use": _mean_use([tally.use for tally in tallies]),
            "predicted_at": np.sum([tally.predicted_at for tally in tallies], axis=0).tolist(),
            "missed_at": np.sum([tally.missed_at for tally in tallies], axis=0).tolist(),
        }
    report["bins"] = _BINS.tolist()
    close(model)
    return report


def _load(
    folder: Path, store: FlashStore, every: Sequence[Candidate], memory_budget: int | str | None, dtype: str | torch.dtype
) -> Any:
    """The model without a predictor, with room left for all of them in the budget."""
    first = store.layers[0]
    forms = {c.form.variant: c.form for c in every if c.form is not None}
    room = sum(form.dram_bytes(len(store.layers), first.d_ff, first.d_model) for form in forms.values())
    quantization = FlashOffloadConfig(predictor="none", memory_budget=max(1, ceiling_bytes(memory_budget) - room))
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=dtype).eval()


def seen(store: FlashStore, windows: torch.Tensor) -> float:
    """Share of the text that the predictors of a store were trained on."""
    if store.calibration is None:
        return 0.0
    return seen_share(windows, read_tensors(store.calibration, "calibration")["text"])


def _install(model: Any, store: FlashStore, candidate: Candidate) -> int:
    """Give a loaded model another predictor; returns its bytes."""
    for ffn, layer in zip(find_runtime(model).ffns, store.layers, strict=True):
        ffn.window.forget()
        ffn.predictor = candidate.load(store, layer, ffn.bias)
    return sum(ffn.predictor.nbytes for ffn in find_runtime(model).ffns)


def _together(tallies: Sequence[Tally]) -> Tally:
    """The sums over layers."""
    total = Tally()
    for name in ("tokens", "active", "selected", "missed", "energy", "lost"):
        setattr(total, name, sum(getattr(tally, name) for tally in tallies))
    return total


class _Watch:
    """Asks every predictor of one layer about the inputs of a dense forward."""

    def __init__(self, store: FlashStore, layer: LayerStore, bias: torch.Tensor | None, every: Iterable[Candidate]) -> None:
        self.predictors: dict[str, Any] = {}
        self.plain: dict[str, tuple[QuantizedPredictor, torch.Tensor]] = {}  # without a margin, and the errors it assumes
        for c in every:
            self.predictors[c.name] = self._share(store, layer, c, bias)
        self.tallies = {name: Tally() for name in self.predictors}
        down = layer.down()
        parts = (down[at : at + 1024].float().norm(dim=1) for at in range(0, layer.d_ff, 1024))
        self.down = torch.cat(list(parts))  # [d_ff]
        self.scale, self.counted, self.use = 0.0, 0, Use()
        self.errors = {name: np.zeros(4) for name in self.plain}  # squared real, squared assumed, beyond three, count

    def _share(self, store: FlashStore, layer: LayerStore, candidate: Candidate, bias: torch.Tensor | None) -> Any:
        """A candidate's predictor; quantized ones that differ in the margin alone are loaded once."""
        form = candidate.form
        if not isinstance(form, QuantizedFormat):
            return candidate.load(store, layer, bias)
        if form.variant not in self.plain:
            whole = form.load(store, layer, bias)
            error = read_tensors(store.predictors[form.variant], f"{layer.prefix}.predictor")["error"]
            self.plain[form.variant] = (
                whole.with_margin(torch.zeros(layer.d_ff, dtype=torch.float32, device="cpu"), measured=True),
                error,
            )
        plain, error = self.plain[form.variant]
        margin, measured = form.margins(candidate.store(store), layer, error)
        return plain.with_margin(margin, measured=measured)

    def release(self) -> None:
        """Drop the predictors; the tallies stay."""
        self.predictors, self.plain = {}, {}

    def __call__(self, context: int, x: torch.Tensor, before: torch.Tensor) -> None:
        before = before.float()
        self.scale = self.scale or float(before.std())
        energy = (before.clamp(min=0) * self.down).square()
        for name, predictor in self.predictors.items():
            selected = predictor.select(x)
            selected = torch.ones_like(before, dtype=torch.bool) if selected is None else selected
            tally = self.tallies[name]
            tally.add(selected, before, energy, self.scale)
            if self.counted < _USE_WINDOWS:
                _add_windows(tally.use, selected, context)
        if self.counted < _USE_WINDOWS:
            _add_windows(self.use, before > 0, context)
        self.counted += len(x) // context
        for name, (predictor, error) in self.plain.items():
            wrong = predictor.score(x) - before
            assumed = x.norm(dim=1, keepdim=True) * error / math.sqrt(x.shape[1])
            beyond = (wrong.abs() > 3 * assumed).sum()
            self.errors[name] += [wrong.square().sum(), assumed.square().sum(), beyond, wrong.numel()]

    def rounding(self, variant: str) -> dict[str, float]:
        """Whether the errors of a quantized predictor are as its margin assumes."""
        real, assumed, beyond, count = self.errors[variant]
        return {"real_over_assumed": math.sqrt(real / assumed) if assumed else 0.0, "beyond_three": beyond / max(1.0, count)}


def _mean_use(uses: Sequence[Use]) -> list[float]:
    """Aggregated use by window length, mean over layers."""
    return [float(v) for v in np.mean([use.to_dict()["mean"] for use in uses], axis=0)]


def _add_windows(use: Use, used: torch.Tensor, context: int) -> None:
    for start in range(0, len(used), context):
        use.add(used[start : start + context])


def _observe(model: Any, store: FlashStore, every: Sequence[Candidate], windows: torch.Tensor) -> tuple[list[_Watch], float]:
    """The dense pass: what every predictor would have done in every layer, and the perplexity."""
    ffns = find_runtime(model).ffns
    watches = [_Watch(store, layer, ffn.bias, every) for layer, ffn in zip(store.layers, ffns, strict=True)]
    with ExitStack() as stack:
        for ffn, watch in zip(ffns, watches, strict=True):
            stack.enter_context(observed(ffn, partial(watch, windows.shape[1])))
        perplexity = _perplexity(model, windows)
    for watch in watches:
        watch.release()
    return watches, perplexity


@torch.no_grad()
def _perplexity(model: Any, windows: torch.Tensor) -> float:
    """exp of the mean loss of every token but the first of each window."""
    step, total = max(1, _BATCH // windows.shape[1]), 0.0
    head = model.get_output_embeddings()
    with tqdm(total=windows.numel(), unit="token", unit_scale=True, desc="Perplexity", delay=1, leave=False) as bar:
        for batch in torch.split(windows, step):
            hidden = model.base_model(batch, use_cache=False).last_hidden_state
            for states, ids in zip(hidden, batch, strict=True):  # the logits of one window at a time
                total += F.cross_entropy(head(states[:-1]).float(), ids[1:], reduction="sum").item()
            bar.update(batch.numel())
    return math.exp(total / (windows.numel() - len(windows)))


def _timed(model: Any, prompt: torch.Tensor, new_tokens: int) -> dict[str, float]:
    """Milliseconds and bytes per generated token; the prompt is not counted."""

    def run(count: int) -> tuple[float, Counters]:
        stats(model, reset=True)
        start = perf_counter()
        model.generate(prompt[None], max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=1)
        return perf_counter() - start, stats(model).counters

    run(2)  # warm up
    (alone, before), (spent, after) = run(1), run(new_tokens + 1)
    return {
        "ms_per_token": 1e3 * max(0.0, spent - alone) / new_tokens,
        "predict_ms": 1e3 * max(0.0, after.predict_s - before.predict_s) / new_tokens,
        "read_bytes_per_token": (after.read_bytes - before.read_bytes) / new_tokens,
    }


def describe(report: dict[str, Any]) -> str:
    """A report as a table."""
    text = report["text"]
    rows = [
        f"{text['tokens']} tokens in windows of {text['context']}, {report['dtype']}",
        "",
        f"{'predictor':<26}{'bytes':>11}{'of model':>10}{'selected':>10}{'missed':>9}{'lost':>9}{'extra':>8}"
        f"{'perplexity':>12}{'change':>9}{'predict':>9}{'a token':>10}",
    ]
    for name, found in report["predictors"].items():
        rows.append(
            f"{name:<26}{format_bytes(found['bytes']):>11}{found['share_of_model']:>10.1%}{found['selected']:>10.2f}"
            f"{found['missed']:>9.3%}{found['lost']:>9.4%}{found['extra']:>8.2%}{found['perplexity']:>12.3f}"
            f"{found['change']:>9.3%}{found['predict_ms']:>6.2f} ms{found['ms_per_token']:>7.1f} ms"
        )
    for variant, layers in report["rounding"].items():
        worst = max(layers, key=lambda layer: layer["real_over_assumed"])
        beyond = max(layer["beyond_three"] for layer in layers)
        rows.append(
            f"\n{variant}: rounding errors are at most {worst['real_over_assumed']:.2f} x what the margin assumes "
            f"(mean square, by layer); beyond three deviations: up to {beyond:.2%} (a normal distribution: 0.27%)"
        )
    if text["seen_in_calibration"] > 0.01:
        rows.append(f"\nWARNING: the predictors were trained on {text['seen_in_calibration']:.0%} of this text")
    return "\n".join(rows)


# --- zero-shot tasks ----------------------------------------------------------------------------------------------------
