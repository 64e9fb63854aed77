"""What is measured while a system generates: when each token is chosen, what hf_flash counted, disk and memory."""

from __future__ import annotations

import threading
from pathlib import Path
from time import perf_counter
from typing import Any, Final

import numpy as np
import torch
from transformers import StoppingCriteria

from hf_flash.bench.device import finish
from hf_flash.runtime.counters import FlashStats
from hf_flash.runtime.flash_weights import OnFlash
from hf_flash.runtime.model import FlashRuntime, runtime_of, stats

PARTS: Final = ("io", "manage", "predict", "compute")  # of a token's time, as hf_flash counts it in its layers
SLOW_S: Final = 5.0  # for a token: a system that is slower is stopped
_SLOW_TOKENS: Final = 8  # after so many


class StepClock(StoppingCriteria):
    """Takes the time of every step, which gives a token of each sequence. It stops a run only if that is slow.

    Args:
        model: the flash model whose counters to read, if it is one.
        batch_size: sequences.
        device: where the system computes.
    """

    def __init__(self, model: Any, batch_size: int, device: torch.device) -> None:
        self._device = device
        self.model, self.times, self._disk_bytes = model, list[float](), list[int | None]()
        self._batch_size = batch_size

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if not self.times and self.model is not None:
            stats(self.model, reset=True)
        if len(self.times) < 2:
            self._disk_bytes.append(_disk_bytes())
        finish(self._device)
        self.times.append(perf_counter())
        steps = len(self.times) - 1
        slow = steps >= _SLOW_TOKENS and self.times[-1] - self.times[0] > SLOW_S * steps
        return torch.full((len(input_ids),), slow, dtype=torch.bool, device=input_ids.device)

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
        runtime = runtime_of(self.model)
        unit_bytes = runtime.store.layers[0].bundle_bytes if isinstance(runtime, FlashRuntime) else 0  # experts: no guesses
        parts = {part: 1e3 * getattr(count, part + "_s") / steps for part in PARTS}
        return {
            "parts_ms": parts | {"rest": mean_ms - sum(parts.values())},
            "read_bytes": count.read_bytes / steps,
            "missing_bytes": (count.missing_bytes + count.ahead_used * unit_bytes) / steps,  # without wrong guesses
            "touched_bytes": self._touched(snapshot, steps),
            "bus_bytes": count.bus_bytes / steps,
            "reads": count.reads / steps,
            "run_bytes": count.read_bytes / max(1, count.reads),
            "read_gb_per_s": snapshot.read_gb_per_s,
            "hit_rate": snapshot.hit_rate,
            "stats": snapshot.to_dict(),
        }

    def _touched(self, found: FlashStats, steps: int) -> float:
        """Weights in DRAM that a step goes through: all but what is on flash, and the tables of which it looks up a row."""
        head = self.model.get_output_embeddings().weight
        tables = [
            item.weight
            for item in self.model.modules()
            if isinstance(item, torch.nn.Embedding) and not isinstance(item, OnFlash)
        ]
        resident = found.resident_bytes - sum(table.nbytes for table in tables if table is not head)
        return float(resident + found.predictor_bytes + found.unit_bytes * found.counters.selected / steps)


class MemorySampler:
    """Samples this process's anonymous memory and swap every 50 ms until it is stopped. Nothing where there is no /proc."""

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
        """The highest values."""
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
