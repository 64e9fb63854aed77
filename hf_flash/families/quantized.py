"""Checkpoints that are quantized by another method than ours: which ones are read, and how.

transformers reads such a checkpoint with a quantizer of its own, which can dequantize all of it to plain numbers. Here that
quantizer dequantizes everything but the experts. Those stay in their stored form on flash; the quantizer's conversions tell
which tensor holds the scales of which other tensor.

    mxfp4   gpt-oss: 4 bits per number; 32 numbers of a row share a scale that is a power of two
    fp8     DeepSeek, Qwen and others: 8 bits per number, scales for blocks of numbers; or 4 bits, as above
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import torch

from hf_flash.compute.coded import decode
from hf_flash.compute.library import DTYPES
from hf_flash.config_arguments import METHOD
from hf_flash.errors import ConfigError, StoreFormatError
from hf_flash.families.base import get
from hf_flash.store.checkpoint import Checkpoint
from hf_flash.store.experts import E2M1, E4M3, E8M0, Piece, Scales
from hf_flash.store.safetensors_files import TensorSpec, as_bytes

KEY: Final = "checkpoint_quantization"  # key of our own config: the quantization of the checkpoint's config.json
METHODS: Final = ("mxfp4", "fp8")
_SCALES: Final = ((re.compile(r"_blocks$"), "_scales"), (re.compile(r"$"), "_scale_inv"))  # (name of numbers, name of scales)
_IN_FILES: Final = ((".weight", ".weight_scale_inv"), (".weight", ".scale"), (".weight", ".qscale_weight"))  # before renaming
_NO_NUMBERS: Final = re.compile(r"(_scales|_scale_inv|activation_scale)$")
_OF_SCALES: Final = (torch.float64, torch.float32, torch.bfloat16, torch.float16, E8M0, torch.uint8)  # uint8: an exponent
_CODED: Final = (E4M3, torch.int8, torch.uint8)  # dtypes of tensors whose numbers have scales


def quantization_of(config: Any) -> dict[str, Any] | None:
    """How a checkpoint is quantized apart from hf_flash, from its config.json; `None` if it is not.

    Args:
        config: a transformers config, or the dictionary in config.json.

    Raises:
        ConfigError: hf_flash does not read the method.
    """
    found = get(config, "quantization_config") or get(get(config, "text_config") or {}, "quantization_config")
    values = found.to_dict() if hasattr(found, "to_dict") else found
    if isinstance(values, Mapping) and values.get("quant_method") == METHOD:
        values = values.get(KEY)
    if not values:
        return None
    if not isinstance(values, Mapping):
        raise _not_read(repr(values))
    values = dict(values)
    method = values.get("quant_method")
    method = str(getattr(method, "value", method))
    if method not in METHODS:
        raise _not_read(method)
    return values | {"quant_method": method}


def _not_read(got: str) -> ConfigError:
    return ConfigError(
        "the checkpoint is quantized in a way that hf_flash does not read",
        where="quantization_config",
        expected=f"{' or '.join(METHODS)}, as transformers reads them for this model",
        got=got,
        hint="take the checkpoint in bf16",
    )


def dequantizer(quantization: Mapping[str, Any]) -> Any:
    """The transformers quantizer for such a checkpoint, set to dequantize it.

    It uses `HfQuantizer` of transformers' quantizers/base.py, and `quantization_config.dequantize` of both methods, all since
    5.0.

    Raises:
        ConfigError: transformers does not understand the quantization.
    """
    from transformers.quantizers import AutoHfQuantizer

    try:
        found = AutoHfQuantizer.from_config(dict(quantization), pre_quantized=True)
    except (TypeError, ValueError, AttributeError) as error:
        raise _not_read(f"{dict(quantization)}: {error}") from error
    found.quantization_config.dequantize = True
    if (block := block_of(quantization)) is not None:
        operation = _with_uneven_blocks(found.get_load_operations()["dequantize"], block)
        found.get_load_operations = lambda: {"dequantize": operation}
    return found


def block_of(quantization: Mapping[str, Any] | None) -> tuple[int, int] | None:
    """Rows and columns of the blocks that share a scale; `None` if config.json does not have them."""
    found = (quantization or {}).get("weight_block_size")
    return (int(found[0]), int(found[1])) if found else None


def _with_uneven_blocks(operation: Any, block: tuple[int, int]) -> Any:
    """`Fp8Dequantize` of integrations/finegrained_fp8.py for matrices whose last blocks are cut off.

    DeepSeek-V3 has such matrices, with 576 rows in blocks of 128. Stock transformers refuses them, or takes the blocks for
    smaller ones. Here they are padded with zeros, which are cut off again.
    """

    class Dequantize(operation):
        def _dequantize_one(self, quantized: torch.Tensor, scales: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            rows, columns = quantized.shape[-2:]
            if quantized.dtype != E4M3 or not _is_uneven((rows, columns), tuple(scales.shape), block):
                plain: torch.Tensor = super()._dequantize_one(quantized, scales, *args, **kwargs)
                return plain
            whole = quantized.new_zeros(scales.shape[0] * block[0], scales.shape[1] * block[1], dtype=torch.uint8)
            whole[:rows, :columns] = quantized.view(torch.uint8)
            plain = super()._dequantize_one(whole.view(quantized.dtype), scales, *args, **kwargs)
            return plain[:rows, :columns].contiguous()

    return Dequantize


def _is_uneven(shape: tuple[int, ...], grid: tuple[int, ...], block: tuple[int, int]) -> bool:
    """Whether a matrix has blocks of this size, of which the last are cut off."""
    blocks = tuple(-(-size // each) for size, each in zip(shape, block, strict=True))
    return grid == blocks and any(size % each for size, each in zip(shape, block, strict=True))


# --- numbers and their scales


def is_dequantizing(operation: Any) -> bool:
    """Whether an operation of a conversion dequantizes."""
    return hasattr(operation, "hf_quantizer")


def has_numbers(pattern: str) -> bool:
    """Whether tensors of this name hold numbers, not scales."""
    return _NO_NUMBERS.search(pattern) is None


def name_of_scales(pattern: str) -> str:
    """The name of the scales that belong to numbers of this name."""
    return next(end.sub(ending, pattern, count=1) for end, ending in _SCALES if end.search(pattern))


def as_numbers(spec: TensorSpec, scales: TensorSpec | None) -> TensorSpec:
    """Dtype and shape of a tensor of numbers, in which a byte that holds two numbers counts as two."""
    dtype, shape = spec
    if scales is None:
        return spec
    if dtype == torch.uint8 and len(shape) == len(scales[1]) + 1:  # mxfp4: [..., blocks, bytes of a block]
        return E2M1, (*shape[:-2], shape[-2] * shape[-1] * 2)
    return (E2M1, (*shape[:-1], shape[-1] * 2)) if dtype == torch.int8 else spec


def scales_for(numbers: TensorSpec, scales: TensorSpec, block: tuple[int, int] | None = None) -> Scales | None:
    """How the scales in one tensor belong to the numbers in another; `None` if the layout is unknown.

    Args:
        numbers: as [`as_numbers`] returns it.
        scales: dtype and shape of the tensor of scales.
        block: the block size of config.json, which is needed if the last blocks are cut off.

    Stock transformers has a matrix of scales for each matrix of numbers, in blocks of one size (`Fp8Dequantize` of
    integrations/finegrained_fp8.py, `Mxfp4Dequantize` of integrations/mxfp4.py).
    """
    (dtype, shape), (scale_dtype, grid) = numbers, scales
    if torch.Size(grid).numel() == 1:
        grid = (*(1 for _ in shape[:-2]), 1, 1)
    if dtype not in (E2M1, E4M3) or scale_dtype not in _OF_SCALES or len(grid) != len(shape) or grid[:-2] != shape[:-2]:
        return None
    kind = E8M0 if scale_dtype == torch.uint8 else scale_dtype  # uint8 holds the same exponents
    if block and dtype == E4M3 and _is_uneven(shape[-2:], grid[-2:], block):
        return Scales(kind, *block)
    if 0 in grid[-2:] or shape[-2] % grid[-2] or shape[-1] % grid[-1]:
        return None
    return Scales(kind, shape[-2] // grid[-2], shape[-1] // grid[-1])


def scales_in(checkpoint: Checkpoint, name: str) -> str | None:
    """The name of the tensor with the scales of a tensor that belongs to no expert; `None` if it has no scales."""
    if name not in checkpoint.specs or checkpoint.specs[name][0] not in _CODED:
        return None
    names = (name.removesuffix(end) + ending for end, ending in _IN_FILES if name.endswith(end))
    return next((found for found in names if found in checkpoint.specs), None)


def plain_tensor(checkpoint: Checkpoint, name: str, dtype: torch.dtype, block: tuple[int, int] | None = None) -> torch.Tensor:
    """A tensor of a checkpoint; one with scales is decoded to plain numbers.

    Args:
        dtype: the compute dtype.
        block: as in [`scales_for`].

    Raises:
        StoreFormatError: the layout of its scales is unknown.
    """
    scales = scales_in(checkpoint, name)
    if scales is None or dtype not in DTYPES:
        return checkpoint.tensor(name)
    of_scales = checkpoint.specs[scales]
    coded, shape = as_numbers(checkpoint.specs[name], of_scales)
    kind = scales_for((coded, shape), of_scales, block)
    if kind is None or len(shape) != 2:
        raise StoreFormatError("scales that nothing is known of", where=name, got=f"{of_scales} for {checkpoint.specs[name]}")
    piece = Piece(name, *shape, turned=False, first_output=0, turns=1, dtype=coded, scales=kind)
    numbers, its_scales = (as_bytes(checkpoint.tensor(found)) for found in (name, scales))
    return decode(piece, numbers, its_scales, slice(0, piece.rows), dtype)


def as_quantized(specs: Mapping[str, TensorSpec], quantization: Mapping[str, Any]) -> dict[str, TensorSpec]:
    """The specs that a quantization method would give the tensors of plain experts, for a checkpoint that does not exist.

    Args:
        specs: specs of the plain experts, by their names in a checkpoint.
        quantization: as [`quantization_of`] returns it.

    Raises:
        ConfigError: the method is not for such experts.
    """
    from transformers.quantizers.quantizers_utils import should_convert_module

    found: dict[str, TensorSpec] = {}
    stock = dequantizer(quantization).quantization_config
    for name, (dtype, shape) in specs.items():
        is_plain = not should_convert_module(name.removesuffix(".weight"), stock.modules_to_not_convert)
        if len(shape) not in (2, 3) or name.endswith("bias") or is_plain:
            found[name] = dtype, shape
        elif quantization["quant_method"] == "mxfp4":
            if len(shape) != 3:
                raise _not_read(f"mxfp4 for {name} {list(shape)}")
            experts, inputs, outputs = shape
            found[f"{name}_blocks"] = torch.uint8, (experts, outputs, inputs // 32, 16)
            found[f"{name}_scales"] = torch.uint8, (experts, outputs, inputs // 32)
        elif stock.expert_dtype == "fp4":
            found[name], found[f"{name}_scale_inv"] = (
                (torch.int8, (shape[0], shape[1] // 2)),
                (E8M0, (shape[0], shape[1] // 32)),
            )
        else:
            rows, columns = stock.weight_block_size or shape[-2:]
            grid = *shape[:-2], -(-shape[-2] // rows), -(-shape[-1] // columns)
            found[name], found[f"{name}_scale_inv"] = (E4M3, shape), (torch.float32, grid)
    return found
