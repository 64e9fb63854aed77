#!/usr/bin/env python3
"""Make a SYNTHETIC OPT: the shape of a real one, random weights, and FFN neurons that are used as sparsely as in a trained one.

    scripts/make_synthetic_opt.py OUT --shape 1.3b --profile paper --packed OUT-flash

It says nothing sensible. It is for measuring bytes and milliseconds where the real checkpoint cannot be downloaded: what
offloading costs depends on how many neurons a token uses and how many of them the tokens before it used too, not on what the
model says. So these statistics are built in, then measured, written into the model card, and an error if they are off:

    paper             3 % of the FFN active per token, 24 % of these not used by the 4 tokens before: the paper's OPT-6.7B
    paper-predicted   10 % active, the same 24 %: what a predictor that selects too much would have read

How they come about. Layer norm makes the FFN's input a point on a sphere, and a neuron is active when its row points near
enough to it: the bias, a normal quantile, sets how near, and so the active share. The overlap of tokens is how fast the point
moves, which `embed_positions` decides: an AR(1) walk of unit variance over the positions, mixed with white noise where the
profile wants more neurons in the last tokens' union than a walk gives. Tokens add little, so it holds for any text. The
outputs of attention and FFN are scaled down with depth, until the walk dominates in every layer. The number of active neurons
spreads from token to token by a quarter or so, because few directions decide; biases are set so that the first 256 positions
are right on average in every layer.

The up projections are of low rank exactly, `A [d_ff, rank] @ B [rank, d_model]`, so that a low-rank predictor finds the active
neurons without training and is as good as a well-trained one on a real model. `--packed` writes a flash folder with it.

Random numbers are drawn once, into a pool; other matrices than the up projections are pieces of it at random offsets. Files are
streamed, so memory holds one layer, whatever the size. The embeddings of the four special tokens are zero: greedy
decoding does not stop by itself.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.nn.functional import layer_norm
from transformers import AutoConfig, AutoModelForCausalLM, OPTConfig, OPTForCausalLM
from transformers.models.opt.modeling_opt import OPTDecoderLayer

import hf_flash
from hf_flash.base.files import write_json
from hf_flash.base.folders import check_room, check_target
from hf_flash.base.heap import trim_heap
from hf_flash.base.sizes import format_bytes
from hf_flash.calibration.activity import LONGEST_MEASURED, AggregatedUse, reached_by
from hf_flash.errors import HfFlashError
from hf_flash.packing.checkpoint_folder import list_store, repacked_config
from hf_flash.predictors.lowrank import VARIANT, LowRankFormat, LowRankPredictor, lowrank_specs, pack_lowrank
from hf_flash.store.checkpoint import Checkpoint
from hf_flash.store.layout import FlashStore
from hf_flash.store.names import INDEX_NAME, PREDICTOR_FILE
from hf_flash.store.safetensors_files import TensorSpec
from hf_flash.store.writer import predictor_metadata, write_safetensors

OFFSET = 2  # OPT's position embeddings begin with two rows that no position uses
POSITIONS = 256  # from the first: where the statistics are set, and measured
RANK = 128
STD = 0.02  # of attention's inputs and the up projections, as in OPT's own initialisation
RESIDUAL = 0.1  # all layers together change the walk by so much
TOLERANCE = 0.15
RECALL = 0.995  # share of the active neurons that the predictor is set to find
SPECIAL_TOKENS = 4
SHARD_BYTES = 5_000_000_000
POOL = (1 << 24) + 12_345  # odd, so that rows of pieces that wrap around are not repeated
PIECE = 1 << 22
FACTORS = "synthetic-factors.safetensors"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Profile:
    """What is aimed at, as shares, and the walk that gives it (found by search, on Gaussian processes and on models)."""

    active: float  # of the FFN, per token
    fresh: float  # of a token's active neurons: not used by the 4 tokens before
    union: float  # of the FFN: used by 4 tokens in a row
    rho: float  # the walk's correlation from one position to the next
    jitter: float  # share of the variance that is white noise instead


PROFILES = {
    "paper": Profile(active=0.03, fresh=0.24, union=0.057, rho=0.93, jitter=0.0),
    "paper-predicted": Profile(active=0.10, fresh=0.24, union=0.22, rho=0.985, jitter=0.3),
}


def _shape(d_model: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": d_model, "ffn_dim": 4 * d_model, "num_hidden_layers": layers, "num_attention_heads": heads}
    return sizes | {"word_embed_proj_dim": d_model, "vocab_size": 50272, "max_position_embeddings": 2048} | more


SHAPES = {
    "125m": _shape(768, 12, 12),
    "350m": _shape(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
    "1.3b": _shape(2048, 24, 32),
    "2.7b": _shape(2560, 32, 32),
    "6.7b": _shape(4096, 32, 32),
    "13b": _shape(5120, 40, 40),
    "test": _shape(256, 4, 4, vocab_size=512, max_position_embeddings=320),  # of no real model
}


# --- weights ------------------------------------------------------------------------------------------------------------


class Maker:
    """Gives every tensor of the checkpoint, in pieces.

    Args:
        config: the model's shape.
        dtype: of the tensors.
    """

    def __init__(self, config: OPTConfig, profile: Profile, dtype: torch.dtype, seed: int) -> None:
        self.config, self.profile, self.dtype, self.seed = config, profile, dtype, seed
        self.d_model: int = config.hidden_size
        self.d_ff: int = config.ffn_dim
        self.layers: int = config.num_hidden_layers
        self.rank = min(RANK, self.d_model // 4)
        self._random = torch.Generator().manual_seed(seed)
        self._pool = torch.randn(POOL, generator=self._random).to(dtype)
        self.positions = self._walk(config.max_position_embeddings + OFFSET).to(dtype)

    def _walk(self, rows: int) -> torch.Tensor:
        """`embed_positions` [rows, d_model]."""
        profile, walk = self.profile, torch.randn(rows, self.d_model, generator=self._random)
        for row in range(1, rows):
            walk[row].mul_(math.sqrt(1 - profile.rho**2)).add_(walk[row - 1], alpha=profile.rho)
        noise = torch.randn(rows, self.d_model, generator=self._random)
        return math.sqrt(1 - profile.jitter) * walk + math.sqrt(profile.jitter) * noise

    def factors(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A [d_ff, rank] and B [rank, d_model] of one up projection, bfloat16; rows of A @ B have standard deviation `STD`."""
        random = torch.Generator().manual_seed(1_000_003 * (self.seed + 1) + layer)
        b = torch.randn(self.rank, self.d_model, generator=random) / math.sqrt(self.d_model)
        a = torch.randn(self.d_ff, self.rank, generator=random) * STD * math.sqrt(self.d_model / self.rank)
        return a.bfloat16(), b.bfloat16()

    def threshold(self, layer: int) -> float:
        """The pre-activation that the profile's share of the neurons exceeds, on average over the first positions."""
        x = walk_inputs(self.positions)
        length = (x @ self.factors(layer)[1].float().T).norm(dim=1) / math.sqrt(self.rank)
        spread = length * STD * math.sqrt(self.d_model)  # of the neurons' pre-activations, by position
        low, high = 0.0, 10 * float(spread.max())
        for _ in range(60):
            middle = (low + high) / 2
            share = float(torch.special.ndtr(-middle / spread).mean())
            low, high = (middle, high) if share > self.profile.active else (low, middle)
        return low

    def tensor(self, name: str, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
        """The pieces of one tensor."""
        if name.endswith("embed_positions.weight"):
            yield self.positions
        elif name.endswith("layer_norm.weight"):
            yield torch.ones(shape, dtype=self.dtype)
        elif name.endswith("fc1.bias"):
            yield torch.full(shape, -self.threshold(layer_of(name)), dtype=self.dtype)
        elif name.endswith(".bias"):
            yield torch.zeros(shape, dtype=self.dtype)
        elif name.endswith("fc1.weight"):
            a, b = (factor.float() for factor in self.factors(layer_of(name)))
            rows = max(1, PIECE // self.d_model)
            yield from ((a[at : at + rows] @ b).to(self.dtype) for at in range(0, self.d_ff, rows))
            trim_heap()
        else:
            special = SPECIAL_TOKENS * shape[1] if name.endswith("embed_tokens.weight") else 0
            yield torch.zeros(special, dtype=self.dtype)
            yield from self._drawn(math.prod(shape) - special, self._std(name, shape))

    def _std(self, name: str, shape: tuple[int, ...]) -> float:
        """The standard deviation of a matrix's entries."""
        each = RESIDUAL / math.sqrt(2 * self.layers)  # one sublayer's output
        if name.endswith("embed_tokens.weight"):
            return min(0.1, 2 / math.sqrt(self.d_model))  # with more, a token's own logit would win, and repeat it for ever
        if name.endswith(("project_in.weight", "project_out.weight")):
            return 1 / math.sqrt(shape[1])
        if name.endswith("out_proj.weight"):
            return each / (STD * self.d_model)
        if name.endswith("fc2.weight"):
            return each / (STD * math.sqrt(self.d_model * self.d_ff * relu_square(self.profile.active)))
        return STD

    def _drawn(self, count: int, std: float) -> Iterator[torch.Tensor]:
        """`count` numbers of the pool from a random place on, scaled."""
        at = int(torch.randint(POOL, (1,), generator=self._random))
        while count:
            piece = self._pool[at : at + min(count, PIECE)]
            yield piece * std
            count, at = count - len(piece), (at + len(piece)) % POOL


def layer_of(name: str) -> int:
    """The layer in a tensor's name."""
    return int(name.partition(".layers.")[2].partition(".")[0])


def relu_square(share: float) -> float:
    """The mean square of ReLU(z - q), z standard normal and q exceeded by `share`."""
    q = -float(torch.special.ndtri(torch.tensor(share, dtype=torch.float64)))
    density = math.exp(-q * q / 2) / math.sqrt(2 * math.pi)
    return (1 + q * q) * share - q * density


def walk_inputs(positions: torch.Tensor) -> torch.Tensor:
    """What an FFN is given at the first positions but for the small parts: float32 [positions, d_model]."""
    x = positions[OFFSET : OFFSET + POSITIONS].float()
    return layer_norm(x, x.shape[1:])


def write_checkpoint(folder: Path, maker: Maker, label: dict[str, Any]) -> None:
    """Write a plain checkpoint; config.json, without which nothing loads, comes last."""
    check_target(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        whole = OPTForCausalLM(maker.config).state_dict()
    specs = {name: (maker.dtype, tuple(t.shape)) for name, t in whole.items() if name != "lm_head.weight"}
    write_weights(folder, specs, maker.tensor)
    write_factors(folder / FACTORS, maker)
    config = maker.config.to_dict() | {"architectures": ["OPTForCausalLM"], "dtype": str(maker.dtype).removeprefix("torch.")}
    write_json(folder / "config.json", config | {"synthetic": label})


def write_weights(
    folder: Path, specs: dict[str, TensorSpec], tensor: Callable[[str, tuple[int, ...]], Iterator[torch.Tensor]]
) -> None:
    """Write tensors into one file or several with an index; `tensor` gives the pieces of each."""
    check_room(folder, sum(map(nbytes, specs.values())))
    shards = split(specs)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        pieces = (piece for key, (_, shape) in shard.items() for piece in tensor(key, shape))
        write_safetensors(folder / name, shard, pieces, {"synthetic": "1"})
        weight_map |= dict.fromkeys(shard, name)
    if len(shards) > 1:
        total = sum(map(nbytes, specs.values()))
        write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_factors(path: Path, maker: Maker) -> None:
    """The factors of all up projections: `layers.N.a` and `layers.N.b`."""
    specs: dict[str, TensorSpec] = {}
    for layer in range(maker.layers):
        specs[f"layers.{layer}.a"] = torch.bfloat16, (maker.d_ff, maker.rank)
        specs[f"layers.{layer}.b"] = torch.bfloat16, (maker.rank, maker.d_model)
    pieces = (factor for layer in range(maker.layers) for factor in maker.factors(layer))
    write_safetensors(path, specs, pieces, {"synthetic": "1"})


def nbytes(spec: TensorSpec) -> int:
    """Size of a tensor."""
    return spec[0].itemsize * math.prod(spec[1])


def split(specs: dict[str, TensorSpec]) -> list[dict[str, TensorSpec]]:
    """Specs divided into files of at most `SHARD_BYTES`."""
    shards: list[dict[str, TensorSpec]] = [{}]
    for name, spec in specs.items():
        if shards[-1] and sum(map(nbytes, shards[-1].values())) + nbytes(spec) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = spec
    return shards


# --- measuring ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure(folder: Path, tokens: torch.Tensor, packed: Path | None = None) -> list[dict[str, float]]:
    """Run tokens through the checkpoint's layers, one in memory at a time, in float32; what each layer's neurons do.

    Args:
        tokens: ids of one sequence.
        packed: a flash folder whose low-rank predictor is judged too.
    """
    checkpoint = Checkpoint.open_folder(folder)
    config = AutoConfig.from_pretrained(folder, attn_implementation="sdpa")  # causal without a mask
    store = None if packed is None else FlashStore.open_folder(packed)
    formats = None if store is None else LowRankFormat.of(store)
    hidden = embed(checkpoint, tokens)[None]
    layer, rows = OPTDecoderLayer(config, layer_idx=0).float().eval(), []
    for index in range(config.num_hidden_layers):
        prefix = f"model.decoder.layers.{index}."
        for name, parameter in layer.named_parameters():
            parameter.copy_(checkpoint.tensor(prefix + name))
        seen: list[torch.Tensor] = []
        with layer.fc1.register_forward_hook(lambda _, x, y, seen=seen: seen.extend([x[0], y > 0])):
            hidden = layer(hidden)
        rows.append({"layer": index} | statistics(seen[1]))
        if store is not None and formats is not None:
            rows[-1] |= judge(formats.load(store, store.layers[index], layer.fc1.bias), *seen)
    return rows


def embed(checkpoint: Checkpoint, tokens: torch.Tensor) -> torch.Tensor:
    """What the first layer is given: float32 [tokens, d_model]."""
    words = checkpoint.tensor("model.decoder.embed_tokens.weight")[tokens].float()
    if "model.decoder.project_in.weight" in checkpoint.specs:
        words = words @ checkpoint.tensor("model.decoder.project_in.weight").float().T
    positions = checkpoint.tensor("model.decoder.embed_positions.weight")
    return words + positions[OFFSET : OFFSET + len(tokens)].float()


def statistics(used: torch.Tensor) -> dict[str, float]:
    """Shares of one layer, from bool [tokens, d_ff]."""
    use, count = AggregatedUse(), used.shape[1]
    use.add(used)
    by_tokens = use.total / use.tokens  # neurons used by 1, 2, ... tokens in a row
    active = float(used.float().mean())
    fresh = float((by_tokens[4] - by_tokens[3]) / by_tokens[0])
    spread = float(used.float().mean(1).std()) / active
    figures = {"active": active, "spread": spread, "fresh_of_4": fresh, "union_of_4": float(by_tokens[3] / count)}
    return {key: round(value, 5) for key, value in figures.items()}


def judge(predictor: LowRankPredictor, x: torch.Tensor, active: torch.Tensor) -> dict[str, float]:
    """How a predictor does on a layer's inputs."""
    selected, positives = predictor.select(x.bfloat16()), int(active.sum())
    missed = int((active & ~selected).sum())
    return {"selected_per_active": round(int(selected.sum()) / positives, 4), "missed": round(missed / positives, 5)}


def faults(rows: list[dict[str, float]], profile: Profile) -> list[str]:
    """What is off the profile, one sentence each: the active share in any layer, the others on average."""
    found = []
    for key, wanted in (("active", profile.active), ("fresh_of_4", profile.fresh), ("union_of_4", profile.union)):
        values = {f"layer {row['layer']}": row[key] for row in rows if key == "active"}
        values["all layers"] = mean(rows)[key]
        wrong = {where: got for where, got in values.items() if abs(got / wanted - 1) > TOLERANCE}
        found += [f"{key} is {got:.4f} in {where}, the profile says {wanted}" for where, got in wrong.items()]
    for row in rows:
        if row.get("missed", 0.0) > 0.01:
            found.append(f"the predictor misses {row['missed']:.2%} in layer {row['layer']}")
    return found


def mean(rows: list[dict[str, float]]) -> dict[str, float]:
    """Averages over the layers."""
    return {key: round(sum(row[key] for row in rows) / len(rows), 5) for key in rows[0] if key != "layer"}


# --- the flash folder ---------------------------------------------------------------------------------------------------


def pack(folder: Path, target: Path, predictor: str) -> None:
    """Repack for flash; `lowrank` takes the predictor from the known factors."""
    hf_flash.repack(folder, target, predictor="quantized" if predictor == "quantized" else "none")
    if predictor != VARIANT:
        return
    store = FlashStore.open_folder(target)
    inputs = walk_inputs(Checkpoint.open_folder(target).tensor("model.decoder.embed_positions.weight"))[::4]
    specs: dict[str, TensorSpec] = {}
    with safe_open(folder / FACTORS, framework="pt") as factors:
        rank = factors.get_slice("layers.0.b").get_shape()[0]
        for layer in store.layers:
            specs |= lowrank_specs(layer.prefix, layer.d_ff, layer.d_model, rank)
        pieces = (t for index in range(len(store.layers)) for t in predictor_of(folder, factors, index, inputs).values())
        metadata = predictor_metadata(VARIANT, store.metadata)
        write_safetensors(target / PREDICTOR_FILE.format(VARIANT), specs, pieces, metadata)
    list_store(target)
    config = repacked_config(target)
    config["quantization_config"]["predictor"] = VARIANT
    write_json(target / "config.json", config)


def predictor_of(folder: Path, factors: Any, index: int, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """One layer's predictor: the factors in 8 bits, and a threshold that makes up for what rounding misses."""
    checkpoint, prefix = Checkpoint.open_folder(folder), f"model.decoder.layers.{index}.fc1."
    weight, bias = (checkpoint.tensor(prefix + part).float() for part in ("weight", "bias"))
    active = x @ weight.T + bias > 0
    packed = pack_lowrank(factors.get_tensor(f"layers.{index}.b"), factors.get_tensor(f"layers.{index}.a"), bias)
    predictor = LowRankPredictor(packed)
    threshold = reached_by(RECALL, lambda: [predictor.score(x)[active]])
    packed["offset"] -= threshold or 0.0
    return packed


def try_out(folder: Path, tokens: int = 12) -> dict[str, Any]:
    """Load a flash folder as anybody would, and decode a few tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = torch.tensor([[SPECIAL_TOKENS + 7]])
    model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False)
    stats = hf_flash.stats(model)
    share = stats.counters.selected / stats.counters.calls / stats.d_ff
    found = {"predictor": stats.predictor, "reader": stats.reader, "tokens": stats.tokens, "selected": round(share, 5)}
    found |= {"hit_rate": round(stats.hit_rate, 4), "read_bytes_per_token": round(stats.read_bytes_per_token)}
    hf_flash.close(model)
    return found


# --- the card -----------------------------------------------------------------------------------------------------------

CARD = """---
library_name: transformers
tags: [synthetic, hf_flash]
---

# SYNTHETIC model: random weights in the shape of OPT-{shape}

Not a trained model: it says nothing sensible, and no quality can be measured on it. It is for measuring memory, bytes and time.
Made by `scripts/make_synthetic_opt.py` of hf_flash, profile `{profile}`, seed {seed}, {layers} layers, {dtype}.
Tokens are decided by random logits; greedy decoding never comes upon a special token, so it does not stop by itself.

- `embed_positions` is an AR(1) walk (rho {rho}, share of white noise {jitter}), so tokens in a row use much the same neurons,
  whatever they are. Attention and FFN outputs are scaled down, so that the walk dominates in every layer.
- Up projections have rank {rank} exactly, before rounding to {dtype}: A @ B, with A and B in the plain checkpoint's
  `{factors}`. A low-rank predictor is therefore as accurate as a very well trained one on a real model.
  `fc1.bias` is a normal quantile. Past the first {tokens} positions, the active share differs by up to a fifth between layers.

Measured on {tokens} random tokens, in float32, at the first positions; a FFN has {d_ff} neurons:

{table}

Aimed at: {active:.1%} active, of these {fresh:.0%} not used by the 4 tokens before, union of 4 tokens {union:.1%}.
"""


def table(rows: list[dict[str, float]]) -> str:
    """Markdown; the average comes last."""
    titles = {
        "active": "active",
        "spread": "its spread from token to token",
        "fresh_of_4": "of these, not used by the 4 tokens before",
    }
    titles |= {"union_of_4": "union of 4 tokens", "selected_per_active": "predicted per active neuron", "missed": "missed"}
    keys = [key for key in titles if key in rows[0]]
    lines = ["| layer | " + " | ".join(titles[key] for key in keys) + " |", "|---" * (len(keys) + 1) + "|"]
    for name, row in [*((f"{row['layer']}", row) for row in rows), ("all", mean(rows))]:
        cells = (f"{row[key]:.2f}" if key == "selected_per_active" else f"{row[key]:.2%}" for key in keys)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def describe(folder: Path, report: dict[str, Any]) -> None:
    """Write `synthetic.json` and the model card into a folder."""
    write_json(folder / "synthetic.json", report)
    measured = report["measured"]
    text = CARD.format(
        **report["label"], **report["target"], factors=FACTORS, table=table(measured["layers"]), tokens=measured["tokens"]
    )
    if "loaded" in report:
        text += f"\nLoaded and decoded from once: {report['loaded']}\n"
    (folder / "README.md").write_text(text, encoding="utf-8")


# --- the command --------------------------------------------------------------------------------------------------------


def make(
    out: Path, shape: str, profile: str, *, dtype: str = "bfloat16", seed: int = 0, layers: int | None = None,
    packed: Path | None = None, predictor: str = VARIANT, say: Callable[[str], Any] = print,
) -> dict[str, Any]:  # fmt: skip
    """Write a synthetic checkpoint, and a flash folder of it; returns what `synthetic.json` says, with `faults`."""
    start, target = time.perf_counter(), PROFILES[profile]
    if packed is not None:
        check_target(packed)
    settings = SHAPES[shape] | ({} if layers is None else {"num_hidden_layers": layers})
    config = OPTConfig(**settings, dropout=0.0, pad_token_id=1, bos_token_id=2, eos_token_id=2)
    maker = Maker(config, target, DTYPES[dtype], seed)
    label: dict[str, Any] = {"note": "SYNTHETIC: random weights, not a trained model", "shape": shape, "profile": profile}
    label |= {"seed": seed, "dtype": dtype, "layers": maker.layers, "d_ff": maker.d_ff, "rank": maker.rank}
    write_checkpoint(out, maker, label)
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    say(f"SYNTHETIC OPT-{shape}, {profile}: {format_bytes(size)} written in {time.perf_counter() - start:.0f} s")
    lowrank = packed is not None and predictor == VARIANT
    if packed is not None:
        pack(out, packed, predictor)
        say(f"packed after {time.perf_counter() - start:.0f} s")
    length = min(POSITIONS, config.max_position_embeddings)
    tokens = torch.randint(SPECIAL_TOKENS, config.vocab_size, (length,), generator=torch.Generator().manual_seed(seed + 1))
    rows = measure(out, tokens, packed if lowrank else None)
    wrong = faults(rows, target)
    report: dict[str, Any] = {"synthetic": True, "label": label, "target": asdict(target), "faults": wrong}
    report["measured"] = {"tokens": len(tokens), "left_out_first": LONGEST_MEASURED - 1, "layers": rows, "mean": mean(rows)}
    describe(out, report)
    if packed is not None:
        report["loaded"] = try_out(packed)
        describe(packed, report)
    say(f"measured after {time.perf_counter() - start:.0f} s: {report['measured']['mean']}")
    return report


def main() -> int:
    """The command line; 1 if something failed or the statistics are off the profile."""
    parser = argparse.ArgumentParser(description="Make a synthetic OPT with the sparsity of a real one.")
    shapes = [name for name in SHAPES if name != "test"]
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument("--shape", choices=SHAPES, metavar=f"{{{','.join(shapes)}}}", required=True)
    parser.add_argument("--profile", choices=PROFILES, required=True)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, metavar="N", help="fewer layers than the real model has")
    parser.add_argument("--packed", type=Path, metavar="OUT2", help="also write a flash folder of it")
    parser.add_argument("--predictor", choices=(VARIANT, "quantized", "none"), default=VARIANT, help="of the flash folder")
    args = vars(parser.parse_args())
    try:
        report = make(args.pop("out"), args.pop("shape"), args.pop("profile"), **args)
    except (HfFlashError, OSError) as error:
        print(f"make_synthetic_opt: {error}", file=sys.stderr)
        return 1
    print(table(report["measured"]["layers"]))
    for key in ("loaded", "faults"):
        if report.get(key):
            print(f"{key}: {report[key]}")
    return 1 if report["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
