"""Repack a model and share it: others load the repository with the same lines as any model, once they import hf_flash.

hf auth login          # or HF_TOKEN in the environment
python examples/push.py facebook/opt-1.3b me/opt-1.3b-flash --private
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM

import hf_flash

parser = argparse.ArgumentParser(description="Repack a model and upload it to the Hub.")
parser.add_argument("model", help="a folder or Hub repository, plain")
parser.add_argument("repo_id", help="me/opt-1.3b-flash")
parser.add_argument("--private", action="store_true", help="make a new repository private")
args = parser.parse_args()

with tempfile.TemporaryDirectory() as place:
    folder = hf_flash.repack(args.model, Path(place) / "packed")
    print(hf_flash.push(folder, args.repo_id, private=args.private))

model = AutoModelForCausalLM.from_pretrained(args.repo_id)  # what everybody else does; its files stay in the Hub cache
print(hf_flash.stats(model))
