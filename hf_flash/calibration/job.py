"""Calibration: measure what a model's neurons do on text, and train predictors on that (paper: section 3.1, appendix B).

When a model does not fit into memory, its activations do not fit on the disk either (OPT-6.7B: 330 KB a token). So calibration
goes through the model layer by layer, with all tokens at each, as post-training quantization does:

    forward   read the hidden states of all tokens from disk, run them through one decoder layer (its FFN streamed from flash,
              every neuron), and write them back; record the FFN's inputs and which neurons are active (forward.py)
    result    make one result file per layer (layer_result.py), then remove its recorded activations and old hidden states:
        measure   mean and covariance of the inputs; how often neurons are used, by how many tokens in a row, and together
                  with which others (activity.py); the real rounding error of the quantized predictors (margin.py)
        train     the layer's low-rank predictor (training.py)
        place     decide which neurons should be neighbours on flash (placement.py)
    publish   put the results of all layers into the folder, and rewrite layer files where neurons move (publishing.py)

Disk, for each token: two hidden states in the compute dtype, and for each layer of a group an input in bfloat16 and one bit per
neuron. Memory: the budget holds the weights outside the FFN, the stream's buffers and the training. All files are in
`.calibration` in the model's folder until the end (work_folder.py). A run that was killed resumes after the last finished layer
and ends with the same bytes.

Several processes, on one machine or on several that share the folder, take a group of as many layers: each runs a part of the
tokens through all of them, then trains one. Their number does not change the result: batches are cut by position, and a layer's
training depends on its recorded data and the seed. accelerate starts the processes (its flag says GPU, but none is used):

    accelerate launch --multi_gpu --num_processes 4 --mixed_precision no -m hf_flash.calibration FOLDER --text FILE
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub.utils import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

from hf_flash.base.heap import trim_heap
from hf_flash.base.sizes import format_bytes
from hf_flash.budget.plan import ceiling_bytes
from hf_flash.calibration.forward import run_forward
from hf_flash.calibration.layer_result import make_layer_result
from hf_flash.calibration.processes import Processes
from hf_flash.calibration.publishing import publish
from hf_flash.calibration.routing import calibrate_mixture
from hf_flash.calibration.settings import LEAST_WINDOWS, SAMPLES, Settings, check_arguments
from hf_flash.calibration.text import Text, text_name, token_windows
from hf_flash.calibration.training import Targets
from hf_flash.calibration.work_folder import WorkFolder
from hf_flash.compute.activation import WITH_ZEROS
from hf_flash.config import FlashOffloadConfig
from hf_flash.errors import BudgetError, ConfigError, UnsupportedModelError
from hf_flash.families import family_of
from hf_flash.families.base import longest_sequence
from hf_flash.packing.checkpoint_folder import repacked_config
from hf_flash.packing.expert_folder import mixture_in
from hf_flash.predictors.choice import check_predictors
from hf_flash.runtime.model import close, find_runtime
from hf_flash.store.checkpoint import resolve_folder
from hf_flash.store.layout import FlashStore


def calibrate(
    folder: str | os.PathLike[str],
    text: Text,
    *,
    samples: int | None = None,
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
    """Measure a repacked model's neurons on text, and train low-rank predictors for it. Paper: section 3.1, appendix B.

    Writes `flash-predictor-lowrank.safetensors` and `flash-calibration.safetensors` into the folder and lists them in its
    index. The low-rank predictor becomes the folder's default if every layer reached its targets and it is smaller than every
    quantized one. If a run was interrupted, starting it again with the same arguments resumes it.

    For a mixture of experts it measures how often experts are used again, for `hf-flash plan`, and writes `flash-routing.json`
    (calibration/routing.py). Nothing is trained, so `recall`, `extra`, `rank`, `max_rank`, `epochs` and `placement` have to be
    left out.

    Args:
        folder: a repacked checkpoint, with its tokenizer. For a mixture its plain checkpoint, which may be a Hub repository:
            then the result is written into the Hub's cache, where `plan` finds it.
        text: a UTF-8 file (documents separated by form feeds), the name of a dataset (`name`, `name:config` or
            `name:config:split`, needs the `datasets` library), or token ids.
        samples: windows of text; one in eight is held out of the training, to choose and to measure on. Default: 256, or 16
            for a mixture.
        context: tokens in a window. Default: 256, or the model's maximum if that is less.
        recall: share of the active neurons that must be predicted; sets each layer's threshold.
        extra: share of the inactive neurons that may be predicted too; sets each layer's rank, the smallest that reaches it.
        rank: take this rank in every layer instead.
        max_rank: the largest rank to try. Default: half of d_model, 1024 at most.
        epochs: passes over the text.
        seed: for the choice of text and the order of training.
        placement: rewrite layer files so that neurons that are used together are side by side, where that saves reads. This
            needs disk space for one layer more; results stay the same, bit for bit.
        memory_budget: ceiling on weights and training state in DRAM, for each process. Default: most of what is free.

    Returns:
        The measurements, as stored in the folder: `text`, `targets`, `reached`, `default`, `placement`, `layers`; for a mixture
            [`hf_flash.budget.routing.Routing`], as plain values.

    Raises:
        CalibrationError: the text is empty, too short or does not fit the model, or activations are NaN or infinite.
        ConfigError: an argument is out of range.
        BudgetError: the budget is too small.
        StoreError: the folder is not a repacked checkpoint, or a layer file is damaged.
        DiskSpaceError: no room for the activations, or for a second copy of a layer.
        UnsupportedModelError: the activation leaves no exact zeros.
    """
    folder = _folder_of(folder)
    if (mixture := mixture_in(folder)) is not None:
        _check_nothing_is_trained(recall=recall, extra=extra, rank=rank, max_rank=max_rank, epochs=epochs, placement=placement)
        return calibrate_mixture(mixture, folder, text, samples, context, seed, memory_budget)
    store, config = FlashStore.open_folder(folder), repacked_config(folder)
    check_predictors(store)
    model_config = AutoConfig.from_pretrained(folder)
    if not family_of(config).activation_of(config).zeros:
        wanted = " or ".join(WITH_ZEROS)
        raise UnsupportedModelError("nothing to predict: the activation leaves no exact zeros", where=folder, expected=wanted)
    samples = SAMPLES if samples is None else samples
    targets, longest = Targets(recall, extra, rank, max_rank), longest_sequence(model_config)
    context = min(256, longest) if context is None else context
    d_model = store.unit.width
    check_arguments(targets, samples, context, epochs, seed, placement, d_model=d_model, longest=longest)
    windows = token_windows(folder, text, context, model_config.vocab_size, most=samples, seed=seed, least=LEAST_WINDOWS)
    settings = Settings(folder, store, windows, text_name(text), samples, targets, epochs, seed, placement)
    processes, work = Processes.of_environment(), WorkFolder(settings)
    budget = ceiling_bytes(memory_budget) // (1 if memory_budget else processes.on_this_machine)
    with processes.alone(folder):
        if processes.first:
            work.prepare()
        processes.wait()
        if len(work.finished()) < len(store.layers):
            work.check_room(processes.count)
            _run_layers(settings, work, processes, budget)
        return publish(settings, work, processes, config)


def _folder_of(model: str | os.PathLike[str]) -> Path:
    """The folder that was given; for a mixture on the Hub its folder in the Hub's cache, to which it is downloaded."""
    if not Path(model).exists():
        with suppress(ConfigError):  # not a repository's name either: opening the folder will raise the error
            if mixture_in(resolve_folder(model, config_only=True)) is not None:
                return resolve_folder(model)
    return Path(model).resolve()


def _check_nothing_is_trained(**given: Any) -> None:
    """For a mixture, refuse arguments that only apply to neurons and predictors, and several processes.

    Raises:
        ConfigError: one was given another value than its default, or there are several processes.
    """
    defaults = {name: inspect.signature(calibrate).parameters[name].default for name in given}
    wrong = {name: value for name, value in given.items() if value != defaults[name]}
    if Processes.of_environment().count > 1:
        wrong["processes"] = Processes.of_environment().count
    if wrong:
        raise ConfigError(
            "of a mixture of experts nothing is trained: what its router does is measured, by one process",
            where="calibrate",
            got=", ".join(f"{name}={value!r}" for name, value in wrong.items()),
            hint="leave it out",
        )


def _run_layers(settings: Settings, work: WorkFolder, processes: Processes, budget: int) -> None:
    """Do all work up to one result file per layer, within `budget` bytes of memory."""
    model = _load(settings, budget)
    layers, ffns, first = settings.store.layers, find_runtime(model).ffns, processes.first
    begin = work.next_layer()
    processes.wait()  # all have looked at the work folder before anyone changes it
    with tqdm(total=2 * settings.tokens * len(layers), initial=2 * settings.tokens * begin, unit="token", unit_scale=True,
              desc="Calibrating", disable=not first or None) as bar:  # fmt: skip
        for group in _groups(begin, len(layers), processes.count):
            bar.set_postfix_str(f"layer {group.start} of {len(layers)}: forward")
            run_forward(model, group, settings, work, processes, bar.update)
            processes.wait()
            trim_heap()
            if first and group.stop < len(layers):
                work.mark_hidden_whole(group.stop)
            bar.set_postfix_str(f"layer {group.start} of {len(layers)}: training")
            mine = group.start + processes.index
            if mine in group and mine not in work.finished():
                bias = ffns[mine].projections[layers[mine].unit.deciding].bias
                make_layer_result(layers[mine], None if bias is None else bias.detach(), settings, work)
                trim_heap()
            processes.wait()
            if first:
                work.clear(group)
            bar.update(settings.tokens * len(group))
    close(model)


def _groups(begin: int, end: int, size: int) -> Iterator[range]:
    """The layers from `begin` up to but not including `end`, `size` at a time."""
    return (range(at, min(at + size, end)) for at in range(begin, end, size))


def _load(settings: Settings, budget: int) -> Any:
    """Load the model without a predictor, into the part of the budget that training leaves."""
    training = settings.training_bytes
    try:
        quantization = FlashOffloadConfig(predictor="none", memory_budget=max(1, budget - training))
        return AutoModelForCausalLM.from_pretrained(settings.folder, quantization_config=quantization, dtype="auto").eval()
    except BudgetError as error:
        raise BudgetError(
            "the memory budget is too small for calibration",
            where="memory_budget",
            expected=f"{format_bytes(training)} for the training of a layer, and what the model needs",
            got=format_bytes(budget),
            hint=f"raise it, or lower max_rank. Without the training:\n{error}",
            minimum_bytes=None if error.minimum_bytes is None else training + error.minimum_bytes,
        ) from error
