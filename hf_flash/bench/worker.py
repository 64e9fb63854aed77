"""The child of `hf-flash bench`: loads one system, generates, and prints what it measured as one line of JSON.

    python -m hf_flash.bench.worker SPEC.json

Times are taken where a token is chosen, by a stopping criterion, so that generate() itself runs unchanged (clock.py). The
first token ends the prefill: counters start again there, and what follows is decoding alone. A system that turns out slow is
stopped early; what it took per token is known by then. Calls of several tokens follow (calls.py); and rows of hf_flash run
again without a clock, to record what was selected (expected_reads.py).
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any, Final

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LogitsProcessor
from transformers.utils import logging

from hf_flash.base.buffers import load_into_memory
from hf_flash.bench.calls import time_calls
from hf_flash.bench.clock import MemorySampler, StepClock
from hf_flash.bench.device import peak_bytes
from hf_flash.bench.expected_reads import expected_reads
from hf_flash.config import FlashOffloadConfig
from hf_flash.errors import BudgetError, HfFlashError
from hf_flash.machine.cgroup import memory_peak
from hf_flash.runtime.model import ExpertRuntime, find_runtime, runtime_of

_FFN: Final = r"\.(fc1|fc2|mlp|feed_forward|ffn)(\.|$)"  # names of feed-forward parts, for the row "naive"


def main(argv: list[str]) -> int:
    """Run one spec, a file that bench/child.py wrote."""
    logging.disable_progress_bar()
    print(json.dumps(run(json.loads(Path(argv[0]).read_text(encoding="utf-8")))))  # noqa: T201
    return 0


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """Load, generate, measure.

    Args:
        spec: `kind` ("stock", "accelerate" or "flash"), `folder`, `prompts` (token ids), `tokens`, `calls` (calls.py),
            `forced` (token ids that follow the prompt, or none); stock:
            `in_memory`; flash: `arguments` of FlashOffloadConfig, `window_off` (the least memory the model runs in), `torn`
            ("bundles" or "parts", what is a read of its own; `None`: as hf_flash reads).
    """
    memory = MemorySampler()
    start = perf_counter()
    with tempfile.TemporaryDirectory(prefix="hf-flash-bench-") as scratch:
        model = _LOADERS[spec["kind"]](spec, scratch)
        load_s = perf_counter() - start
        clock = StepClock(model if spec["kind"] == "flash" else None, len(spec["prompts"]), _device(spec))
        start = perf_counter()
        tokens = _generate(model, spec["prompts"], spec["tokens"], [clock], spec["forced"])
        found = {
            "tokens": tokens,
            "load_s": load_s,
            "first_token_s": clock.times[0] - start,
            "threads": torch.get_num_threads(),
            "dtype": str(model.dtype).removeprefix("torch."),
            "cgroup_peak_bytes": memory_peak(),
            "device_peak_bytes": peak_bytes(_device(spec)),
        } | clock.summary() | memory.stop()  # fmt: skip
        prompts = spec["prompts"]
        found["calls_ms"] = time_calls(model, spec["calls"], len(prompts[0]), spec["forced"])
        if spec["kind"] != "flash":
            return found
        if isinstance(runtime_of(model), ExpertRuntime):  # the law is of windows of neurons
            return found | {"expected_bytes": None, "window_tokens": None}
        return found | expected_reads(
            model, prompts, tokens, lambda: _generate(model, prompts, len(tokens), [], spec["forced"])
        )


class _Forced(LogitsProcessor):
    """Chooses the tokens that are given, one after the other."""

    def __init__(self, tokens: list[int], prompt: int) -> None:
        self._tokens, self._prompt = tokens, prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = torch.full_like(scores, -float("inf"))
        chosen[:, self._tokens[input_ids.shape[1] - self._prompt]] = 0.0
        return chosen


def _generate(model: Any, prompts: list[list[int]], tokens: int, criteria: list[Any], forced: list[int]) -> list[int]:
    """What was generated: the first token of every sequence, the second, and so on.

    Args:
        forced: the tokens that are to follow; none: those that the model chooses.
    """
    ids = torch.tensor(prompts, dtype=torch.int64, device=model.device)
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, num_beams=1,
        stopping_criteria=criteria, logits_processor=[_Forced(forced, ids.shape[1])] if forced else [],
    )  # fmt: skip
    new: list[int] = output[:, ids.shape[1] :].T.flatten().tolist()
    return new


def _device(spec: dict[str, Any]) -> torch.device:
    return torch.device(spec["device"] or "cpu")


# --- the systems ---------------------------------------------------------------------------------------------------------


def _load_stock(spec: dict[str, Any], scratch: str) -> Any:
    """Stock transformers. `in_memory` copies the weights off the mapped file, where they are slower and may be dropped."""
    model = AutoModelForCausalLM.from_pretrained(spec["folder"], device_map=spec["device"])
    if spec["in_memory"]:
        load_into_memory({id(t): t for t in [*model.parameters(), *model.buffers()]}.values())
    return model


def _load_accelerate(spec: dict[str, Any], scratch: str) -> Any:
    """Every decoder layer, or its feed-forward part, on disk, read from the checkpoint's own files when it runs; the rest in
    memory, or on the device."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(spec["folder"]))
    layers = next(name for name, module in empty.named_modules() if isinstance(module, torch.nn.ModuleList))
    place = str(spec["device"] or "cpu").replace("cpu:0", "cpu")  # accelerate and safetensors know no other name
    leaves = {name for name, module in empty.named_modules() if not list(module.children())}
    if spec["ffn_only"]:
        device_map = {name: "disk" if re.search(_FFN, name) and name.startswith(layers) else place for name in leaves}
    else:
        device_map = {
            name: "disk" if name.startswith(layers + ".") else place
            for name, _ in empty.named_modules()
            if name.rpartition(".")[0] == layers or (not name.startswith(layers) and name in leaves)
        }
    return AutoModelForCausalLM.from_pretrained(spec["folder"], device_map=device_map, offload_folder=scratch)


def _load_flash(spec: dict[str, Any], scratch: str) -> Any:
    """hf_flash; the steps of the paper by taking parts of it away."""
    arguments = dict(spec["arguments"])
    if spec["window_off"]:
        arguments["memory_budget"] = min(arguments["memory_budget"], _least_budget(spec["folder"], arguments, spec["device"]))
    model = _from_pretrained(spec["folder"], arguments, spec["device"])
    if spec["torn"]:
        find_runtime(model).engine.reader.tear_bundles(parts=spec["torn"] == "parts")
    return model


def _from_pretrained(folder: str, arguments: dict[str, Any], device: str | None) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=FlashOffloadConfig(**arguments), device_map=device)


def _least_budget(folder: str, arguments: dict[str, Any], device: str | None = None) -> int:
    """The minimum of this model with these arguments: no neuron is kept from one token to the next."""
    try:
        _from_pretrained(folder, arguments | {"memory_budget": 1}, device)
    except BudgetError as error:
        if error.minimum_bytes is not None:
            return error.minimum_bytes
    raise HfFlashError("the least budget of the model could not be found", where=folder)


_LOADERS: Final = {"stock": _load_stock, "accelerate": _load_accelerate, "flash": _load_flash}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
