"""Small checkpoints that are quantized already, and the plain ones that they stand for."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

State = dict[str, torch.Tensor]
E2M1_VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
_EXPERT = re.compile(r"experts\.(\d+\.)?(gate_proj|up_proj|down_proj|gate_up_proj|w1|w2|w3)(\.weight)?$")


def to_mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 [..., inputs / 2], the first of two in the low half, and exponents uint8 [..., inputs / 32]."""
    blocks = weight.float().unflatten(-1, (-1, 32))
    exponents = (torch.log2(blocks.abs().amax(-1).clamp(min=1e-30)).floor() + 125).clamp(1, 254).to(torch.uint8)
    scaled = blocks / torch.exp2(exponents.float() - 127).unsqueeze(-1)
    codes = (scaled.unsqueeze(-1) - E2M1_VALUES).abs().argmin(-1).to(torch.uint8).flatten(-2)
    return (codes[..., 0::2] | codes[..., 1::2] << 4).contiguous(), exponents


def from_mxfp4(codes: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """What [`to_mxfp4`] made, in fp32."""
    plain = E2M1_VALUES[torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2).long()]
    return plain * torch.exp2(exponents.float() - 127).repeat_interleave(32, -1)


def to_fp8(weight: torch.Tensor, block: tuple[int, int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, columns] in 8 bits, and scales of a dtype, one for each block; the last ones need not be whole."""
    (rows, columns), (high, wide) = weight.shape, block
    if rows % high or columns % wide:
        numbers, scales = to_fp8(torch.nn.functional.pad(weight, (0, -columns % wide, 0, -rows % high)), block, dtype)
        return numbers[:rows, :columns].contiguous(), scales
    blocks = weight.float().unflatten(0, (-1, block[0])).unflatten(-1, (-1, block[1]))
    scales = (blocks.abs().amax((1, 3)) / 448).to(dtype)
    if dtype == torch.float8_e8m0fnu:
        scales = torch.exp2(scales.float().log2().ceil()).to(dtype)
    return (blocks / scales.float()[:, None, :, None]).view(weight.shape).to(torch.float8_e4m3fn), scales


def from_fp8(numbers: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """What [`to_fp8`] made, in fp32."""
    wide = scales.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return numbers.float() * wide[: numbers.shape[0], : numbers.shape[1]]


def mxfp4_as_gpt_oss(state: State) -> tuple[State, State]:
    """A state with its experts in mxfp4, which have outputs first there; and the plain one that it stands for."""
    found, plain = State(), State()
    for name, value in state.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            found[name] = plain[name] = value
            continue
        codes, exponents = to_mxfp4(value.mT)
        found[f"{name}_blocks"], found[f"{name}_scales"] = codes.unflatten(-1, (-1, 16)), exponents
        plain[name] = from_mxfp4(codes, exponents).mT.contiguous()
    return found, plain


def fp8(
    block: tuple[int, int], dtype: torch.dtype = torch.float32, *, ending: str = "weight_scale_inv", uneven: bool = False
) -> Any:
    """A function as [`mxfp4_as_gpt_oss`], for matrices of experts and of attention that have whole blocks, or all of them."""

    def quantize(state: State) -> tuple[State, State]:
        found, plain = State(), State()
        for name, value in state.items():
            whole = value.ndim == 2 and (uneven or (value.shape[0] % block[0] == 0 and value.shape[1] % block[1] == 0))
            if not whole or "proj" not in name:
                found[name] = plain[name] = value
                continue
            numbers, scales = to_fp8(value, block, dtype)
            found[name], found[name.removesuffix("weight") + ending] = numbers, scales
            plain[name] = from_fp8(numbers, scales, block)
        return found, plain

    return quantize


def fp4_of_experts(state: State) -> tuple[State, State]:
    """Experts in 4 bits, in a checkpoint that calls itself fp8."""
    found, plain = State(), State()
    for name, value in state.items():
        if not _EXPERT.search(name) or value.shape[-1] % 32:
            found[name] = plain[name] = value
            continue
        codes, exponents = to_mxfp4(value)
        found[name], found[f"{name}_scale_inv"] = codes.view(torch.int8), exponents.view(torch.float8_e8m0fnu)
        plain[name] = from_mxfp4(codes, exponents)
    return found, plain


def make(
    source: Path, target: Path, quantize: Callable[[State], tuple[State, State]], config: dict[str, Any]
) -> tuple[Path, Path]:
    """A quantized copy of a plain checkpoint, and the plain one that it stands for, in fp32."""
    both = target / "quantized", target / "plain"
    for folder, state in zip(both, quantize(load_file(source / "model.safetensors")), strict=True):
        shutil.copytree(source, folder)
        save_file({name: value.contiguous() for name, value in state.items()}, folder / "model.safetensors", {"format": "pt"})
    written = json.loads((source / "config.json").read_text())
    (both[0] / "config.json").write_text(json.dumps(written | {"quantization_config": config}))
    return both


MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"]}


def fp8_config(block: tuple[int, int] | None, **more: Any) -> dict[str, Any]:
    """As DeepSeek has it."""
    found = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": block and list(block)}
    return found | more
