"""Calibrate a model on your own text: predictors that are trained on it, and neurons that go together side by side on flash.

python examples/calibrate_on_your_text.py facebook/opt-1.3b opt-1.3b-flash --text my.txt --samples 256
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM

import hf_flash
from hf_flash import FlashOffloadConfig

HERE = Path(__file__).parent
parser = argparse.ArgumentParser(description="Train predictors on a text, and say how well they do on what was held out.")
parser.add_argument("model", nargs="?", default=str(HERE / "tiny-opt"), help="a folder or Hub repository")
parser.add_argument("folder", nargs="?", type=Path, default=Path("tiny-opt-flash"), help="where it is repacked to")
parser.add_argument("--text", default=str(HERE / "text" / "bible.valid.txt"), help="a UTF-8 file")
parser.add_argument("--samples", type=int, default=64, help="windows of text; more is better (a few hundred)")
parser.add_argument("--memory-budget", help='weights and training in DRAM at most, such as "6GiB"')
args = parser.parse_args()

if not args.folder.exists():
    hf_flash.repack(args.model, args.folder)
report = hf_flash.calibrate(args.folder, args.text, samples=args.samples, memory_budget=args.memory_budget)

for number, layer in enumerate(report["layers"]):
    found = layer["lowrank"]
    print(
        f"layer {number}: {layer['active']:.0f} neurons active, rank {found['rank']} finds {found['recall']:.1%} of them "
        f"and names {found['selected']:.1f} for one"
    )
print(f"the folder's predictor is now: {report['default']}")

for predictor in ("quantized", "lowrank"):
    model = AutoModelForCausalLM.from_pretrained(args.folder, quantization_config=FlashOffloadConfig(predictor=predictor))
    print(f"{predictor}: {hf_flash.stats(model).predictor_bytes} bytes in DRAM")
    hf_flash.close(model)
