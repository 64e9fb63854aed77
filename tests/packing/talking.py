"""A small random mixture of experts with the tokenizer of the shipped model, for tests that need text."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.conftest import TINY_OPT

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")


def make_mixture(folder: Path, shards: str = "1GB") -> Path:
    """Save one in `folder`: three layers of eight experts, of which a token uses two."""
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(
        vocab_size=4096, hidden_size=32, intermediate_size=48, moe_intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=8, num_experts_per_tok=2,
        max_position_embeddings=256, pad_token_id=1, bos_token_id=2, eos_token_id=2, initializer_range=0.2,
    ))  # fmt: skip
    model.save_pretrained(folder, max_shard_size=shards)
    for name in TOKENIZER:
        if (TINY_OPT / name).exists():
            shutil.copyfile(TINY_OPT / name, folder / name)
    return folder
