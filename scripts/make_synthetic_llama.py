#!/usr/bin/env python3
"""Make a SYNTHETIC Llama: the shape of a real one, random weights, and a gate that leaves as few neurons as a trained one does.

    scripts/make_synthetic_llama.py OUT --shape 7b --layers 8 --packed OUT-flash
    scripts/make_synthetic_llama.py OUT --shape 7b --layers 8 --activation silu --packed OUT-flash

As `make_synthetic_opt.py` it is for measuring bytes and milliseconds, and says nothing sensible. With `--activation relu` (or
`relu2`) 3 % of the FFN are active per token, and 24 % of these were not used by the 4 tokens before: what the paper measured on
OPT-6.7B. (ReluLLaMA itself is denser.) With `silu` there is nothing to aim at: every neuron is used.

How it comes about. A token's embedding is a fixed direction u, a fixed direction s and a direction of its own. Gate rows are
random, less a multiple of u: that is the threshold, which Llama has no bias for. How much of the embedding is s decides how
many neurons tokens share. These are the same ones for the whole text, not a set that drifts as in the OPT: a window learns them
sooner. The outputs of attention and FFN are small, so that it holds in every layer.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from make_synthetic_opt import PROFILES, RESIDUAL, TOLERANCE, mean, relu_square, statistics, table, write_weights
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hf_flash
from hf_flash import FlashOffloadConfig
from hf_flash.base.files import write_json
from hf_flash.base.folders import check_target
from hf_flash.compute.arithmetic import Values
from hf_flash.errors import HfFlashError
from hf_flash.runtime.model import find_runtime
from hf_flash.runtime.observing import observed

SHAPES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
           "num_key_value_heads": 4},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "test": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 3, "num_attention_heads": 4},
}  # fmt: skip
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
PROFILE = PROFILES["paper"]
U = 0.6  # share of u in the norm of an embedding
STD = 0.02
END = 2  # the token that would end a text: its logit is zero, so another is always larger
MEASURED_TOKENS = 200
PIECE = 1 << 22


def shared_part() -> float:
    """Which part of the variance of pre-activations all tokens must have in common for the profile's fresh neurons."""
    grid = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    weight = torch.exp(-grid.square() / 2)
    q = -torch.special.ndtri(torch.tensor(PROFILE.active, dtype=torch.float64))
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        active = torch.special.ndtr((math.sqrt(middle) * grid - q) / math.sqrt(1 - middle))
        fresh = float((weight * active * (1 - active) ** 4).sum() / (weight * active).sum())
        low, high = (middle, high) if fresh > PROFILE.fresh else (low, middle)
    return low


class Maker:
    """Gives every tensor of the checkpoint, in pieces."""

    def __init__(self, config: LlamaConfig, dtype: torch.dtype, seed: int) -> None:
        self.config, self.dtype, self.d_model = config, dtype, config.hidden_size
        self._random = torch.Generator().manual_seed(seed)
        self._u, self._s = torch.linalg.qr(torch.randn(self.d_model, 2, generator=self._random))[0].T
        shared = (1 - U**2) * shared_part()
        self._parts = U, math.sqrt(shared), math.sqrt(1 - U**2 - shared)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
        """The pieces of one tensor."""
        if len(shape) == 1:
            yield torch.ones(shape, dtype=self.dtype)
            return
        std, rows = self._std(name, shape), max(1, PIECE // shape[1])
        for at in range(0, shape[0], rows):
            piece = torch.randn(min(rows, shape[0] - at), shape[1], generator=self._random)
            if name.endswith("embed_tokens.weight"):
                u, s, own = self._parts
                piece = math.sqrt(self.d_model) * (u * self._u + s * self._s) + own * piece
            elif name.endswith("gate_proj.weight"):
                piece = std * (piece - piece @ self._u[:, None] * self._u - self._threshold() * self._u)
            else:
                piece *= std
                if name.endswith("lm_head.weight") and at <= END < at + rows:
                    piece[END - at] = 0
            yield piece.to(self.dtype)

    def _threshold(self) -> float:
        """How much of u a gate row is less, in multiples of its standard deviation."""
        q = -float(torch.special.ndtri(torch.tensor(PROFILE.active, dtype=torch.float64)))
        return q * math.sqrt(1 - U**2) / U if self.config.hidden_act != "silu" else 0.0

    def _std(self, name: str, shape: tuple[int, ...]) -> float:
        each = RESIDUAL / math.sqrt(2 * self.config.num_hidden_layers)  # one sublayer's output
        if name.endswith("o_proj.weight"):
            return each / (STD * self.d_model)
        if name.endswith("down_proj.weight"):
            squares = 0.36 if self.config.hidden_act == "silu" else relu_square(PROFILE.active)
            return each / (STD**2 * self.d_model * math.sqrt(shape[1] * squares))
        return STD


def write_checkpoint(folder: Path, maker: Maker) -> None:
    """Write a plain checkpoint; config.json, without which nothing loads, comes last."""
    check_target(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        specs = {name: (maker.dtype, tuple(t.shape)) for name, t in LlamaForCausalLM(maker.config).state_dict().items()}
    write_weights(folder, specs, maker.tensor)
    dtype = str(maker.dtype).removeprefix("torch.")
    write_json(folder / "config.json", maker.config.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": dtype})


@torch.no_grad()
def measure(folder: Path, tokens: torch.Tensor) -> list[dict[str, float]]:
    """What each layer's neurons do, through all layers of the flash model, every neuron computed."""
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=FlashOffloadConfig(predictor="none"))
    rows: list[dict[str, float]] = []
    for ffn in find_runtime(model).ffns:

        def record(_: torch.Tensor, found: Values, at: int = ffn.index) -> None:
            rows.append({"layer": at} | statistics(found.before > 0))

        with observed(ffn, record):
            model(tokens[None], use_cache=False)
    hf_flash.close(model)
    return rows


def faults(rows: list[dict[str, float]]) -> list[str]:
    """What is off the profile on average over the layers, which differ more than those of the OPT."""
    wanted = {"active": PROFILE.active, "fresh_of_4": PROFILE.fresh}
    found = {key: (mean(rows)[key], aim) for key, aim in wanted.items()}
    return [f"{key} is {got}, not {aim}" for key, (got, aim) in found.items() if abs(got / aim - 1) > TOLERANCE]


def make(
    out: Path, shape: str, packed: Path, *, activation: str = "relu", dtype: str = "bfloat16", seed: int = 0,
    layers: int | None = None,
) -> list[str]:  # fmt: skip
    """Write a synthetic checkpoint, and a flash folder of it; returns what is off the profile."""
    check_target(packed)
    sizes: dict[str, Any] = SHAPES[shape] | ({} if layers is None else {"num_hidden_layers": layers})
    config = LlamaConfig(**sizes, hidden_act=activation, vocab_size=32000 if shape != "test" else 500, eos_token_id=END)
    write_checkpoint(out, Maker(config, DTYPES[dtype], seed))
    hf_flash.repack(out, packed)
    if activation == "silu":
        return []
    tokens = torch.randint(END + 1, config.vocab_size, (MEASURED_TOKENS,), generator=torch.Generator().manual_seed(seed + 1))
    rows = measure(packed, tokens)
    print(table(rows))
    write_json(packed / "synthetic.json", {"synthetic": True, "shape": shape, "measured": rows, "faults": faults(rows)})
    return faults(rows)


def main() -> int:
    """The command line; 1 if something failed or the statistics are off the profile."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--activation", choices=("relu", "relu2", "silu"), default="relu")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, metavar="N", help="fewer layers than the real model has")
    parser.add_argument("--packed", type=Path, metavar="OUT2", required=True, help="the flash folder of it")
    args = vars(parser.parse_args())
    try:
        wrong = make(args.pop("out"), args.pop("shape"), args.pop("packed"), **args)
    except (HfFlashError, OSError) as error:
        print(f"make_synthetic_llama: {error}", file=sys.stderr)
        return 1
    print("\n".join(wrong) or "as aimed at")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
