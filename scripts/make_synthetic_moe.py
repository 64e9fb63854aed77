#!/usr/bin/env python3
"""Make a SYNTHETIC mixture of experts: shape and files of a real one, random weights, experts reused as by a trained one.

    scripts/make_synthetic_moe.py OUT --shape qwen3-moe [--layers N] [--experts E] [--locality 0.5]
    scripts/make_synthetic_moe.py OUT --shape gpt-oss --layers 6

As `make_synthetic_opt.py` it is for measuring bytes and milliseconds, and says nothing sensible. The tensors have the names,
shapes and dtypes that they have on the Hub, in shards of 2 GB. What is not cut by an option is the real model's, but for
qwen3-moe, which is cut to 8 layers, 64 experts and 32 000 words (5.4 GB), and mixtral, cut to 2 layers. The experts of gpt-oss
are in mxfp4. The shapes `test*` are tiny.

Random weights route random tokens to random experts: a token shares k of E with the one before, by chance. Real texts reuse
40 to 60 %. So OUT/tokens.json has a text, a list of token ids to force, in which tokens reuse the share --locality:

    A token's embedding is a direction of its topic and one of its own; topic = id % TOPICS. The text stays in a topic for 20
    tokens on average. How much of an embedding is the topic's decides how many experts two tokens of a topic share.
    Layers change the hidden state, and with it what routers see of the topic; so routers of later layers look harder at it.

With --locality 0 the embeddings have no topics. Random ids reuse experts by chance on any of these models. Afterwards the text
is run through the checkpoint, one expert in memory at a time, and for each layer it is printed which share of a token's experts

    reused     the token before used
    of_4       one of the 4 tokens before used
    guessed    this layer's router names on what the router of the layer before was given

CHANGE is such that `guessed` is about 75 %, as in real models. The tokens a model generates by itself do not follow topics.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.nn.functional import linear, silu
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from hf_flash.base.files import write_json
from hf_flash.base.folders import check_room, check_target
from hf_flash.base.heap import trim_heap
from hf_flash.errors import HfFlashError

END = 2  # the token that would end a text: its logit is zero, so another is always larger
STD = 0.02
ROUTER = 1.5  # standard deviation of a router's logits
CHANGE = 0.15  # a layer adds this share of the variance that its input has
KEPT = 0.25  # and this much of what it adds is alike for two tokens of a topic
TOPICS = 32
STAY = 0.95  # how often the next token is of the same topic
TOKENS = 1024
MEASURED_TOKENS = 256
DRAWS = 4000
SHARD_BYTES = 2_000_000_000
PIECE = 1 << 22
FP4_RMS = math.sqrt(sum(value**2 for value in (0, 0.5, 1, 1.5, 2, 3, 4, 6)) / 8)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SAFETENSORS = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.uint8: "U8"}
NOT_MXFP4 = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
Spec = tuple[torch.dtype, tuple[int, ...]]


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """What most experts compute between their matrices."""
    return silu(gate) * up


def clamped_swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """What those of gpt-oss compute."""
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


@dataclass(frozen=True)
class Family:
    """How the Hub stores a family's experts."""

    block: str = "mlp"  # in a layer
    parts: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")  # of each expert; none: all experts packed in mxfp4
    router: str = "gate"
    width: str = "intermediate_size"  # the config's key
    act: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = swiglu


FAMILIES = {
    "qwen3_moe": Family(width="moe_intermediate_size"),
    "mixtral": Family(block="block_sparse_moe", parts=("w1", "w3", "w2")),
    "gpt_oss": Family(parts=(), router="router", act=clamped_swiglu),
}
QWEN = {"model_type": "qwen3_moe", "intermediate_size": 4096, "norm_topk_prob": True, "max_position_embeddings": 4096,
        "rope_theta": 1e6, "head_dim": 128, "num_key_value_heads": 4, "vocab_size": 32000}  # fmt: skip
GPT_OSS = {"model_type": "gpt_oss", "num_local_experts": 32, "num_hidden_layers": 24, "eos_token_id": 200002,
           "pad_token_id": 199999}  # fmt: skip
TINY = {"hidden_size": 256, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 512, "eos_token_id": END, "pad_token_id": 0}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-moe": QWEN | {"num_hidden_layers": 8, "num_experts": 64, "num_experts_per_tok": 8},
    "mixtral": {"model_type": "mixtral", "num_hidden_layers": 2},
    "gpt-oss": GPT_OSS,
    "test": QWEN | TINY | {"moe_intermediate_size": 64, "num_experts": 16, "num_experts_per_tok": 4},
    "test-mixtral": {"model_type": "mixtral"} | TINY,
    "test-gpt-oss": GPT_OSS | TINY | {"num_local_experts": 16},
}


def make_config(shape: str, layers: int | None, experts: int | None) -> Any:
    """The config of a shape, cut down."""
    given = {"num_hidden_layers": layers, "num_experts": experts, "num_local_experts": experts}
    values = dict(SHAPES[shape])
    values |= {key: value for key, value in given.items() if value is not None and (key in values or key != "num_experts")}
    defaults = {"bos_token_id": 1, "eos_token_id": END, "tie_word_embeddings": False}
    return AutoConfig.for_model(**{**defaults, **values})


# --- locality -----------------------------------------------------------------------------------------------------------


def shared(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Which of the experts `one` [tokens, k] are among `other` [tokens, any]: bool [tokens, k]."""
    return (one[:, :, None] == other[:, None, :]).any(2)


def correlation(locality: float, experts: int, k: int) -> float:
    """How alike the inputs of two tokens of a topic must be, for tokens in a row to share so many of their experts."""
    random = torch.Generator().manual_seed(0)
    first, noise = torch.randn(2, DRAWS, experts, generator=random)
    wanted = (locality - (1 - STAY) * k / experts) / STAY  # of tokens of a topic; others share some by chance
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        second = middle * first + math.sqrt(1 - middle**2) * noise
        share = float(shared(second.topk(k).indices, first.topk(k).indices).float().mean())
        low, high = (middle, high) if share < wanted else (low, middle)
    return low if locality > k / experts else 0.0


def make_text(config: Any, topics: bool, count: int, random: torch.Generator) -> list[int]:
    """Token ids, past the special ones: any, or such that stay in a topic for a while."""
    usable = config.vocab_size - config.vocab_size % TOPICS
    ids = torch.randint(TOPICS, usable, (count,), generator=random)
    if topics:
        moves = torch.rand(count, generator=random) >= STAY
        topic = torch.randint(TOPICS, (count,), generator=random)[moves.cumsum(0)]
        ids = ids - ids % TOPICS + topic
    return ids.tolist()


# --- weights ------------------------------------------------------------------------------------------------------------


class Maker:
    """Gives every tensor of the checkpoint, in pieces.

    Args:
        dtype: of the tensors that are not packed.
        locality: share of a token's experts that the token before uses.
    """

    def __init__(self, config: Any, dtype: torch.dtype, locality: float, seed: int) -> None:
        self.config, self.dtype, self.d_model = config, dtype, config.hidden_size
        self.family = FAMILIES[config.model_type]
        self.random = torch.Generator().manual_seed(seed)
        self.alike = correlation(locality, config.num_experts, config.num_experts_per_tok)
        self.topics = torch.linalg.qr(torch.randn(self.d_model, TOPICS, generator=self.random))[0].T * math.sqrt(self.d_model)
        gate, up = STD * math.sqrt(self.d_model) * torch.randn(2, 1 << 16, generator=self.random)
        self._gated = float(self.family.act(gate, up).square().mean().sqrt())

    def specs(self) -> dict[str, Spec]:
        """Dtype and shape of every tensor, as on the Hub."""
        with torch.device("meta"):
            whole = AutoModelForCausalLM.from_config(self.config).state_dict()
        found: dict[str, Spec] = {}
        for name, tensor in whole.items():
            place, experts, part = name.replace(".mlp.", f".{self.family.block}.").partition(".experts.")
            if not experts or part.endswith("_bias"):
                found[name if experts else place] = self.dtype, tuple(tensor.shape)
            else:
                found |= self._experts(place + experts, part, tuple(tensor.shape))
        return found

    def _experts(self, place: str, part: str, shape: tuple[int, ...]) -> dict[str, Spec]:
        """One fused matrix of transformers as the Hub has it."""
        if not self.family.parts:
            count, inputs, outputs = shape
            blocks = (count, outputs, inputs // 32)
            return {f"{place}{part}_blocks": (torch.uint8, (*blocks, 16)), f"{place}{part}_scales": (torch.uint8, blocks)}
        gate, up, down = self.family.parts
        parts, rows = ((down,), shape[1]) if part == "down_proj" else ((gate, up), shape[1] // 2)
        names = (f"{place}{expert}.{name}.weight" for expert in range(shape[0]) for name in parts)
        return dict.fromkeys(names, (self.dtype, (rows, shape[2])))

    def tensor(self, name: str, spec: Spec) -> Iterator[torch.Tensor]:
        """The pieces of one tensor."""
        dtype, shape = spec
        if name.endswith("norm.weight"):
            yield torch.ones(shape, dtype=dtype)
            return
        rows = max(1, PIECE // shape[-1])
        count = math.prod(shape[:-1])
        for at in range(0, count, rows):
            size = min(rows, count - at), shape[-1]
            yield self._packed(name, size) if dtype == torch.uint8 else self._piece(name, at, size).to(dtype)

    def _piece(self, name: str, at: int, size: tuple[int, int]) -> torch.Tensor:
        """Rows of a matrix from `at` on."""
        piece = torch.randn(size, generator=self.random)
        if name.endswith("embed_tokens.weight"):
            topic = self.topics[torch.arange(at, at + size[0]) % TOPICS]
            return piece.mul_(math.sqrt(1 - self.alike)).add_(topic, alpha=math.sqrt(self.alike))
        if self._routes(name):
            return self._router(layer_of(name), piece)
        piece *= self._std(name, size[1])
        if name == "lm_head.weight" and at <= END < at + size[0]:
            piece[END - at] = 0
        return piece

    def _packed(self, name: str, size: tuple[int, int]) -> torch.Tensor:
        """Pieces of mxfp4: pairs of 4 bits, or exponents of two, mixed so that the numbers have the right deviation."""
        if name.endswith("_blocks"):
            return torch.randint(256, size, dtype=torch.uint8, generator=self.random)
        aim = self._std(name.removesuffix("_scales"), self._width) / FP4_RMS
        exponent = math.floor(math.log2(aim))
        more = (aim**2 / 4**exponent - 1) / 3
        higher = torch.rand(size, generator=self.random) < more
        exponents: torch.Tensor = 127 + exponent + higher
        return exponents.to(torch.uint8)

    def _routes(self, name: str) -> bool:
        return name.endswith(f".{self.family.block}.{self.family.router}.weight")

    @property
    def _width(self) -> int:
        width: int = getattr(self.config, self.family.width)
        return width

    def _std(self, name: str, columns: int) -> float:
        """The standard deviation of a matrix's entries; those that write into the hidden state add what a layer shall."""
        down = (f".{self.family.parts[2]}.weight",) if self.family.parts else ("down_proj",)
        if name.endswith("o_proj.weight"):
            return self._each(name) / (STD * math.sqrt(self.d_model * columns))
        if name.endswith(down):
            return self._each(name) * math.sqrt(self.config.num_experts_per_tok / columns) / self._gated
        return STD

    def _each(self, name: str) -> float:
        """What the experts of a layer add to an entry of the hidden state; and attention, before it takes an average."""
        return math.sqrt(CHANGE * (1 + CHANGE) ** layer_of(name))

    def _router(self, layer: int, piece: torch.Tensor) -> torch.Tensor:
        """Rows of a router: random, with more of the topics where less of the input is one."""
        unit = self.topics / math.sqrt(self.d_model)
        left = (1 + CHANGE) ** -layer  # of the input's variance, what comes from the embedding
        added, left = (1 - left) * KEPT, left * self.alike
        spread = TOPICS / self.d_model
        topics, others = left * (1 - self.alike), self.alike * (1 - left)
        wanted = (others * (1 - spread) - added) / max(topics - others * spread, 1e-9)
        gain = math.sqrt(min(max(wanted, 0.0), 100.0)) if self.alike else 1.0
        piece = piece + (gain - 1) * (piece @ unit.T) @ unit
        seen = left * gain**2 + (1 - left) * (1 + (gain**2 - 1) * spread)
        return ROUTER / math.sqrt(self.d_model * seen) * piece


def layer_of(name: str) -> int:
    """The layer in a tensor's name."""
    match = re.search(r"\.layers\.(\d+)\.", name)
    assert match
    return int(match[1])


def nbytes(spec: Spec) -> int:
    """Size of a tensor."""
    return spec[0].itemsize * math.prod(spec[1])


def write_checkpoint(folder: Path, maker: Maker) -> None:
    """Write shards and index; config.json, without which nothing loads, comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    specs = maker.specs()
    check_room(folder, sum(map(nbytes, specs.values())))
    shards: list[dict[str, Spec]] = [{}]
    filled = 0
    for name, spec in specs.items():
        if filled + nbytes(spec) > SHARD_BYTES and shards[-1]:
            shards.append({})
            filled = 0
        shards[-1][name] = spec
        filled += nbytes(spec)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_shard(folder / file, shard, maker)
        weight_map |= dict.fromkeys(shard, file)
        print(f"{file}: {sum(map(nbytes, shard.values())) / 1e9:.2f} GB", file=sys.stderr)
    total = sum(map(nbytes, specs.values()))
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(folder / "config.json", hub_config(maker.config, maker.dtype))


def hub_config(config: Any, dtype: torch.dtype) -> dict[str, Any]:
    """What config.json says, with the keys of the Hub's files where transformers has renamed them."""
    with torch.device("meta"):
        name = type(AutoModelForCausalLM.from_config(config)).__name__
    found: dict[str, Any] = config.to_dict() | {"architectures": [name], "dtype": str(dtype).removeprefix("torch.")}
    rope = found.pop("rope_parameters")
    found["rope_theta"] = rope.pop("rope_theta")
    found["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    if config.model_type == "qwen3_moe":
        found["num_experts"] = found.pop("num_local_experts")
    if not FAMILIES[config.model_type].parts:
        found["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": NOT_MXFP4}
    return found


def write_shard(path: Path, shard: dict[str, Spec], maker: Maker) -> None:
    """Stream a shard as the library of safetensors lays it out: larger dtypes first, then by name, no gaps, no pages."""
    order = sorted(shard, key=lambda name: (-shard[name][0].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "synthetic": "1"}}
    end = 0
    for name in order:
        start, end = end, end + nbytes(shard[name])
        header[name] = {"dtype": SAFETENSORS[shard[name][0]], "shape": list(shard[name][1]), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            for piece in maker.tensor(name, shard[name]):
                file.write(piece.contiguous().view(-1).view(torch.uint8).numpy().data)


# --- measuring ----------------------------------------------------------------------------------------------------------


class Weights:
    """Tensors of a checkpoint by name, read when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.where: dict[str, str] = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]

    def __call__(self, name: str, rows: int | list[int] | None = None) -> torch.Tensor:
        """A tensor, or some of its rows."""
        with safe_open(self._folder / self.where[name], "pt") as file:
            if rows is None:
                found: torch.Tensor = file.get_tensor(name)
                return found
            part = file.get_slice(name)
            return part[rows] if isinstance(rows, int) else torch.stack([part[row] for row in rows])


class Routed(torch.nn.Module):
    """The experts of a layer, one in memory at a time. Afterwards `x` is the router's input, `used` [tokens, k] its choice."""

    def __init__(self, weights: Weights, layer: int, config: Any) -> None:
        super().__init__()
        self.family = FAMILIES[config.model_type]
        self.place, self.k, self.weights = f"model.layers.{layer}.{self.family.block}.", config.num_experts_per_tok, weights
        router = f"{self.place}{self.family.router}."
        self.router = weights(router + "weight")
        self.bias = weights(router + "bias") if router + "bias" in weights.where else None
        self.x = self.used = torch.empty(0)

    def choose(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Shares and ids of each token's experts."""
        top = linear(x, self.router, self.bias).float().topk(self.k)
        return top.values.softmax(1), top.indices

    def forward(self, hidden: torch.Tensor) -> Any:
        """As the layer's own block does it."""
        self.x = hidden[0]
        shares, self.used = self.choose(self.x)
        out = torch.zeros_like(self.x)
        for expert in sorted(set(self.used.flatten().tolist())):
            tokens, slots = (self.used == expert).nonzero(as_tuple=True)
            value = self._expert(expert, self.x[tokens]) * shares[tokens, slots, None]
            out.index_add_(0, tokens, value.to(out.dtype))
            trim_heap()
        return out[None] if self.family.parts else (out[None], None)

    def _expert(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        place = f"{self.place}experts."
        if self.family.parts:
            gate, up, down = (self.weights(f"{place}{expert}.{part}.weight") for part in self.family.parts)
            return linear(self.family.act(linear(x, gate), linear(x, up)), down)
        both = self._packed(place + "gate_up_proj", expert, x)
        return self._packed(place + "down_proj", expert, self.family.act(both[:, ::2], both[:, 1::2]))

    def _packed(self, name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
        blocks, scales = (self.weights(f"{name}_{kind}", expert)[None] for kind in ("blocks", "scales"))
        matrix = convert_moe_packed_tensors(blocks, scales, dtype=x.dtype)[0]
        return torch.addmm(self.weights(name + "_bias", expert), x, matrix)


@torch.no_grad()
def measure(folder: Path, text: list[int]) -> list[dict[str, float]]:
    """Run a text through the checkpoint's layers: how each layer's router chooses."""
    weights, config = Weights(folder), AutoConfig.from_pretrained(folder)
    dtype = config.dtype
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype).model
    hidden = weights("model.embed_tokens.weight", text)[None]
    places = torch.arange(len(text))
    ago = places[:, None] - places
    rotary = type(model.rotary_emb)(config)(hidden, places[None])
    rows: list[dict[str, float]] = []
    before: Routed | None = None
    for index, layer in enumerate(model.layers):
        layer.mlp = Routed(weights, index, config)
        names = [name for name in layer.state_dict() if not name.startswith("mlp.")]
        layer.load_state_dict({name: weights(f"model.layers.{index}.{name}") for name in names}, assign=True)
        window = getattr(layer.self_attn, "sliding_window", None) or len(text)
        mask = torch.where((ago >= 0) & (ago < window), 0.0, torch.finfo(dtype).min).to(dtype)[None, None]
        hidden = layer(hidden, attention_mask=mask, position_ids=places[None], position_embeddings=rotary)
        rows.append({"layer": index} | statistics(layer.mlp, before, config.num_experts))
        before = layer.mlp
        model.layers[index] = torch.nn.Identity()
    return rows


def statistics(routed: Routed, before: Routed | None, experts: int) -> dict[str, float]:
    """Shares of a layer's choices."""
    used = routed.used
    last_4 = torch.cat([used[4 - ago : len(used) - ago] for ago in range(1, 5)], 1)
    found = {"reused": shared(used[1:], used[:-1]), "of_4": shared(used[4:], last_4)}
    if before is not None:
        found["guessed"] = shared(used, routed.choose(before.x)[1])
    figures = {key: round(float(value.float().mean()), 4) for key, value in found.items()}
    return figures | {"experts": round(len(set(used.flatten().tolist())) / experts, 4)}


def table(rows: list[dict[str, float]]) -> str:
    """Markdown; the average comes last."""
    keys = ("reused", "of_4", "guessed", "experts")
    mean = {key: sum(row.get(key, 0) for row in rows) / max(1, sum(key in row for row in rows)) for key in keys}
    lines = ["| layer | reused | of_4 | guessed | experts used at all |", "|---|---|---|---|---|"]
    for name, row in [*((f"{row['layer']}", row) for row in rows), ("all", mean)]:
        lines.append(f"| {name} | " + " | ".join(f"{row[key]:.1%}" if key in row else "" for key in keys) + " |")
    return "\n".join(lines)


def make(
    out: Path, shape: str, *, layers: int | None = None, experts: int | None = None, dtype: str = "bfloat16",
    locality: float = 0.5, seed: int = 0,
) -> list[dict[str, float]]:  # fmt: skip
    """Write a synthetic checkpoint and a text for it; returns what was measured."""
    check_target(out)
    config = make_config(shape, layers, experts)
    maker = Maker(config, DTYPES[dtype], locality, seed)
    write_checkpoint(out, maker)
    text = make_text(config, maker.alike > 0, TOKENS, torch.Generator().manual_seed(seed + 1))
    (out / "tokens.json").write_text(json.dumps(text) + "\n", encoding="utf-8")
    rows = measure(out, text[:MEASURED_TOKENS])
    label = {"synthetic": True, "shape": shape, "locality": locality, "seed": seed}
    write_json(out / "synthetic.json", label | {"measured_tokens": MEASURED_TOKENS, "measured": rows})
    return rows


def main() -> int:
    """The command line; 1 if something failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--layers", type=int, metavar="N", help="another number of layers than the shape has")
    parser.add_argument("--experts", type=int, metavar="E", help="another number of experts")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of what is not packed")
    parser.add_argument("--locality", type=float, default=0.5, metavar="R", help="0 to 0.9 (default: 0.5)")
    parser.add_argument("--seed", type=int, default=0)
    args = vars(parser.parse_args())
    if not 0 <= args["locality"] <= 0.9:
        parser.error("--locality: from 0 to 0.9")
    try:
        rows = make(args.pop("out"), args.pop("shape"), **args)
    except (HfFlashError, OSError) as error:
        print(f"make_synthetic_moe: {error}", file=sys.stderr)
        return 1
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
