"""Checkpoints that are quantized already: which tensors belong together, and what is none of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hf_flash import ConfigError
from hf_flash.families.quantized import as_quantized, plain_tensor, quantization_of, scales_for, scales_in
from hf_flash.store.checkpoint import Checkpoint
from hf_flash.store.experts import E2M1, E4M3, E8M0, Scales
from tests.quantized import from_fp8, to_fp8


def test_only_coded_numbers_have_scales(tmp_path: Path) -> None:
    """A plain model may have a parameter `scale` beside a `weight`."""
    weight = torch.randn(32, 32)
    numbers, scales = to_fp8(weight, (16, 16), torch.float32)
    save_file(
        {"a.weight": weight, "a.scale": torch.ones(32), "b.weight": numbers, "b.scale": scales}, tmp_path / "m.safetensors"
    )
    checkpoint = Checkpoint.open([tmp_path / "m.safetensors"])
    assert (scales_in(checkpoint, "a.weight"), scales_in(checkpoint, "b.weight")) == (None, "b.scale")
    assert torch.equal(plain_tensor(checkpoint, "a.weight", torch.float32), weight)
    assert torch.equal(plain_tensor(checkpoint, "b.weight", torch.bfloat16), from_fp8(numbers, scales, (16, 16)).bfloat16())


F32 = torch.float32


@pytest.mark.parametrize(("numbers", "scales", "wanted"), [
    ((E4M3, (256, 128)), (F32, (2, 1)), Scales(F32, 128, 128)),
    ((E4M3, (256, 128)), (F32, ()), Scales(F32, 256, 128)),
    ((E4M3, (256, 128)), (torch.bfloat16, (1,)), Scales(torch.bfloat16, 256, 128)),
    ((E4M3, (256, 128)), (F32, (256, 1)), Scales(F32, 1, 128)),
    ((E2M1, (8, 256, 128)), (torch.uint8, (8, 256, 4)), Scales(E8M0, 1, 32)),
    ((E2M1, (256, 128)), (E8M0, (256, 4)), Scales(E8M0, 1, 32)),
    ((E4M3, (256, 128)), (F32, (256,)), None),
    ((E4M3, (256, 128)), (F32, (3, 1)), None),
    ((E4M3, (8, 256, 128)), (F32, (4, 2, 1)), None),
    ((E4M3, (256, 128)), (torch.int32, (2, 1)), None),
    ((torch.bfloat16, (256, 128)), (F32, (2, 1)), None),
    ((E4M3, (256, 128)), (F32, (0, 1)), None),
])  # fmt: skip
def test_scales_belong_to_blocks_of_one_size(numbers: Any, scales: Any, wanted: Scales | None) -> None:
    assert scales_for(numbers, scales) == wanted


def test_the_last_block_of_a_matrix_need_not_be_whole() -> None:
    """576 rows in blocks of 128, as DeepSeek-V3's `kv_a_proj_with_mqa`."""
    numbers, scales = (E4M3, (576, 7168)), (F32, (5, 56))
    assert scales_for(numbers, scales) is None
    assert scales_for(numbers, scales, (128, 128)) == Scales(F32, 128, 128)
    assert scales_for(numbers, scales, (64, 128)) is None


def test_what_config_json_says_beside_ours() -> None:
    other = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    assert quantization_of({}) is None
    assert quantization_of({"quantization_config": {"quant_method": "flash", "format_version": 1}}) is None
    assert quantization_of({"quantization_config": other}) == other
    assert quantization_of({"text_config": {"quantization_config": other}}) == other
    assert quantization_of({"quantization_config": {"quant_method": "flash", "checkpoint_quantization": other}}) == other
    for wrong in ({"quant_method": "gptq"}, {"bits": 4}, "fp8", ["fp8"]):
        with pytest.raises(ConfigError, match="does not read"):
            quantization_of({"quantization_config": wrong})


def test_a_checkpoint_that_is_not_there_has_the_bytes_of_one_that_is() -> None:
    plain = {"experts.0.up_proj.weight": (torch.bfloat16, (768, 2048)), "experts.bias": (torch.bfloat16, (8, 4))}
    found = as_quantized(plain, {"quant_method": "fp8", "weight_block_size": [128, 128]})
    assert found == {
        "experts.0.up_proj.weight": (E4M3, (768, 2048)), "experts.0.up_proj.weight_scale_inv": (F32, (6, 16)),
        "experts.bias": (torch.bfloat16, (8, 4)),
    }  # fmt: skip
    assert as_quantized(plain, {"quant_method": "fp8", "modules_to_not_convert": ["experts"]}) == plain
    stacked = {"experts.down_proj": (torch.bfloat16, (32, 2880, 2880))}
    assert as_quantized(stacked, {"quant_method": "mxfp4"}) == {
        "experts.down_proj_blocks": (torch.uint8, (32, 2880, 90, 16)),
        "experts.down_proj_scales": (torch.uint8, (32, 2880, 90)),
    }  # fmt: skip
