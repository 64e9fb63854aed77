"""Repack a model once; from then on its folder is all that a pipeline needs.

python examples/pipeline.py facebook/opt-1.3b opt-1.3b-flash
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import pipeline

import hf_flash  # registers the method: needed wherever a repacked folder is loaded

parser = argparse.ArgumentParser(description="A text-generation pipeline whose model has its FFN on flash.")
parser.add_argument("model", nargs="?", default=str(Path(__file__).parent / "tiny-opt"), help="a folder or Hub repository")
parser.add_argument("folder", nargs="?", type=Path, default=Path("tiny-opt-flash"), help="where it is repacked to")
parser.add_argument("--prompts", nargs="+", default=["In the beginning", "And the king said"], help="texts to continue")
args = parser.parse_args()

if not args.folder.exists():
    hf_flash.repack(args.model, args.folder)

generate = pipeline("text-generation", model=str(args.folder), device="cpu")  # where the FFN computes
for (answer,) in generate(args.prompts, max_new_tokens=30, do_sample=False):
    print(answer["generated_text"], end="\n\n")
print(hf_flash.stats(generate))
