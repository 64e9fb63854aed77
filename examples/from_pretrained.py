"""Any OPT checkpoint, with its FFN on flash: `from_pretrained` with one argument more.

python examples/from_pretrained.py facebook/opt-1.3b --memory-budget 2GiB
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_flash
from hf_flash import FlashOffloadConfig

parser = argparse.ArgumentParser(description="Generate with the FFN of a model on flash.")
parser.add_argument("model", nargs="?", default=str(Path(__file__).parent / "tiny-opt"), help="a folder or Hub repository")
parser.add_argument("--memory-budget", help='weights in DRAM at most, such as "6GiB"; default: what is free')
parser.add_argument("--prompt", default="In the beginning", help="text to continue")
parser.add_argument("--max-new-tokens", type=int, default=40)
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(
    args.model, quantization_config=FlashOffloadConfig(memory_budget=args.memory_budget)
)

inputs = tokenizer(args.prompt, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=args.max_new_tokens)
print(tokenizer.decode(output[0], skip_special_tokens=True))
print()
print(hf_flash.stats(model))
