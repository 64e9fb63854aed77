#!/usr/bin/env python3
"""Which causal language models of the installed transformers hf_flash runs: every one is tried with a tiny config.

    scripts/coverage_of_families.py [MODEL_TYPE ...] [--markdown FILE] [--json FILE]

Each is *equal* (logits and tokens are stock's, in fp32, also of a left-padded batch, and again after saving and loading),
*refused* with a reason before anything is computed, *wrong*, *broken* (it is neither) or *not buildable*: transformers cannot
build or run it with a config made so, or stock itself does not give the same logits twice.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import signal
import sys
import tempfile
import warnings
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_flash import FlashOffloadConfig, UnsupportedModelError
from hf_flash.families import family_of
from hf_flash.families.experts import expert_modules
from hf_flash.runtime.model import runtime_of

LAYERS = 4
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embed_dim", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "ffn_hidden_size", "n_inner"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 48),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("vocab_size", "max_position_embeddings", "n_positions"), 128),
    "encoder_layers": LAYERS, "encoder_attention_heads": 4, "encoder_ffn_dim": 96, "num_key_value_heads": 2, "num_kv_heads": 2,
    "num_experts_per_tok": 2, "head_dim": 16, "rotary_dim": 8, "kv_lora_rank": 16, "q_lora_rank": 32, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "qk_head_dim": 16, "v_head_dim": 16, "sliding_window": 32, "attention_window": 32,
}  # fmt: skip
NEEDED = ("head_dim", "num_key_value_heads")  # set even where a config leaves them open, so that they fit the others
PER_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types", "attention_layers")
SPECIAL = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 2}
FIXED = {"is_decoder": True, "is_encoder_decoder": False, "use_cache": True, "tie_word_embeddings": False}
VISION = ("vision_config", "audio_config", "vq_config", "vision_tokenizer_config")
GEMMA: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "vocab_size": 128, "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 16,
    "sliding_window": 32, "num_kv_shared_layers": 0, "max_position_embeddings": 128,
    "layer_types": [*(LAYERS - 1) * ["sliding_attention"], "full_attention"],
}  # fmt: skip
BUILT: dict[str, dict[str, Any]] = {  # configs that are made small when they are made, because later they cannot be changed
    "gemma4_text": GEMMA, "gemma4_unified_text": GEMMA,
    "gemma4": {"text_config": GEMMA}, "gemma4_unified": {"text_config": GEMMA},
    "gemma3n_text": GEMMA | {"intermediate_size": LAYERS * [96], "activation_sparsity_pattern": [0.95, *(LAYERS - 1) * [0.0]]},
}  # fmt: skip
MLA = {"num_key_value_heads": 4, "head_dim": 8}
GROUPS = {"n_group": 2, "topk_group": 1}
OWN = {  # small values that fit together
    **dict.fromkeys(("minicpm3", "youtu", "axk2", "glm4_moe_lite", "glm_moe_dsa"), MLA),
    **dict.fromkeys(("deepseek_v3", "deepseek_v32", "axk1", "bailing_hybrid", "beam"), MLA | GROUPS),
    "deepseek_v2": MLA | {"num_experts_per_tok": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": {"num_attention_heads_per_layer": LAYERS * [4]},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
MOST = 100e6  # parameters of a model that is still tried
SECONDS = 90


def tiny_config(model_type: str) -> Any:
    """A config of this type with everything small that has a known name."""
    if model_type in BUILT:
        config = CONFIG_MAPPING[model_type](**BUILT[model_type], **SPECIAL, tie_word_embeddings=False)
        for name in VISION:
            if hasattr(part := getattr(config, name, None), "to_dict"):
                shrink(part)
        return config
    config = CONFIG_MAPPING[model_type]()
    for part in [config, *(getattr(config, name, None) for name in ("text_config", *VISION))]:
        if hasattr(part, "to_dict"):
            shrink(part)
    for key, value in OWN.get(model_type, {}).items():
        setattr(config, key, value)
    return config


def shrink(config: Any) -> None:
    """Make a config small, in place."""
    for key in (*SMALL, *PER_LAYER, *SPECIAL, *FIXED):
        found = None
        with suppress(Exception):  # a key that differs from layer to layer raises errors of its own
            found = getattr(config, key)
        value = (SPECIAL | FIXED).get(key)
        if key in SMALL and ((type(found) is int) or (found is None and key in NEEDED)):
            value = SMALL[key]
        elif key in PER_LAYER and isinstance(found, (list, tuple)) and found:
            value = [*found[: LAYERS - 1], found[-1]]
        if value is not None and hasattr(config, key):
            with suppress(Exception):  # a value that this config does not take
                setattr(config, key, value)


def answers(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[list[int]]]:
    """Logits of a batch, of the batch left-padded, and what is generated."""
    ids = ids.to(model.device)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    padded = ids.masked_fill(mask == 0, SPECIAL["pad_token_id"])
    with torch.no_grad():
        plain = model(ids).logits
        behind = model(padded, attention_mask=mask).logits[:, 4:]
        tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, min_new_tokens=6, do_sample=False)
    return plain.cpu(), behind.cpu(), tokens.tolist()


def differs(found: Any, wanted: Any) -> str:
    """What of some answers is not as wanted; nothing if they are equal up to rounding in fp32."""
    for name, one, other in zip(("logits", "logits of a left-padded batch"), found, wanted, strict=False):
        error = float((one - other).abs().max() / other.abs().max().clamp_min(1e-6))
        if not error < 1e-4:
            return f"{name} differ by {error:.1e}"
    return "" if found[2] == wanted[2] else "tokens differ"


def stock_model(model_type: str, folder: Path) -> tuple[Any, torch.Tensor]:
    """A tiny random stock model, saved in `folder`, loaded again, and some token ids."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type)).eval()
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        parameter.data.copy_(0.2 * noise if parameter.ndim > 1 else 0.1 * noise + (0 if name.endswith("bias") else 1))
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval(), torch.randint(4, 100, (2, 12))


def attempt(model_type: str, device: str | None = None) -> tuple[str, str]:
    """What becomes of a kind of model on a device, and why."""
    try:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(tiny_config(model_type))
    except Exception as error:  # noqa: BLE001
        return "not buildable", reason(error)
    if sum(parameter.numel() for parameter in skeleton.parameters()) > MOST:
        return "not buildable", "its default config does not become small"
    try:
        family = None if expert_modules(skeleton) else family_of(skeleton.config, skeleton)
    except UnsupportedModelError as error:
        return "refused", str(error)
    with tempfile.TemporaryDirectory() as place:
        try:
            stock, ids = stock_model(model_type, Path(place) / "plain")
            wanted = answers(stock, ids)
            if problem := differs(answers(stock, ids), wanted):
                return "not buildable", f"stock does not repeat itself: {problem}"
            if not torch.isfinite(wanted[0]).all():
                return "not buildable", "stock gives no numbers with random weights"
        except Exception as error:  # noqa: BLE001
            return "not buildable", reason(error)
        try:
            return flash_is_equal(Path(place), ids, wanted, family, device)
        except UnsupportedModelError as error:
            return "refused", str(error)
        except Exception as error:  # noqa: BLE001
            return "broken", reason(error)


def flash_is_equal(place: Path, ids: torch.Tensor, wanted: Any, family: Any, device: str | None) -> tuple[str, str]:
    """Load what is saved in `place` / "plain" with hf_flash, and once more after saving it."""

    def load(folder: Path) -> Any:
        config = FlashOffloadConfig(predictor="none", cache_dir=str(place / "cache"))
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map=device)

    flash = load(place / "plain")
    if problem := differs(answers(flash, ids), wanted):
        return "wrong", problem
    flash.save_pretrained(place / "saved")
    if problem := differs(answers(load(place / "saved"), ids), wanted):
        return "wrong", f"saved and loaded again, {problem}"
    if family is None:
        return "equal", experts_of(flash)
    return "equal", f"{family.block or 'inline'}: {', '.join(family.matrices.values())}; {flash_activation(family, flash)}"


def experts_of(model: Any) -> str:
    """Where a mixture has its experts, and in which pieces they lie in the checkpoint."""
    layer = runtime_of(model).engine.reader.layers[0]
    names = ", ".join(dict.fromkeys(name.partition(".experts.")[2] or name.rpartition(".")[2] for name in layer.tensors[0]))
    return f"experts: {names}"


def flash_activation(family: Any, model: Any) -> str:
    """The name of the activation."""
    return str(family.activation_of(model.config).name)


def reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"


def out_of_time(*_: Any) -> None:
    raise TimeoutError(f"not done after {SECONDS} s")


def table(found: dict[str, tuple[str, str]]) -> str:
    """The outcome as Markdown."""
    counts = Counter(kind for kind, _ in found.values())
    lines = [f"transformers {transformers.__version__}: " + ", ".join(f"{n} {kind}" for kind, n in counts.most_common()), ""]
    lines += ["| model type | | feed-forward layer, or the reason |", "|---|---|---|"]
    for model_type, (kind, why) in sorted(found.items(), key=lambda item: (item[1][0] != "equal", item[1][0], item[0])):
        lines.append(f"| {model_type} | {kind} | {short(why)} |")
    return "\n".join(lines) + "\n"


def short(why: str) -> str:
    """A reason in one line: of an error of hf_flash what it got."""
    rows = [row.strip() for row in why.splitlines()]
    got = next((row.removeprefix("got: ") for row in rows if row.startswith("got: ")), rows[0] if rows else "")
    return got.replace("|", "\\|")[:160]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", metavar="MODEL_TYPE", help="default: all")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything")
    parser.add_argument("--device", help="where flash models compute; cpu:0 tries the way of GPUs on the CPU")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    signal.signal(signal.SIGALRM, out_of_time)
    if "HF_FLASH_STANDIN_DEVICE" in os.environ:
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
        importlib.import_module("tests.standin_device.conftest")
    found: dict[str, tuple[str, str]] = {}
    for model_type in args.types or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        signal.alarm(SECONDS)
        try:
            found[model_type] = attempt(model_type, args.device)
        except TimeoutError as error:
            found[model_type] = "not buildable", str(error)
        finally:
            signal.alarm(0)
        print(f"{model_type}: {found[model_type][0]}: {short(found[model_type][1])}", flush=True)
        gc.collect()
    print(", ".join(f"{count} {kind}" for kind, count in Counter(kind for kind, _ in found.values()).most_common()))
    if args.markdown:
        args.markdown.write_text(table(found), encoding="utf-8")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return 1 if any(kind in ("wrong", "broken") for kind, _ in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
