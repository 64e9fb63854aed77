"""The bytes that `stats` reports are what the process holds, and the budget holds while repacking, loading and running."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ROOT, TINY_OPT, make_opt

MIB = 1 << 20
SLACK = 6 * MIB  # activations, KV cache, allocator: what is not weights
BATCHES = 10 * MIB  # the same with prompts, batches and beams

# Measures anonymous memory only: file pages are page cache, which the kernel takes back when it needs them.
# Huge pages are switched off, because the kernel may round a thread's stack of some KiB up to 2 MiB.
# malloc's threshold for mapping is fixed, or its heap keeps some MiB of freed tensors, more or fewer by chance.
SCRIPT = """
import ctypes
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE
import gc, json, sys, threading, torch, hf_flash
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
folder, warm_up, dtype, arguments = sys.argv[1], sys.argv[2], getattr(torch, sys.argv[3]), json.loads(sys.argv[4])
every_mode = arguments.pop("every_mode", False)

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(row.split()[1]) * 1024 for row in file if row.startswith("RssAnon"))

def load(path, **kwargs):
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, quantization_config=hf_flash.FlashOffloadConfig(**kwargs))

def run(model, tokens, rows=1, length=20, **kwargs):
    ids = (torch.arange(rows * length) % 97 + 5).view(rows, length)
    settings = dict(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, attention_mask=torch.ones_like(ids))
    model.generate(ids, **settings | kwargs)

def run_all(model):
    run(model, 2, length=100)
    run(model, 4, rows=8)
    run(model, 4, rows=2, num_beams=3)
    run(model, 4, rows=2, use_cache=False)
    run(model, 8, prompt_lookup_num_tokens=4)
    run(model, 4, prefill_chunk_size=8)
    run(model, 4, cache_implementation="static")
    run(torch.compile(model, backend="eager"), 2)

model = load(warm_up)  # imports, thread pools and allocator are not what is measured
run_all(model) if every_mode else run(model, 3)
del model
gc.collect()

before, peak, done = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())

watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
model = load(folder, **arguments)
run_all(model) if every_mode else run(model, 12)
gc.collect()
after = anonymous()
done.set()
watcher.join()
stats = hf_flash.stats(model)
print(json.dumps({"held": after - before, "peak": peak - before, **stats.to_dict()}))
"""


def measure(folder: Path, cache: Path, dtype: str, **arguments: Any) -> dict[str, Any]:
    """Repack, load and run in a process of its own; bytes of anonymous memory over what it had before, and its stats."""
    arguments["cache_dir"] = str(cache)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), str(TINY_OPT), dtype, json.dumps(arguments)],
        capture_output=True, text=True, cwd=ROOT, check=False,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HF_FLASH_CACHE": str(cache), "MALLOC_ARENA_MAX": "1",
             "MALLOC_MMAP_THRESHOLD_": "131072"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 M parameters in float16, four fifths of them in the FFN."""
    shape = {"hidden_size": 512, "word_embed_proj_dim": 512, "ffn_dim": 4096, "num_hidden_layers": 8, "vocab_size": 1024}
    shape |= {"max_position_embeddings": 128}
    return make_opt(tmp_path_factory.mktemp("memory") / "model", dtype=torch.float16, init_std=0.02, **shape)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to measure anonymous memory")
@pytest.mark.parametrize(("dtype", "predictor", "budget", "reader"), [
    pytest.param("float16", "none", 50 * MIB, "mmap", marks=pytest.mark.slow),
    ("float16", "quantized", 60 * MIB, "direct"),
    ("float32", "none", 100 * MIB, "direct"),
    pytest.param("float16", "none", 50 * MIB, "direct", marks=pytest.mark.slow),
    pytest.param("float16", "quantized", 60 * MIB, "mmap", marks=pytest.mark.slow),
    pytest.param("float32", "none", 100 * MIB, "mmap", marks=pytest.mark.slow),
])  # fmt: skip
def test_reported_bytes_are_held_and_the_budget_is_never_exceeded(
    checkpoint: Path, tmp_path: Path, dtype: str, predictor: str, budget: int, reader: str
) -> None:
    found = measure(checkpoint, tmp_path, dtype, predictor=predictor, memory_budget=budget, reader=reader)
    print({name: round(found[name] / MIB, 1) for name in ("held", "peak", "dram_bytes", "budget_bytes", "dense_bytes")})
    assert found["dram_bytes"] <= budget < found["dense_bytes"]
    assert abs(found["held"] - found["dram_bytes"]) <= 0.05 * found["dram_bytes"] + SLACK
    assert found["peak"] <= budget + SLACK


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to measure anonymous memory")
@pytest.mark.parametrize(("predictor", "reader"), [
    pytest.param("none", "direct", marks=pytest.mark.slow), ("quantized", "direct"),
    pytest.param("quantized", "mmap", marks=pytest.mark.slow),
])  # fmt: skip
def test_no_way_of_generating_exceeds_the_budget(checkpoint: Path, tmp_path: Path, predictor: str, reader: str) -> None:
    budget = 55 * MIB
    found = measure(checkpoint, tmp_path, "float16", predictor=predictor, memory_budget=budget, reader=reader, every_mode=True)
    print({name: round(found[name] / MIB, 1) for name in ("held", "peak", "dram_bytes", "budget_bytes", "dense_bytes")})
    assert found["dram_bytes"] <= budget
    assert found["peak"] <= budget + BATCHES < found["dense_bytes"]
