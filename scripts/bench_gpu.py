#!/usr/bin/env python3
"""Everything that is measured on a GPU, in one command: synthetic models in DIR, each compared with its peers there.

    scripts/bench_gpu.py DIR                            OPT-6.7B in fp16 and in bf16, and a mixture of Qwen3-MoE's shape
    scripts/bench_gpu.py DIR --only dense --shape 13b --layers 24 --dtype float16
    scripts/bench_gpu.py DIR --device cpu:0 --shape test --mixture test     the same on the CPU in a GPU's way, to try it out

With half of the weights on the device, and the same tokens for all (--forced):

    stock-ram     stock transformers, the whole model on the device
    accelerate    every decoder layer on disk
    naive         attention on the device, the whole FFN read and copied for every token: what the paper compares with
    none          hf_flash without a predictor
    flash         hf_flash
    flash, host   a mixture, with a quarter on the device and half in this machine's memory

Written are a table for each model, how often flash is faster than each peer, what it spent on disk and bus, and the peak of the
device's memory against the budget; with --json everything. A dense model takes twice its size on the disk, and is removed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_flash.base.sizes import format_bytes
from hf_flash.bench.report import describe
from hf_flash.bench.run import bench
from hf_flash.bench.systems import System
from hf_flash.commands.arguments import say

SCRIPTS = Path(__file__).resolve().parent
PEERS = ("stock-ram", "accelerate", "naive")
MIXTURE_PEERS = PEERS[:2]  # whose experts nobody would copy for every token


def dense(args: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """A sparse OPT: the paper's case."""
    plain, packed = args.dir / f"opt-{args.shape}-{dtype}", args.dir / f"opt-{args.shape}-{dtype}-flash"
    try:
        make("make_synthetic_opt.py", plain, "--shape", args.shape, "--profile", "paper", "--dtype", dtype,
             "--packed", packed, "--predictor", args.predictor, *layers(args))  # fmt: skip
        return compare(args, packed, [*PEERS, "none", "flash"], plain=plain, forced=1)
    finally:
        for folder in (plain, packed):
            shutil.rmtree(folder, ignore_errors=True)


def mixture(args: argparse.Namespace) -> dict[str, Any]:
    """A mixture of experts, with one tier and with two."""
    folder = args.dir / f"moe-{args.mixture}"
    try:
        make("make_synthetic_moe.py", folder, "--shape", args.mixture, *layers(args))
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        behind = System("flash, host", arguments={"memory_budget": {args.device: int(args.tight * size), "cpu": size // 2}})
        forced = json.loads((folder / "tokens.json").read_text(encoding="utf-8"))
        return compare(args, folder, [*MIXTURE_PEERS, "flash", behind], forced=forced)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def make(script: str, *arguments: object) -> None:
    subprocess.run([sys.executable, str(SCRIPTS / script), *map(str, arguments)], check=True)


def layers(args: argparse.Namespace) -> list[str]:
    return [] if args.layers is None else ["--layers", str(args.layers)]


def compare(args: argparse.Namespace, folder: Path, systems: list[str | System], **arguments: Any) -> dict[str, Any]:
    report = bench(
        folder, systems=systems, device=args.device, memory=args.memory, tokens=args.tokens, repeats=args.repeats,
        calls=[(1, 1), (4, 1), (1, 256)], **arguments,
    )  # fmt: skip
    say(describe(report))
    print("\n".join(summary(report)), flush=True)
    return report


def summary(report: dict[str, Any]) -> Iterator[str]:
    """How often a row is as fast as its peers, where a token's time went, and the memory."""
    done = {row["system"]: row for row in report["rows"] if "failed" not in row}
    for name, row in done.items():
        if "stats" not in row:
            continue
        found = [f"{row['tokens_per_s'] / done[peer]['tokens_per_s']:.2f} x {peer}" for peer in PEERS if peer in done]
        yield f"{name}: {', '.join(found) or 'no peer to compare with'}"
        io, bus = row["parts_ms"]["io"], row["bus_ms"]
        yield f"  a token: {io:.2f} ms waiting for the disk, {row['mean_ms'] - io:.2f} else; its bytes take {bus:.2f} of bus"
        peak, stats = row["device_peak_bytes"], row["stats"]
        held = f"{format_bytes(stats['dram_bytes'])} of weights in a budget of {format_bytes(stats['budget_bytes'])}"
        yield f"  {held}" + ("" if peak is None else f"; peak with activations and KV cache {format_bytes(peak)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("dir", type=Path, metavar="DIR", help="where models are made, and removed again")
    add("--device", default="cuda:0", help="where all systems compute (default: cuda:0)")
    add("--only", choices=["dense", "mixture"], help="one kind of model")
    add("--shape", default="6.7b", help="of the dense model (default: 6.7b)")
    add("--mixture", default="qwen3-moe", help="shape of the mixture (default: qwen3-moe)")
    add("--layers", type=int, metavar="N", help="fewer layers than the shapes have")
    add("--dtype", nargs="+", default=["float16", "bfloat16"], help="of the dense model")
    add("--predictor", default="lowrank", choices=["lowrank", "quantized"], help="of the dense model")
    add("--memory", default="50%", help="of the device, for weights (default: 50%%)")
    add("--tight", type=float, default=0.25, metavar="SHARE", help="of a mixture on the device, where the host has half")
    add("--tokens", type=int, default=32)
    add("--repeats", type=int, default=1)
    add("--json", type=Path, metavar="FILE", help="write all reports")
    args = parser.parse_args()
    args.dir.mkdir(parents=True, exist_ok=True)
    reports = [dense(args, dtype) for dtype in args.dtype] if args.only != "mixture" else []
    reports += [mixture(args)] if args.only != "dense" else []
    if args.json:
        args.json.write_text(json.dumps(reports, indent=1), encoding="utf-8")
    return 1 if any("failed" in row for report in reports for row in report["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
