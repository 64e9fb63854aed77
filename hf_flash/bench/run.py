"""`hf-flash bench`: decode speed of systems side by side, measured so that the figures can be compared.

Every system runs in a process of its own, one after the other, under the same ceiling on memory (machine/memory_cap.py), from
a cold page cache, on the same prompt, greedy. The ceiling is the budget for weights plus a headroom for what every process
needs besides: interpreter, libraries, activations, KV cache. hf_flash gets that budget; the others take of the ceiling what
they can.

    stock-ram     transformers, all weights in memory, no cap: what one would like to have
    stock-cap     transformers as it is, under the cap: the kernel pages the weights in and out
    accelerate    every decoder layer on disk, under the cap
    naive         of every decoder layer the feed-forward part on disk: the whole FFN is read, and copied, for every token
    none          hf_flash without a predictor: reads what does not fit, for every token
    hybrid        the paper's steps (table 2). Attention resident, the whole FFN read for every token
    +predictor    only predicted neurons, each of their parts a read of its own, nothing kept
    +window       neurons of recent tokens are kept
    +bundling     all parts of a neuron in one read
    flash         hf_flash as it comes: with everything else it does to make reads fewer and longer
    flash-uncapped   the same with all the memory it wants; `check` compares the tokens
    flash 40% ...    a sweep: the same over budgets, the cap following each (paper: figure 7)

A system that fails is a row with its reason. This module says which systems run and puts the rows together; a child measures
(child.py, worker.py), the figures are held against what could be expected (checks.py), and tables are made of them (report.py).
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from huggingface_hub.utils import tqdm

from hf_flash.base.sizes import parse_bytes, parse_share
from hf_flash.bench.checks import add_checks
from hf_flash.bench.child import Job
from hf_flash.bench.report import machine
from hf_flash.bench.subject import find_subject
from hf_flash.bench.systems import TINY, USUAL, System, resolve_systems
from hf_flash.errors import ConfigError
from hf_flash.machine.disk import DiskPoint, disk_curve, mean_curve
from hf_flash.packing.repacking import repack


def bench(
    folder: str | os.PathLike[str],
    *,
    plain: str | os.PathLike[str] | None = None,
    systems: Sequence[str | System] | None = None,
    tokens: int = 64,
    prompt_tokens: int = 16,
    batch_size: int = 1,
    calls: Sequence[tuple[int, int]] = (),
    forced: Sequence[int] | int | None = None,
    memory: int | str = "50%",
    headroom: int | str = "0.6GB",
    repeats: int = 1,
    cap: bool = True,
    check: bool = False,
    arguments: Mapping[str, Any] | None = None,
    timeout: float = 1800,
    disk_seconds: float = 0.3,
    seed: int = 0,
    notes: Sequence[str] = (),
    device: str | None = None,
) -> dict[str, Any]:
    """Measure decode speed.

    Args:
        folder: a repacked checkpoint; or a mixture of experts, which is read as it is.
        plain: the same model as a plain checkpoint, for stock transformers and accelerate. Of a mixture: `folder` itself.
        systems: names from `SYSTEMS`, the groups "ablation" and "peers", or own ones (see [`parse_system`], [`parse_sweep`]).
            Default: the peers if there is a plain checkpoint, "none" and "flash"; of a mixture without "none".
        tokens: to generate; slow systems stop earlier.
        prompt_tokens: of each prompt, random ids.
        batch_size: sequences that are generated at once. With more than one, figures are per step, which makes a token of each,
            tokens per second count all of them, and the window law, which is one of single tokens, is left out.
        calls: rows and tokens of single calls to be timed after that (calls.py).
        memory: budget for weights in DRAM, a size or a share of the dense model such as `"50%"`.
        headroom: what the cap allows beyond it.
        repeats: rounds through all systems; a row shows its median run, and the median time to the first token.
        cap: `False` runs everything without a ceiling.
        check: whether "flash" must generate the tokens of "flash-uncapped", which is added.
        forced: token ids that follow the prompt, whatever a model would choose: what it generates with random weights may
            repeat itself, which windows like. One for each of `tokens`, or more, or a number that seeds random ones. For one
            sequence. Calls are of these tokens, too.
        arguments: of FlashOffloadConfig, for every row of hf_flash that does not name them itself.
        timeout: seconds for a system.
        disk_seconds: for each point of the disk's curve, which is measured between the rows: disks drift.
        seed: of the prompt.
        notes: what else the figures depend on, for the report.
        device: where all systems compute, such as `"cuda:0"`: `memory` is of its memory, and nothing is capped. Unset: here.

    Returns:
        `machine`, `model`, `settings`, `disk` and `rows`, ready for JSON; with `check` also `same_tokens`.

    Raises:
        ConfigError: no such system or argument, or there is no plain checkpoint for it.
        StoreError: the folder is not a repacked checkpoint.
    """
    subject = find_subject(Path(folder), None if plain is None else Path(plain))
    folder, plain, dense = subject.folder, subject.plain, subject.dense_bytes
    wanted = resolve_systems(systems or [USUAL], arguments or {}, check, plain, is_mixture=subject.is_mixture)
    budget, extra = parse_share(memory, dense), parse_bytes(headroom)
    prompts = _random_ids(folder, (batch_size, prompt_tokens), seed)
    follow = _forced(folder, forced, tokens, batch_size)
    job = Job(folder, plain, prompts, tokens, dense, budget, extra, cap and device is None, timeout, calls, follow, device)
    about_machine = machine(folder, device)
    rows, curve = _run_in_turn(job, wanted, repeats, disk_seconds, about_machine)
    report: dict[str, Any] = {
        "machine": about_machine,
        "model": subject.about,
        "settings": {"tokens": tokens, "prompt_tokens": prompt_tokens, "batch_size": batch_size, "calls": list(calls),
                     "memory_bytes": budget,
                     "cap_bytes": budget + extra, "repeats": repeats, "seed": seed, "forced": bool(follow)},
        "notes": list(notes),
        "disk": [vars(point) | {"gb_per_s": point.gb_per_s} for point in curve],
        "rows": rows,
    }  # fmt: skip
    return report | ({"same_tokens": same_tokens(rows, "flash", "flash-uncapped")} if check else {})


def bench_tiny(**settings: Any) -> dict[str, Any]:
    """[`bench`] on a random OPT made for the purpose: seconds on any machine. Shows that it works, not how fast it is."""
    from transformers import OPTConfig, OPTForCausalLM

    with tempfile.TemporaryDirectory(prefix="hf-flash-bench-") as place:
        torch.manual_seed(0)
        model = OPTForCausalLM(OPTConfig(
            vocab_size=96, hidden_size=64, word_embed_proj_dim=64, ffn_dim=1024, num_hidden_layers=4, num_attention_heads=4,
            max_position_embeddings=128, pad_token_id=1, bos_token_id=2, eos_token_id=2, init_std=0.2,
        ))  # fmt: skip
        with torch.no_grad():
            for layer in model.model.decoder.layers:
                layer.fc1.bias.normal_(-3.0, 0.5)
        model.save_pretrained(Path(place) / "plain")
        packed = repack(Path(place) / "plain", Path(place) / "packed")
        defaults: dict[str, Any] = {
            "systems": TINY, "tokens": 12, "prompt_tokens": 4, "memory": "95%", "disk_seconds": 0.02,
        }  # fmt: skip
        return bench(packed, plain=Path(place) / "plain", **defaults | settings)


# --- running ---------------------------------------------------------------------------------------------------------


def _run_in_turn(
    job: Job, systems: Sequence[System], repeats: int, disk_seconds: float, host: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], list[DiskPoint]]:
    """Run all systems one after the other, `repeats` times; the disk is measured before and after each.

    Returns:
        A row for each system, checked against the disk as it was around the run; and the disk's mean curve.
    """
    there = host.get("device", {})
    speeds = there.get("memory_gb_per_s", host["dram_gb_per_s"]), there.get("to_gb_per_s")
    runs: dict[str, list[dict[str, Any]]] = {system.label: [] for system in systems}
    curves = [disk_curve(job.folder, max_seconds=disk_seconds)]
    with tqdm(total=repeats * len(systems), desc="Benchmark", unit="system") as bar:
        for system in [*systems] * repeats:
            bar.set_postfix_str(system.label)
            row = job.run(system)
            curves.append(disk_curve(job.folder, max_seconds=disk_seconds))
            runs[system.label].append(add_checks(row, mean_curve(curves[-2:]), *speeds))
            bar.update()
    return [_median_run(of_one) for of_one in runs.values()], mean_curve(curves)


def _random_ids(folder: Path, shape: tuple[int, int], seed: int) -> list[list[int]]:
    """Random token ids [sequences, tokens], past the special ones."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    vocabulary = (config.get("text_config") or config)["vocab_size"]
    ids: list[list[int]] = np.random.default_rng(seed).integers(4, vocabulary, shape).tolist()
    return ids


_RANDOM: Final = 1 << 13  # tokens at least: with fewer, calls of many would repeat them


def _forced(folder: Path, forced: Sequence[int] | int | None, tokens: int, batch_size: int) -> list[int]:
    """The token ids that are to follow the prompt, or more; none: those that a model chooses."""
    if forced is None:
        return []
    follow = _random_ids(folder, (1, max(tokens, _RANDOM)), forced)[0] if isinstance(forced, int) else list(forced)
    if batch_size > 1 or len(follow) < tokens:
        expected = f"{tokens} tokens for one sequence"
        raise ConfigError("not what can follow the prompt", where="forced", expected=expected, got=f"{len(follow)} tokens")
    return follow


# --- comparing -------------------------------------------------------------------------------------------------------


def _median_run(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The run with the median speed, a failed one being the slowest, and the median time to the first token."""
    ordered = sorted(runs, key=lambda run: run.get("tokens_per_s", 0.0))
    found = ordered[len(ordered) // 2] | {"runs_tokens_per_s": [run.get("tokens_per_s") for run in runs]}
    first = [run["first_token_s"] for run in runs if "first_token_s" in run]
    return found | ({"first_token_s": float(np.median(first)), "runs_first_token_s": first} if "first_token_s" in found else {})


def same_tokens(rows: Sequence[Mapping[str, Any]], one: str, other: str) -> bool | None:
    """Whether two rows generated the same, as far as both came; `None` if one of them failed."""
    first, second = (next(row.get("tokens", []) for row in rows if row["system"] == name) for name in (one, other))
    both = min(len(first), len(second))
    return first[:both] == second[:both] if both else None
