#!/usr/bin/env python3
"""Time llama.cpp on given tokens under a ceiling on memory, to be held against hf_flash on the same tokens.

    scripts/compare_with_llama_cpp.py MODEL --memory 3.3GB --gguf MODEL.gguf [--token-file MODEL/tokens.json]
    scripts/compare_with_llama_cpp.py MODEL --memory none --venv DIR [--tokens 32] [--prompt-tokens 16]

MODEL is a checkpoint folder of a Qwen3-MoE in bfloat16 (scripts/make_synthetic_moe.py writes one). Its weights are written to
the GGUF file unless that exists; without --gguf to a temporary one. Of other models, give a GGUF file made elsewhere.
llama.cpp comes from PyPI (`xllamacpp`, `gguf`), in a virtual environment of its own at --venv, which is made if need be.

The ceiling is that of `hf-flash bench`, and counts the page cache: llama.cpp maps the file, so its weights are page cache. The
file's pages are dropped first, so it starts cold. Every call has one more of the given tokens than the one before and
generates one token; llama.cpp keeps what it knows of the others, and says how long it took for the new one. Sampling is not in
that time, nor is the first call, which takes the prompt. Its threads wait for each other in a loop: with other work on the
machine, as many as there are cores take several times as long. The result is JSON:

    load_s, first_token_s      until the server is up; until the first call has its token
    token_ms, median_ms        of llama.cpp's `prompt_ms`, where it took exactly one new token
    wall_ms                    median of the same calls as Python sees them
    disk_bytes                 read from the disk in each of these calls, page faults included, on average
    cap, cap_bytes, cgroup_peak_bytes
    read_ahead_kb              of the file's disk: llama.cpp reads by page faults, and this decides how much each of them reads
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Only the standard library here: in the virtual environment of llama.cpp this file runs, too.

PACKAGES = ("xllamacpp", "gguf")
FIRST_ID = 300  # random tokens are past the special ones
CONTEXT = 4096
CODE = {"unknown": 2, "control": 3, "byte": 6, "normal": 1}  # GGUF's types of tokens
KEYS = {
    "add_context_length": "max_position_embeddings", "add_embedding_length": "hidden_size",
    "add_block_count": "num_hidden_layers", "add_feed_forward_length": "intermediate_size",
    "add_head_count": "num_attention_heads", "add_head_count_kv": "num_key_value_heads",
    "add_key_length": "head_dim", "add_value_length": "head_dim", "add_layer_norm_rms_eps": "rms_norm_eps",
    "add_expert_used_count": "num_experts_per_tok", "add_expert_feed_forward_length": "moe_intermediate_size",
}  # fmt: skip
WHOLE = {"model.embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm"}
OF_LAYER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm", "mlp.gate": "ffn_gate_inp",
}  # fmt: skip
OF_EXPERTS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}
SINGLE = ("norm", "mlp.gate")  # ends of names that llama.cpp wants in float32


# --- in the virtual environment: the file -------------------------------------------------------------------------------


class Shards:
    """Tensors of a checkpoint in bfloat16, as uint16 [rows, columns], mapped."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._headers = folder, dict[str, tuple[int, dict[str, Any]]]()
        index = folder / "model.safetensors.index.json"
        found: dict[str, str] = json.loads(index.read_text())["weight_map"] if index.exists() else {}
        self._where = found or dict.fromkeys(self._header("model.safetensors")[1], "model.safetensors")

    def _header(self, file: str) -> tuple[int, dict[str, Any]]:
        if file not in self._headers:
            with open(self._folder / file, "rb") as stream:
                size = int.from_bytes(stream.read(8), "little")
                self._headers[file] = 8 + size, json.loads(stream.read(size))
        return self._headers[file]

    def shape(self, name: str) -> list[int]:
        """Of a tensor."""
        header = self._header(self._where[name])[1]
        if header[name]["dtype"] != "BF16":
            raise SystemExit(f"{name} is {header[name]['dtype']}: only checkpoints in bfloat16 can be converted")
        shape: list[int] = header[name]["shape"]
        return shape

    def __call__(self, name: str) -> Any:
        """The tensor itself."""
        import numpy as np

        shape, (start, header) = self.shape(name), self._header(self._where[name])
        path, offset = self._folder / self._where[name], start + header[name]["data_offsets"][0]
        return np.memmap(path, np.uint16, "r", offset, tuple(shape))


def tensors(config: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Names in a GGUF file, each with those of the tensors that are stacked there, without `.weight`."""
    yield from ((new, [old]) for old, new in WHOLE.items())
    for layer in range(config["num_hidden_layers"]):
        place = f"model.layers.{layer}."
        yield from ((f"blk.{layer}.{new}", [place + old]) for old, new in OF_LAYER.items())
        for old, new in OF_EXPERTS.items():
            experts = range(config.get("num_experts") or config["num_local_experts"])
            yield f"blk.{layer}.{new}", [f"{place}mlp.experts.{expert}.{old}" for expert in experts]


def words(count: int) -> tuple[list[bytes], list[int]]:
    """A vocabulary of so many, and the types of its tokens. llama.cpp wants one, though it is never used."""
    special = [b"<unk>", b"<s>", b"</s>"]
    single = [f"<0x{byte:02X}>".encode() for byte in range(256)]
    texts = special + single + [f"\u2581w{number}".encode() for number in range(count - len(special) - len(single))]
    kinds = ["unknown", "control", "control"] + ["byte"] * 256 + ["normal"] * (count - 259)
    return texts[:count], [CODE[kind] for kind in kinds[:count]]


def convert(folder: Path, out: Path) -> None:
    """Write a Qwen3-MoE checkpoint as GGUF, one tensor in memory at a time."""
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter  # type: ignore[import-not-found]

    config = json.loads((folder / "config.json").read_text())
    writer, weights = GGUFWriter(str(out), "qwen3moe"), Shards(folder)
    for method, key in KEYS.items():
        getattr(writer, method)(config[key])
    writer.add_expert_count(config.get("num_experts") or config["num_local_experts"])
    writer.add_rope_freq_base(config.get("rope_theta") or config["rope_parameters"]["rope_theta"])
    texts, kinds = words(config["vocab_size"])
    writer.add_tokenizer_model("llama")
    writer.add_token_list(texts)
    writer.add_token_scores([0.0] * len(texts))
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    single = {new: old[0].endswith(SINGLE) for new, old in tensors(config)}
    for new, old in tensors(config):
        shape = ([len(old)] if len(old) > 1 else []) + weights.shape(old[0] + ".weight")
        kind = GGMLQuantizationType.F32 if single[new] else GGMLQuantizationType.BF16
        size = int(np.prod(shape)) * (4 if single[new] else 2)
        writer.add_tensor_info(new + ".weight", shape, np.dtype(np.float32), size, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for new, old in tensors(config):
        parts = [weights(name + ".weight") for name in old]
        whole = np.stack(parts) if len(parts) > 1 else np.asarray(parts[0])
        writer.write_tensor_data((whole.astype(np.uint32) << 16).view(np.float32) if single[new] else whole)
    writer.close()


# --- in the virtual environment: the run --------------------------------------------------------------------------------


def time_tokens(file: Path, ids: list[int], prompt: int, threads: int) -> dict[str, Any]:
    """Load, take the prompt, then one token after the other."""
    import xllamacpp  # type: ignore[import-not-found]

    start = time.perf_counter()
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.warmup, params.fit_params = CONTEXT, 1, False, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)
    load_s = time.perf_counter() - start
    token_ms, wall_ms, disk = list[float](), list[float](), list[int]()
    first_token_s = 0.0
    for end in range(prompt, len(ids) + 1):
        before, start = disk_bytes(), time.perf_counter()
        asked = {"prompt": ids[:end], "n_predict": 1, "ignore_eos": True, "temperature": 0, "cache_prompt": True}
        answer = server.handle_completions(asked)
        seconds = time.perf_counter() - start
        timings = (answer if isinstance(answer, dict) else json.loads(answer))["timings"]
        if end == prompt:
            first_token_s = seconds
        elif timings["prompt_n"] == 1:
            token_ms.append(round(timings["prompt_ms"], 3))
            wall_ms.append(1e3 * seconds)
            disk.append(disk_bytes() - before)
    return {
        "load_s": load_s, "first_token_s": first_token_s, "median_ms": statistics.median(token_ms),
        "mean_ms": statistics.mean(token_ms), "wall_ms": statistics.median(wall_ms), "disk_bytes": statistics.mean(disk),
        "tokens": len(token_ms), "token_ms": token_ms,
    }  # fmt: skip


def disk_bytes() -> int:
    """What this process made the disk deliver."""
    rows = dict(row.split(": ") for row in Path("/proc/self/io").read_text().splitlines())
    return int(rows["read_bytes"])


def inside(spec: dict[str, Any]) -> None:
    """What this file does when the virtual environment's Python runs it."""
    if spec["job"] == "convert":
        convert(Path(spec["model"]), Path(spec["gguf"]))
    else:
        found = time_tokens(Path(spec["gguf"]), spec["ids"], spec["prompt"], spec["threads"])
        Path(spec["out"]).write_text(json.dumps(found))


# --- outside ------------------------------------------------------------------------------------------------------------


def make_venv(folder: Path) -> Path:
    """The Python of a virtual environment that has llama.cpp; made, or filled, if it lacks something."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    if subprocess.run([str(python), "-c", f"import {', '.join(PACKAGES)}"], check=False, capture_output=True).returncode:
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PACKAGES], check=True, stdout=sys.stderr)
    return python


def given_tokens(args: argparse.Namespace) -> list[int]:
    """The token ids of prompt and text."""
    count = args.prompt_tokens + args.tokens
    if args.token_file is not None:
        ids: list[int] = json.loads(args.token_file.read_text())[:count]
        if len(ids) < count:
            raise SystemExit(f"{args.token_file} has {len(ids)} tokens, {count} are needed")
        return ids
    config = json.loads((args.model / "config.json").read_text())
    draw = random.Random(args.seed)
    return [draw.randrange(min(FIRST_ID, config["vocab_size"] // 2), config["vocab_size"]) for _ in range(count)]


def call(command: list[str], place: Path, spec: dict[str, Any]) -> int:
    """Run this file in the virtual environment; what llama.cpp has to say goes to a file. Returns the exit code."""
    (place / "spec.json").write_text(json.dumps(spec))
    with open(place / "said", "w") as said:
        command = [*command, str(Path(__file__).resolve()), "--inside", str(place / "spec.json")]
        return subprocess.run(command, check=False, stdout=said, stderr=said).returncode


def peak_bytes(folder: Path | None) -> int | None:
    """The most that a cgroup ever held, page cache included."""
    for name in ("memory.peak", "memory.max_usage_in_bytes"):
        if folder is not None and (folder / name).exists():
            return int((folder / name).read_text())
    return None


def read_ahead_kb(path: Path) -> int | None:
    """How much the kernel reads ahead on a file's disk, where it says so."""
    device = path.stat().st_dev
    setting = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    return int(setting.read_text()) if setting.exists() else None


def drop_from_page_cache(path: Path) -> None:
    """What the kernel holds of a file goes; pages not yet written would stay."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def compare(args: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Make what is missing, run llama.cpp under the ceiling, and say what it took."""
    from hf_flash.base.sizes import parse_bytes
    from hf_flash.machine.memory_cap import memory_cap

    ceiling = None if args.memory == "none" else parse_bytes(args.memory)
    ids = given_tokens(args)
    python = make_venv(args.venv or place / "venv")
    gguf = args.gguf or place / "model.gguf"
    if not gguf.exists():
        kind = json.loads((args.model / "config.json").read_text())["model_type"]
        if kind != "qwen3_moe":
            raise SystemExit(f"{kind} cannot be converted here: give a file with --gguf")
        partial = gguf.with_name(gguf.name + ".partial")
        if call([str(python)], place, {"job": "convert", "model": str(args.model), "gguf": str(partial)}):
            raise SystemExit((place / "said").read_text())
        os.replace(partial, gguf)
    drop_from_page_cache(gguf)
    out = place / "found.json"
    spec = {
        "job": "time",
        "gguf": str(gguf),
        "ids": ids,
        "prompt": args.prompt_tokens,
        "threads": args.threads,
        "out": str(out),
    }
    with memory_cap(ceiling) as cap:
        code = call(cap.command([str(python)]), place, spec)
        row = {"system": "llama.cpp", "gguf_bytes": gguf.stat().st_size, "threads": args.threads, "cap": cap.label,
               "cap_bytes": cap.nbytes, "cgroup_peak_bytes": peak_bytes(cap.folder),
               "read_ahead_kb": read_ahead_kb(gguf)}  # fmt: skip
    if code or not out.exists():
        return row | {"failed": f"exit code {code}: {(place / 'said').read_text()[-500:]}"}
    found: dict[str, Any] = json.loads(out.read_text())
    return row | found


def main() -> int:
    """The command line; 1 if llama.cpp failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of the plain checkpoint")
    parser.add_argument(
        "--memory", default="none", metavar="SIZE", help='ceiling on the whole process, such as "3.3GB", or "none"'
    )
    parser.add_argument("--tokens", type=int, default=32, help="to be timed, after the prompt")
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="the model as llama.cpp reads it; written if it is not there")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="JSON list of token ids (default: random ones)")
    parser.add_argument("--seed", type=int, default=1, help="of random tokens")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--venv", type=Path, metavar="DIR", help="virtual environment of llama.cpp (default: a temporary one)")
    args = parser.parse_args()
    from hf_flash.errors import HfFlashError

    try:
        with tempfile.TemporaryDirectory(prefix="hf-flash-llama-") as place:
            row = compare(args, Path(place))
    except (HfFlashError, OSError, subprocess.CalledProcessError) as error:
        print(f"compare_with_llama_cpp: {error}", file=sys.stderr)
        return 1
    print(json.dumps(row, indent=2))
    return 1 if "failed" in row else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        inside(json.loads(Path(sys.argv[2]).read_text()))
    else:
        sys.exit(main())
