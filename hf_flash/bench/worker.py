"""The child of `hf-flash bench`: loads one system, generates, and prints what it measured as one line of JSON.

    python -m hf_flash.bench.worker SPEC.json

Times are taken where a token is chosen, by a stopping criterion, so that generate() itself runs unchanged. The first token
ends the prefill: counters start again there, and what follows is decoding alone. A system that turns out slow is stopped
early; what it took per token is known by then. Rows of hf_flash then run again without a clock, to record what was selected.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, StoppingCriteria
from transformers.utils import logging

from hf_flash.base.arrays import Ids
from hf_flash.base.buffers import load_into_memory
from hf_flash.bench.checks import window_law
from hf_flash.config import FlashOffloadConfig
from hf_flash.errors import BudgetError, HfFlashError
from hf_flash.machine.cgroup import memory_peak
from hf_flash.reading import reader
from hf_flash.reading.chunks import Chunks
from hf_flash.runtime.counters import FlashStats
from hf_flash.runtime.layer import FlashFFN
from hf_flash.runtime.model import find_runtime, stats

PARTS = ("io", "manage", "predict", "compute")  # what hf_flash times in its layers
_SLOW_S, _SLOW_TOKENS = 5.0, 8


def main(argv: list[str]) -> int:
    """Run one spec, a file that bench/run.py wrote."""
    logging.disable_progress_bar()
    print(json.dumps(run(json.loads(Path(argv[0]).read_text(encoding="utf-8")))))  # noqa: T201
    return 0


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """Load, generate, measure.

    Args:
        spec: `kind` ("stock", "accelerate" or "flash"), `folder`, `prompts` (token ids), `tokens`; stock: `in_memory`; flash:
            `arguments` of FlashOffloadConfig, `window_off` (the least memory the model runs in), `pieces` (reads a neuron is
            torn into, 0: as hf_flash reads).
    """
    watch = _Watch()
    start = perf_counter()
    with tempfile.TemporaryDirectory(prefix="hf-flash-bench-") as scratch:
        model = _LOADERS[spec["kind"]](spec, scratch)
        load_s = perf_counter() - start
        clock = _Clock(model if spec["kind"] == "flash" else None, len(spec["prompts"]))
        start = perf_counter()
        tokens = _generate(model, spec["prompts"], spec["tokens"], [clock])
        found = {
            "tokens": tokens,
            "load_s": load_s,
            "first_token_s": clock.times[0] - start,
            "threads": torch.get_num_threads(),
            "dtype": str(model.dtype).removeprefix("torch."),
            "cgroup_peak_bytes": memory_peak(),
        } | clock.summary() | watch.stop()  # fmt: skip
        return found | (_expected(model, spec["prompts"], tokens) if spec["kind"] == "flash" else {})


def _generate(model: Any, prompts: list[list[int]], tokens: int, criteria: list[Any]) -> list[int]:
    """What was generated: the first token of every sequence, the second, and so on."""
    ids = torch.tensor(prompts, dtype=torch.int64, device="cpu")
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, num_beams=1,
        stopping_criteria=criteria,
    )  # fmt: skip
    new: list[int] = output[:, ids.shape[1] :].T.flatten().tolist()
    return new


# --- what is measured ------------------------------------------------------------------------------------------------


class _Clock(StoppingCriteria):
    """Takes the time of every step, a token of each sequence; never stops a run, unless it is slow.

    Args:
        model: the flash model whose counters to read, if it is one.
        batch_size: sequences.
    """

    def __init__(self, model: Any, batch_size: int) -> None:
        self.model, self.times, self._disk_bytes = model, list[float](), list[int | None]()
        self._batch_size = batch_size

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if not self.times and self.model is not None:
            stats(self.model, reset=True)
        if len(self.times) < 2:
            self._disk_bytes.append(_disk_bytes())
        self.times.append(perf_counter())
        steps = len(self.times) - 1
        slow = steps >= _SLOW_TOKENS and self.times[-1] - self.times[0] > _SLOW_S * steps
        return torch.full((len(input_ids),), slow, dtype=torch.bool, device="cpu")

    def summary(self) -> dict[str, Any]:
        """Per step: milliseconds, and where they and the bytes went."""
        ms, steps, disk = 1e3 * np.diff(self.times), len(self.times) - 1, _disk_bytes()
        first = self._disk_bytes[0]
        found: dict[str, Any] = {
            "token_ms": [round(float(x), 3) for x in ms],
            "tokens_per_s": steps * self._batch_size / (self.times[-1] - self.times[0]),
            "mean_ms": float(ms.mean()),
            "median_ms": float(np.median(ms)),
            "p95_ms": float(np.percentile(ms, 95)),
            "disk_bytes": None if disk is None or first is None else (disk - first) / steps,
        }
        return found if self.model is None else found | self._of_flash(found["mean_ms"], steps)

    def _of_flash(self, mean_ms: float, steps: int) -> dict[str, Any]:
        snapshot = stats(self.model)
        count = snapshot.counters
        bundle_bytes = find_runtime(self.model).store.layers[0].bundle_bytes
        parts = {part: 1e3 * getattr(count, part + "_s") / steps for part in PARTS}
        return {
            "parts_ms": parts | {"rest": mean_ms - sum(parts.values())},
            "read_bytes": count.read_bytes / steps,
            "missing_bytes": (count.missing_bytes + count.ahead_used * bundle_bytes) / steps,  # without wrong guesses
            "touched_bytes": self._touched(snapshot, steps),
            "reads": count.reads / steps,
            "run_bytes": count.read_bytes / max(1, count.reads),
            "read_gb_per_s": snapshot.read_gb_per_s,
            "hit_rate": snapshot.hit_rate,
            "stats": snapshot.to_dict(),
        }

    def _touched(self, found: FlashStats, steps: int) -> float:
        """Weights in DRAM that a step goes through: all but its neurons and the tables of which it looks up a row."""
        head = self.model.get_output_embeddings().weight
        tables = [item.weight for item in self.model.modules() if isinstance(item, torch.nn.Embedding)]
        resident = found.resident_bytes - sum(table.nbytes for table in tables if table is not head)
        neuron = (found.dense_bytes - found.resident_bytes) / (found.layers * found.d_ff)
        return resident + found.predictor_bytes + neuron * found.counters.selected / steps


class _Watch:
    """Samples this process's anonymous memory and swap every 50 ms, from loading on. Nothing where there is no /proc."""

    def __init__(self) -> None:
        self._peaks: dict[str, int] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            self._sample()
            if self._done.wait(0.05):
                return

    def _sample(self) -> None:
        try:
            rows = Path("/proc/self/status").read_text().splitlines()
        except OSError:
            return
        for row in rows:
            name, _, value = row.partition(":")
            if name in ("RssAnon", "VmSwap"):
                self._peaks[name] = max(self._peaks.get(name, 0), 1024 * int(value.split()[0]))

    def stop(self) -> dict[str, int | None]:
        self._done.set()
        self._thread.join()
        return {"peak_anonymous_bytes": self._peaks.get("RssAnon"), "peak_swap_bytes": self._peaks.get("VmSwap")}


def _disk_bytes() -> int | None:
    """What this process made the disk deliver, page faults included."""
    try:
        rows = dict(row.split(": ") for row in Path("/proc/self/io").read_text().splitlines())
        return int(rows["read_bytes"])
    except (OSError, KeyError):
        return None


# --- what a window should have read --------------------------------------------------------------------------------------


def _expected(model: Any, prompts: list[list[int]], tokens: list[int]) -> dict[str, float | None]:
    """`expected_bytes` per token and `window_tokens` (bench/checks.py), from what the tokens of the run selected.

    They are generated once more for it, without a clock: the answer does not depend on what is in memory (contract C3), and
    recording costs the run that is measured nothing. `None` for a batch: the law is of tokens that come one after the other.
    """
    runtime = find_runtime(model)
    bundle_bytes, ffns = runtime.store.layers[0].bundle_bytes, runtime.ffns
    if runtime.form is None:  # every token uses everything
        neurons = sum(ffn.d_ff for ffn in ffns if ffn.window.capacity < ffn.d_ff)
        return {"expected_bytes": float(neurons * bundle_bytes), "window_tokens": None}
    if len(prompts) > 1:
        return {"expected_bytes": None, "window_tokens": None}
    first = len(prompts[0])
    records = [_Record(ffn, first + len(tokens)) for ffn in ffns]
    if _generate(model, prompts, len(tokens), []) != tokens:
        raise HfFlashError("the same prompt gave other tokens the second time")
    found = [window_law(record.used(), first, ffn.window.capacity) for record, ffn in zip(records, ffns, strict=True)]
    read, kept = np.sum(found, axis=0) / (len(tokens) - 1)
    return {"expected_bytes": float(read) * bundle_bytes, "window_tokens": float(kept) / len(ffns)}


class _Record:
    """Stands where a layer's predictor stood, and keeps what each forward was told; what lookahead was told goes.

    In one piece, allocated before: small ones that stay, between large ones that go, would make the heap grow into the cap.
    """

    bias: torch.Tensor | None = None

    def __init__(self, ffn: FlashFFN, tokens: int) -> None:
        self._predictor, self._d_ff, self.nbytes = ffn.predictor, ffn.d_ff, ffn.predictor.nbytes
        self._last: torch.Tensor | None = None
        self._bits = np.zeros((tokens, -(-ffn.d_ff // 8)), dtype=np.uint8)
        self._count = 0
        ffn.predictor = self
        ffn.register_forward_hook(self._keep)

    def select(self, x: torch.Tensor) -> torch.Tensor | None:
        self._predictor.bias = self.bias
        self._last = self._predictor.select(x)
        return self._last

    def _keep(self, *args: Any) -> None:
        assert self._last is not None
        end = self._count + len(self._last)
        self._bits[self._count : end] = np.packbits(self._last.numpy(), axis=1)
        self._count, self._last = end, None

    def used(self) -> Any:
        """bool [tokens, d_ff]."""
        return np.unpackbits(self._bits[: self._count], axis=1, count=self._d_ff).astype(bool)


# --- the systems ---------------------------------------------------------------------------------------------------------


def _load_stock(spec: dict[str, Any], scratch: str) -> Any:
    """Stock transformers. `in_memory` copies the weights off the mapped file, where they are slower and may be dropped."""
    model = AutoModelForCausalLM.from_pretrained(spec["folder"])
    if spec["in_memory"]:
        load_into_memory({id(t): t for t in [*model.parameters(), *model.buffers()]}.values())
    return model


def _load_accelerate(spec: dict[str, Any], scratch: str) -> Any:
    """Every decoder layer on disk, read from the checkpoint's own files when it runs; the rest in memory."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(spec["folder"]))
    layers = next(name for name, module in empty.named_modules() if isinstance(module, torch.nn.ModuleList))
    device_map = {
        name: "disk" if name.startswith(layers + ".") else "cpu"
        for name, module in empty.named_modules()
        if name.rpartition(".")[0] == layers or (not name.startswith(layers) and not list(module.children()))
    }
    return AutoModelForCausalLM.from_pretrained(spec["folder"], device_map=device_map, offload_folder=scratch)


def _load_flash(spec: dict[str, Any], scratch: str) -> Any:
    """hf_flash; the steps of the paper by taking parts of it away."""
    arguments = dict(spec["arguments"])
    if spec["window_off"]:
        arguments["memory_budget"] = min(arguments["memory_budget"], _least_budget(spec["folder"], arguments))
    if spec["pieces"]:
        _tear_bundles(spec["pieces"])
    return _from_pretrained(spec["folder"], arguments)


def _from_pretrained(folder: str, arguments: dict[str, Any]) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=FlashOffloadConfig(**arguments))


def _least_budget(folder: str, arguments: dict[str, Any]) -> int:
    """The minimum of this model with these arguments: no neuron is kept from one token to the next."""
    try:
        _from_pretrained(folder, arguments | {"memory_budget": 1})
    except BudgetError as error:
        if error.minimum_bytes is not None:
            return error.minimum_bytes
    raise HfFlashError("the least budget of the model could not be found", where=folder)


_LOADERS = {"stock": _load_stock, "accelerate": _load_accelerate, "flash": _load_flash}


def _tear_bundles(pieces: int) -> None:
    """For the ablation: from now on, in this process, every neuron takes `pieces` reads of its own.

    With 2 the up row and the down column come separately, as if they were not bundled; with 1 a bundle comes alone, as if
    neighbours were not coalesced. Readers fill rows of a matrix by their number and size; half the size makes twice the rows.
    """

    def torn(ids: Ids, rows: Ids, offset: int, size: int) -> Chunks:
        part = np.arange(pieces)
        offsets = (offset + ids[:, None] * size + part * (size // pieces)).reshape(-1)
        return Chunks(offsets, np.arange(len(offsets) + 1), (rows[:, None] * pieces + part).reshape(-1), size // pieces)

    reader.chunked = torn  # type: ignore[attr-defined]
    reader.BundleReader.step_file = lambda self, layer: None  # type: ignore[method-assign]  # nor are they one call


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
