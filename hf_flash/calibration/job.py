"""Calibration: what a model's neurons do on text, and predictors trained on it (paper: section 3.1, appendix B).

A model that does not fit into memory does not fit its activations on disk either (OPT-6.7B: 330 KB a token). So calibration
goes through the model layer by layer, all tokens at each, as post-training quantization does:

    forward   hidden states of all tokens from disk, through one decoder layer (its FFN streamed from flash, every neuron),
              and back to disk; the FFN's inputs and a bit per active neuron are recorded on the way
    measure   mean and covariance of the inputs; which neurons are used how often, by how many tokens in a row, together with
              which others (calibration/activity.py); what rounding really does to the quantized predictors (predictors/quantized.py)
    train     the layer's low-rank predictor (calibration/training.py)
    place     which neurons should be neighbours on flash (calibration/placement.py); layer files are written again at the end
    keep      what came out, in one file a layer; recorded activations and old hidden states are removed

Disk: `tokens * (2 * itemsize * d_model + layers at once * (2 * d_model + d_ff / 8))`. Memory: the budget holds the weights
outside the FFN, the stream's buffers and the training. All of it lies in `.calibration` in the model's folder until the end;
a run that was killed goes on after the last finished layer and ends with the same bytes.

Several processes, on one machine or on several that share the folder, take as many layers at once: each runs a part of the
tokens through them, then trains one. Their number changes nothing in the result: batches are cut by position, and a layer's
training depends on its recorded data and the seed. accelerate starts them (its flag says GPU; none is used):

    accelerate launch --multi_gpu --num_processes 4 --mixed_precision no -m hf_flash.calibration FOLDER --text FILE
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from huggingface_hub.utils import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

from hf_flash.base.files import parse_json, read_json, write_json, writing
from hf_flash.base.folders import check_room, clear_away
from hf_flash.base.heap import trim_heap
from hf_flash.base.sizes import format_bytes
from hf_flash.budget.calibration_report import check_layer
from hf_flash.budget.plan import ceiling_bytes
from hf_flash.calibration.activity import Activations, Use, frequency, moments, pack_bits, partners
from hf_flash.calibration.margin import MEASURED_RECALL, measure_margin
from hf_flash.calibration.placement import count_reads, place_neurons
from hf_flash.calibration.processes import _Crew
from hf_flash.calibration.row_files import _mapped, _Rows
from hf_flash.calibration.text import Text, quotations, text_name, token_windows
from hf_flash.calibration.training import Targets, train_layer, training_bytes
from hf_flash.config import FlashOffloadConfig
from hf_flash.errors import BudgetError, CalibrationError, ConfigError, StoreError, UnsupportedModelError
from hf_flash.families.adapters import adapter_for
from hf_flash.packing.checkpoint_folder import list_store, repacked_config
from hf_flash.predictors.base import read_tensors
from hf_flash.predictors.lowrank import VARIANT, LowRankPredictor
from hf_flash.predictors.quantized import quantized_forms
from hf_flash.runtime.model import close, find_runtime
from hf_flash.runtime.observing import observed
from hf_flash.store.layout import CALIBRATION_FILE, PREDICTOR_FILE, FlashStore, LayerStore
from hf_flash.store.safetensors_files import TensorSpec, read_header
from hf_flash.store.writer import calibration_metadata, place_layer, predictor_metadata, write_safetensors

_WORK: Final = ".calibration"
_BATCH: Final = 1024  # tokens through a layer at a time
_HELD_OUT: Final = 8  # one window in so many is kept from training
_LEAST: Final = 8  # windows
_RESULTS: Final = 2  # version of a layer's result file


def calibrate(
    folder: str | os.PathLike[str],
    text: Text,
    *,
    samples: int = 256,
    context: int | None = None,
    recall: float = 0.96,
    extra: float = 0.07,
    rank: int | None = None,
    max_rank: int | None = None,
    epochs: int = 4,
    seed: int = 0,
    placement: bool = True,
    memory_budget: int | str | None = None,
) -> dict[str, Any]:
    """Train low-rank predictors for a repacked model and measure its neurons on text. Paper: section 3.1, appendix B.

    Writes `flash-predictor-lowrank.safetensors` and `flash-calibration.safetensors` into the folder and lists them in its
    index. The low-rank predictor becomes the folder's own if every layer reached its targets and it is smaller than the
    quantized one. A run that was interrupted goes on where it was when it is started again with the same arguments.

    Args:
        folder: a repacked checkpoint, with its tokenizer.
        text: a UTF-8 file (documents separated by form feeds), the name of a dataset (`name`, `name:config` or
            `name:config:split`, needs the `datasets` library), or token ids.
        samples: windows of text; one in eight is held out of the training and used to choose and to measure.
        context: tokens in a window. Default: 256, or the model's maximum if that is less.
        recall: share of the active neurons that must be predicted; sets each layer's threshold.
        extra: share of the inactive neurons that may be predicted too; sets each layer's rank, the smallest that reaches it.
        rank: take this rank in every layer instead.
        max_rank: the largest rank to try. Default: half of d_model, 1024 at most.
        epochs: passes over the text.
        seed: of the choice of text and the order of training.
        placement: write layer files again, each with neurons that are used together side by side, where that saves reads. It
            takes room on the disk for one layer more; what is computed stays the same, bit for bit.
        memory_budget: ceiling on weights and training state in DRAM, of each process. Default: most of what is free.

    Returns:
        What was measured, as stored in the folder: `text`, `targets`, `layers`, `reached`.

    Raises:
        CalibrationError: the text is empty, too short or does not fit the model, or activations are NaN.
        ConfigError: an argument is out of range. BudgetError: the budget is too small.
        StoreError: the folder is no repacked checkpoint, or a layer file is damaged.
        DiskSpaceError: no room for the activations, or for a second copy of a layer.
        UnsupportedModelError: the activation leaves no exact zeros.
    """
    folder = Path(folder).resolve()
    store, config = FlashStore.open_folder(folder), repacked_config(folder)
    model_config = AutoConfig.from_pretrained(folder)
    if not adapter_for(config).sparse(config):
        raise UnsupportedModelError("nothing to predict: the activation leaves no exact zeros", where=folder, expected="relu")
    first = store.layers[0]
    targets = Targets(recall, extra, rank, max_rank)
    context = min(256, model_config.max_position_embeddings) if context is None else context
    _check(targets, samples, context, epochs, seed, first.d_model, model_config.max_position_embeddings)
    if not isinstance(placement, bool):
        raise ConfigError("placement is not valid", where="calibrate", expected="True or False", got=repr(placement))
    windows = token_windows(folder, text, context, model_config.vocab_size, most=samples, seed=seed, least=_LEAST)
    training = training_bytes(targets.limit(first.d_model), first.d_ff, first.d_model)
    crew = _Crew.of_environment()
    budget = ceiling_bytes(memory_budget) // (1 if memory_budget else crew.here)
    with crew.alone(folder):
        job = _Job(folder, store, windows, targets, epochs, seed, placement, crew)
        job.text_name = text_name(text)
        job.prepare(asdict(targets) | {"samples": samples, "context": context, "epochs": epochs, "seed": seed})
        if len(job.finished()) < len(store.layers):
            job.check_room()
            job.run(budget, training)
        return job.publish(config)


def _check(targets: Targets, samples: int, context: int, epochs: int, seed: int, d_model: int, longest: int) -> None:
    """Refuse arguments that are out of range."""
    ranges: dict[str, tuple[Any, float, float]] = {
        "recall": (targets.recall, 1e-9, 1.0),
        "extra": (targets.extra, 0.0, 1.0),
        "rank": (1 if targets.rank is None else targets.rank, 1, d_model),
        "max_rank": (1 if targets.max_rank is None else targets.max_rank, 1, d_model),
        "samples": (samples, _LEAST, 1 << 31),
        "context": (context, 2, longest),
        "epochs": (epochs, 0, 1 << 31),
        "seed": (seed, 0, (1 << 63) - 1),
    }
    for name, (value, low, high) in ranges.items():
        kind = float | int if name in ("recall", "extra") else int
        if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
            raise ConfigError(f"{name} is not valid", where="calibrate", expected=f"{low} to {high}", got=repr(value))


class _Job:
    """One calibration: its files in `.calibration` and the steps through them.

    hidden-N.bin    what goes into layer N, [tokens, d_model] in the dtype of compute; hidden-N.done says it is whole
    x-N.bin         the FFN's inputs in layer N, bfloat16 [tokens, d_model]
    bits-N.bin      its active neurons, [tokens, d_ff / 8]
    layer-N.safetensors   what was measured and trained
    """

    def __init__(
        self,
        folder: Path,
        store: FlashStore,
        windows: torch.Tensor,
        targets: Targets,
        epochs: int,
        seed: int,
        placement: bool,
        crew: _Crew,
    ) -> None:
        self.folder, self.store, self.windows, self.crew = folder, store, windows, crew
        self.targets, self.epochs, self.seed, self.placement = targets, epochs, seed, placement
        self.work = folder / _WORK
        self.text_name: str | None = None  # for the report alone: a text that is called otherwise is the same text
        self.context = windows.shape[1]
        self.tokens = windows.numel()
        self.held_out = max(1, len(windows) // _HELD_OUT) * self.context

    # --- files

    def prepare(self, arguments: dict[str, Any]) -> None:
        """Make the working folder; throw away one that was made for another job."""
        wanted = arguments | {
            "text": hashlib.sha256(self.windows.numpy().tobytes()).hexdigest(),
            "fingerprint": self.store.metadata["fingerprint"],
            "quantized": sorted(form.variant for form in quantized_forms(self.store)),
            "results": _RESULTS,
        }
        self.arguments = wanted
        if self.crew.index == 0:
            path = self.work / "job.json"
            with writing(self.work):
                if not _is_working_folder(self.work) or _job_of(path) != wanted:
                    clear_away(self.work)
                self.work.mkdir(exist_ok=True)
            write_json(path, wanted)
        self.crew.wait()

    def _path(self, kind: str, layer: int) -> Path:
        suffix = "safetensors" if kind == "layer" else "bin"
        return self.work / f"{kind}-{layer:05d}.{suffix}"

    def finished(self) -> set[int]:
        """Layers whose result is there."""
        return {layer.index for layer in self.store.layers if self._path("layer", layer.index).exists()}

    def check_room(self) -> None:
        first = self.store.layers[0]
        recorded = 2 * first.d_model + (first.d_ff + 7) // 8
        with writing(self.work):
            check_room(self.work, self.tokens * (2 * 4 * first.d_model + self.crew.count * recorded))

    # --- the way through the layers

    def _load(self, budget: int, training: int) -> Any:
        """The model, in what training leaves of the budget."""
        try:
            quantization = FlashOffloadConfig(predictor="none", memory_budget=max(1, budget - training))
            return AutoModelForCausalLM.from_pretrained(self.folder, quantization_config=quantization, dtype="auto").eval()
        except BudgetError as error:
            raise BudgetError(
                "the memory budget is too small for calibration",
                where="memory_budget",
                expected=f"{format_bytes(training)} for the training of a layer, and what the model needs",
                got=format_bytes(budget),
                hint=f"raise it, or lower max_rank. Without the training:\n{error}",
                minimum_bytes=None if error.minimum_bytes is None else training + error.minimum_bytes,
            ) from error

    def run(self, budget: int, training: int) -> None:
        """Everything up to one result file a layer, within `budget` bytes, of which training takes `training`."""
        model = self._load(budget, training)
        layers, count = self.store.layers, self.crew.count
        begin = self._begin()
        with tqdm(total=2 * self.tokens * len(layers), initial=2 * self.tokens * begin, unit="token", unit_scale=True,
                  desc="Calibrating", disable=self.crew.index > 0 or None) as bar:  # fmt: skip
            for start in range(begin, len(layers), count):
                group = range(start, min(start + count, len(layers)))
                bar.set_postfix_str(f"layer {start} of {len(layers)}: forward")
                self._forward(model, group, bar.update)
                self.crew.wait()
                trim_heap()
                if self.crew.index == 0 and group.stop < len(layers):
                    self._path("hidden", group.stop).with_suffix(".done").touch()
                bar.set_postfix_str(f"layer {start} of {len(layers)}: training")
                mine = start + self.crew.index
                if mine in group and mine not in self.finished():
                    self._train(model, layers[mine])
                    trim_heap()
                self.crew.wait()
                if self.crew.index == 0:
                    self._clear(group)
                bar.update(self.tokens * len(group))
        close(model)

    def _begin(self) -> int:
        """The layer to go on with: the last whose hidden states are whole, with all layers before it finished."""
        done = self.finished()
        able = [0] + [
            n for n in range(1, len(self.store.layers)) if self._path("hidden", n).with_suffix(".done").exists()
        ]  # fmt: skip
        begin = max(n for n in able if done >= set(range(n)))
        self.crew.wait()  # before anyone changes what the others look at
        return begin

    def _clear(self, group: range) -> None:
        for layer in group:
            self._path("hidden", layer).with_suffix(".done").unlink(missing_ok=True)
            for kind in ("x", "bits", "hidden"):
                self._path(kind, layer).unlink(missing_ok=True)

    @torch.no_grad()
    def _forward(self, model: Any, group: range, progress: Callable[[int], Any]) -> None:
        """Run this process's share of the windows through the layers of `group`, recording inputs and active neurons."""
        layers = model.get_decoder().layers
        ffns = find_runtime(model).ffns
        step = max(1, _BATCH // self.context)
        mapped = None
        if group.start:
            mapped = _mapped(self._path("hidden", group.start), model.dtype, (self.tokens, self.store.layers[0].d_model))
        with ExitStack() as stack:
            files = [stack.enter_context(_Rows(self._path(kind, n))) for n in group for kind in ("x", "bits")]
            hidden_out = stack.enter_context(_Rows(self._path("hidden", group.stop)))
            for at in range(self.crew.index * step, len(self.windows), self.crew.count * step):
                batch = self.windows[at : at + step]
                hidden, arguments = _enter(model, batch)
                if mapped is not None:
                    rows = slice(at * self.context, (at + len(batch)) * self.context)
                    hidden = mapped[rows].view(hidden.shape).clone()
                for number, n in enumerate(group):
                    with observed(ffns[n], partial(self._record, files[2 * number : 2 * number + 2], at * self.context)):
                        out = layers[n](hidden, **arguments)
                    hidden = out[0] if isinstance(out, tuple) else out
                    progress(batch.numel() * self.crew.count)
                if group.stop < len(layers):
                    hidden_out.write(at * self.context, hidden.reshape(batch.numel(), -1))

    @staticmethod
    def _record(files: list[_Rows], row: int, x: torch.Tensor, before: torch.Tensor) -> None:
        if not torch.isfinite(x).all():
            raise CalibrationError(
                "the activations contain NaN or infinite values",
                where=f"{files[0].path.stem}: the FFN's input",
                hint="load a checkpoint of another dtype, or check this one with `hf-flash inspect --check`",
            )
        files[0].write(row, x.bfloat16())
        files[1].write(row, pack_bits(before > 0))

    def _train(self, model: Any, layer: LayerStore) -> None:
        """Measure and train one layer, and write its result."""
        shape = (self.tokens, layer.d_model), (self.tokens, (layer.d_ff + 7) // 8)
        data = Activations(
            _mapped(self._path("x", layer.index), torch.bfloat16, shape[0]),
            _mapped(self._path("bits", layer.index), torch.uint8, shape[1]),
            layer.d_ff,
            self.held_out,
        )
        own = find_runtime(model).ffns[layer.index].bias
        bias = None if own is None else own.detach()
        mean, covariance = moments(data)
        result, packed = train_layer(data, layer.up(), bias, mean, covariance, self.targets, self.epochs, self.seed)
        tensors = {f"{layer.prefix}.predictor.{name}": tensor for name, tensor in packed.items()}
        report: dict[str, Any] = {"lowrank": result.to_dict(), "reached": result.extra <= self.targets.extra}
        for form in quantized_forms(self.store):
            report[form.variant], found = measure_margin(self.store, layer, form, bias, data, mean, covariance)
            tensors |= {f"{layer.prefix}.calibration.{form.variant}.{name}": tensor for name, tensor in found.items()}
        masks = partial(map, data.active, data.chunks(0, self.tokens))
        used, ids, together = frequency(masks()), *partners(masks(), layer.d_ff)
        names = {"frequency": used, "partners": ids, "together": together}
        tensors |= {f"{layer.prefix}.calibration.{name}": tensor for name, tensor in names.items()}
        report["active"] = int(used.sum()) / self.tokens
        predictor = LowRankPredictor(packed)
        report["use"] = self._use(data.active)
        report["lowrank"]["use"] = self._use(lambda rows: predictor.select(data.x[rows]))  # wrongly named ones stay the same
        place = place_neurons(data)
        report["reads"] = count_reads(data, place).to_dict()
        tensors[f"{layer.prefix}.place"] = torch.from_numpy(place)
        write_safetensors(
            self._path("layer", layer.index),
            {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()},
            tensors.values(),
            {"report": json.dumps(report)},
        )

    def _use(self, used: Callable[[slice], torch.Tensor]) -> dict[str, list[float]]:
        """Aggregated use, over the last 64 windows. `used`: rows of the recorded tokens to bool [tokens, d_ff]."""
        use = Use()
        for window in range(max(0, len(self.windows) - 64), len(self.windows)):
            use.add(used(slice(window * self.context, (window + 1) * self.context)))
        return use.to_dict()

    # --- the end

    def publish(self, config: dict[str, Any]) -> dict[str, Any]:
        """Put the results of all layers into the model's folder. The index comes last: until then it works as before."""
        report = self._report(config["quantization_config"].get("predictor"))
        if self.crew.index == 0:
            self._place([layer["reads"]["worth"] and self.placement for layer in report["layers"]])
            self._write(PREDICTOR_FILE.format(VARIANT), "predictor", predictor_metadata(VARIANT, self.store.metadata))
            described = calibration_metadata(json.dumps(report), self.store.metadata)
            self._write(CALIBRATION_FILE, "calibration", described, quotations(self.windows))
            list_store(self.folder)
            config["quantization_config"]["predictor"] = report["default"]
            write_json(self.folder / "config.json", config)
            shutil.rmtree(self.work)
        self.crew.wait()
        return report

    def _place(self, chosen: list[bool]) -> None:
        """Write the chosen layers again with their neurons placed. A killed run has done some of them, each of them whole."""
        todo = []
        for layer in self.store.layers:
            place = read_tensors(self._path("layer", layer.index), layer.prefix)["place"].numpy()
            if chosen[layer.index] and not np.array_equal(place, layer.place if layer.place is not None else []):
                todo.append((layer, place))
        for layer, place in tqdm(todo, desc="Placing neurons", unit="layer", delay=1):
            check_room(self.folder, layer.nbytes)
            place_layer(layer, place)
            trim_heap()

    def _report(self, before: str | None) -> dict[str, Any]:
        """What goes into the calibration file; `before` is the folder's predictor up to now."""
        layers = []
        for n in self.store.layers:
            path = self._path("layer", n.index)
            layers.append(parse_json(read_header(path)[1].get("report", ""), path))
            check_layer(layers[-1], path)
        quantized = min((self.store.predictors[f.variant].stat().st_size for f in quantized_forms(self.store)), default=0)
        smaller = not quantized or sum(layer["lowrank"]["nbytes"] for layer in layers) < quantized
        reached = all(layer["reached"] for layer in layers)
        if before == VARIANT:  # of an earlier calibration, whose predictor is replaced
            before = "quantized" if quantized else "none"
        self.crew.wait()  # all have read before the first clears up
        return {
            "text": {"tokens": self.tokens, "held_out": self.held_out, "context": self.context}
            | {"sha256": self.arguments["text"], "name": self.text_name},
            "targets": asdict(self.targets) | {"epochs": self.epochs, "seed": self.seed, "quantized_recall": MEASURED_RECALL},
            "reached": reached,
            "default": VARIANT if reached and smaller else before,
            "placement": self.placement,
            "layers": layers,
        }

    def _write(self, name: str, kind: str, metadata: dict[str, str], text: torch.Tensor | None = None) -> None:
        """Gather the tensors of one kind from all layers into one file of the store."""
        specs: dict[str, TensorSpec] = {}
        sources: list[tuple[Path, str]] = []
        for layer in self.store.layers:
            path = self._path("layer", layer.index)
            for full, (spec, _) in read_header(path)[0].items():
                if full.startswith(f"{layer.prefix}.{kind}."):
                    specs[full] = spec
                    sources.append((path, full))
        if text is not None:
            specs["calibration.text"] = (text.dtype, tuple(text.shape))

        def pieces() -> Iterator[torch.Tensor]:
            for path, full in sources:
                prefix, _, last = full.rpartition(".")
                yield read_tensors(path, prefix)[last]
            if text is not None:
                yield text

        write_safetensors(self.folder / name, specs, pieces(), metadata)


def _is_working_folder(work: Path) -> bool:
    """Whether it is what a run of ours leaves: a folder of regular files, through none of which anything else is written."""
    return not work.is_symlink() and work.is_dir() and all(entry.is_file(follow_symlinks=False) for entry in os.scandir(work))


def _job_of(path: Path) -> dict[str, Any] | None:
    """What a working folder was made for; `None` where it does not say so."""
    try:
        return read_json(path)
    except StoreError:
        return None


class _Entered(Exception):
    """Ends a forward at the door of the first decoder layer."""


def _enter(model: Any, batch: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
    """What the first decoder layer is given for `batch` [windows, context]: hidden states and other arguments."""
    seen: list[Any] = []

    def stop(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.extend([*args, kwargs])
        raise _Entered

    handle = model.get_decoder().layers[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(batch, use_cache=False)
    except _Entered:
        pass
    finally:
        handle.remove()
    hidden = seen[0] if len(seen) > 1 else seen[-1].pop("hidden_states")
    return hidden, seen[-1]
