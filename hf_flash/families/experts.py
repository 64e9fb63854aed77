"""Mixtures of experts: which modules hold experts, and where every expert's numbers lie in a checkpoint.

transformers gives nearly all mixtures one kind of module (`use_experts_implementation` in its integrations/moe.py):
`gate_up_proj` or `up_proj`, and `down_proj`, have three dimensions, the first of which is the expert. Checkpoints hold the same
numbers under other names and in other pieces: a matrix for each expert, gate and up apart, transposed, interleaved.
transformers' own conversion mapping turns one into the other. It is not parsed here but tried: the conversion runs on small
tensors of serial numbers, and its output shows where each number came from. So this understands every conversion that leaves an
expert's numbers in a few contiguous pieces, and refuses every other one by name.

An expert is then read where it lies: nothing is repacked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from hf_flash.base.files import read_json
from hf_flash.compute.library import DTYPES
from hf_flash.errors import StoreFormatError, UnsupportedModelError
from hf_flash.families.base import get
from hf_flash.families.conversions import Conversions, Sources
from hf_flash.families.quantized import as_numbers, block_of, is_dequantizing, quantization_of, scales_for
from hf_flash.families.recognise import config_object, skeleton
from hf_flash.store.checkpoint import Checkpoint
from hf_flash.store.experts import SECOND, ExpertLayer, Piece, bytes_of

_FIRST: Final = ("gate_up_proj", "up_proj")
_MARK: Final = "is_concatenated"  # an attribute of every instance of a decorated class
_SMALL: Final = {"neurons": 3, "width": 5}  # sizes of the tensors with which conversions are tried
_MOST_PIECES: Final = 4  # the most pieces of an expert's matrix

Numbers = npt.NDArray[np.int64]


def expert_modules(model: nn.Module) -> dict[str, Any]:
    """The modules that hold experts, by name."""
    return {name: module for name, module in model.named_modules() if _holds_experts(module)}


def _holds_experts(module: nn.Module) -> bool:
    held = dict(module.named_parameters(recurse=False))
    return hasattr(module, _MARK) and SECOND in held and any(name in held for name in _FIRST)


def first_of(module: Any) -> str:
    """The parameter of an experts module that comes before the activation."""
    return next(name for name in _FIRST if name in dict(module.named_parameters(recurse=False)))


def mixture_of(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """The model of a checkpoint folder, without memory, if it is a mixture of experts; else `None`.

    Args:
        folder: a folder with at least config.json.
        dtype: the compute dtype; `None`: that of config.json, or else float32.
    """
    config = config_object(read_json(folder / "config.json"))
    config.dtype = dtype or config.dtype or torch.float32
    model = skeleton(config)
    return model.to(config.dtype) if expert_modules(model) else None


_USED_KEYS: Final = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k", "moe_k", "top_k")


def experts_per_token(model: Any, layers: Sequence[ExpertLayer]) -> int:
    """How many experts of a layer a token uses, from the config or a router; 1 if neither has the number."""
    found = _number_of(model.config.get_text_config(), _USED_KEYS)
    routers = [module.top_k for module in model.modules() if isinstance(getattr(module, "top_k", None), int)]
    return min(found or max(routers, default=1), max(layer.experts for layer in layers))


def kv_cache_bytes(model: Any) -> int:
    """Bytes of the KV cache per token of a sequence, as far as the config has the sizes."""
    config = model.config.get_text_config()
    layers, heads, width = (
        _number_of(config, (key,)) or 1 for key in ("num_hidden_layers", "num_attention_heads", "hidden_size")
    )
    kv_heads, head_dim = (
        _number_of(config, ("num_key_value_heads",)) or heads,
        _number_of(config, ("head_dim",)) or width // heads,
    )
    return 2 * layers * kv_heads * head_dim * int(model.config.dtype.itemsize)


def _number_of(config: Any, keys: Sequence[str]) -> int | None:
    """The value of the first of some config keys that has an integer above zero."""
    for key in keys:
        with suppress(Exception):  # transformers raises for configs whose layers differ
            found = get(config, key)
            if type(found) is int and found > 0:
                return found
    return None


def locate_experts(model: Any, checkpoint: Checkpoint) -> list[ExpertLayer]:
    """Find every expert of a model in its checkpoint.

    Args:
        model: a transformers model on the meta device. It is not changed.

    Raises:
        UnsupportedModelError: a conversion does not leave experts in a few contiguous pieces.
        StoreFormatError: the checkpoint lacks experts, or has them in other sizes.
    """
    modules = expert_modules(model)
    wanted = {f"{name}.{param}" for name, module in modules.items() for param, _ in module.named_parameters(recurse=False)}
    sources = Conversions(model).sources_of(wanted, list(checkpoint.specs))
    tried: dict[Any, Any] = {}
    return [_layer(model, checkpoint, name, module, sources, tried) for name, module in modules.items()]


def _layer(
    model: Any, checkpoint: Checkpoint, name: str, module: Any, sources: dict[str, Sources], tried: dict[Any, Any]
) -> ExpertLayer:
    first = first_of(module)
    experts, width, neurons = sizes_of(module)
    block = block_of(quantization_of(model.config))
    pieces, numbers, of_numbers = list[Piece](), list[_Range](), list[_Range]()  # of_numbers: ranges of their scales
    for param in (first, SECOND):
        target = f"{name}.{param}"
        if target not in sources:
            raise StoreFormatError(
                "the checkpoint lacks experts", where=target, expected="their weights", got="no tensor of them"
            )
        source, scales = sources[target].without_scales()
        of_scales = [checkpoint.specs[scales[tensor]] if tensor in scales else None for tensor in source.tensors]
        specs = [as_numbers(checkpoint.specs[tensor], other) for tensor, other in zip(source.tensors, of_scales, strict=True)]
        shape = tuple(module.get_parameter(param).shape)
        key = (id(source.converter), tuple(len(names) for names in source.names.values()), *specs, *of_scales, shape)
        if key not in tried:
            tried[key] = _try_conversion(model, source, specs, module, param, target)
        for form in tried[key]:
            piece, where = _scales_in_tensors(form, source.tensors, specs, scales, checkpoint, target, block)
            pieces.append(piece)
            numbers.append(_in_tensors(form, source.tensors, specs))
            of_numbers += [where] if where else []
    ranges = numbers + of_numbers
    tensors = tuple(zip(*(where.tensors for where in ranges), strict=True))
    begin = np.array([where.begin for where in ranges], np.int64).T
    return ExpertLayer(name, experts, width, neurons, first, tuple(pieces), tensors, begin)


def sizes_of(module: Any) -> tuple[int, int, int]:
    """Experts, width and neurons of an experts module."""
    down = module.get_parameter(SECOND).shape
    return (down[0], down[2], down[1]) if module.is_transposed else (down[0], down[1], down[2])


# --- a conversion, tried


class _Form(NamedTuple):
    """A piece of every expert; and for each expert the index of its tensor, the matrix in the tensor, and the first row."""

    piece: Piece
    places: list[tuple[int, int, int]]


def _try_conversion(model: Any, source: Sources, specs: Sequence[Any], module: Any, param: str, target: str) -> list[_Form]:
    """The pieces that a parameter's experts have in the checkpoint, found by running the conversion on small tensors."""
    shape = module.get_parameter(param).shape
    small = small_sizes(module)
    shapes = [_small_shape(spec[1], small, tensor, target) for spec, tensor in zip(specs, source.tensors, strict=True)]
    made = _converted(model, source, shapes, torch.Size(_small_shape(tuple(shape), small, target, target)), target)
    forms: list[_Form] = []
    for expert in range(shape[0]):
        block = made[expert].T if module.is_transposed else made[expert]
        found = [_in_file(run, shapes, specs, param, target) for run in _runs(block, shapes, target)]
        forms = forms or [_Form(piece, []) for piece, _ in found]
        if [piece for piece, _ in found] != [form.piece for form in forms]:
            raise _refused(target, f"expert {expert} lies otherwise than expert 0")
        for form, (_, place) in zip(forms, found, strict=True):
            form.places.append(place)
    _check_outputs([form.piece for form in forms], shape[1 + bool(module.is_transposed)], target)
    return forms


class _Range(NamedTuple):
    """For each expert, a tensor of the checkpoint and the byte offset in it where a range begins."""

    tensors: list[str]
    begin: list[int]


def _in_tensors(form: _Form, names: Sequence[str], specs: Sequence[Any]) -> _Range:
    """Where the numbers of a piece lie."""
    shapes = [specs[number][1] for number, _, _ in form.places]
    begin = [
        bytes_of((matrix * shape[-2] + row) * shape[-1], form.piece.dtype)
        for shape, (_, matrix, row) in zip(shapes, form.places, strict=True)
    ]
    return _Range([names[number] for number, _, _ in form.places], begin)


def _scales_in_tensors(
    form: _Form, names: Sequence[str], specs: Sequence[Any], scales: Mapping[str, str], checkpoint: Checkpoint, target: str,
    block: tuple[int, int] | None,
) -> tuple[Piece, _Range | None]:  # fmt: skip
    """A piece with the layout of its scales, and where these lie; without scales, the piece itself and `None`."""
    piece, numbers = form.piece, form.places[0][0]
    if names[numbers] not in scales:
        if piece.dtype not in DTYPES:
            raise _refused(target, f"numbers of {piece.dtype}, without scales")
        return piece, None
    of = [scales[names[number]] for number, _, _ in form.places]
    others = {checkpoint.specs[name] for name in of}
    found = scales_for(specs[numbers], checkpoint.specs[of[0]], block) if len(others) == 1 else None
    if found is None or piece.turned or any(row % found.block_rows for _, _, row in form.places):
        shapes = sorted({f"{list(shape)} of {dtype}" for dtype, shape in others})
        raise _refused(target, f"scales {', '.join(shapes)} for numbers {list(specs[numbers][1])}")
    begin = []
    for _, matrix, row in form.places:
        rows, columns = -(-specs[numbers][1][-2] // found.block_rows), -(-specs[numbers][1][-1] // found.block_columns)
        begin.append((matrix * rows + row // found.block_rows) * columns * found.dtype.itemsize)
    return replace(piece, scales=found), _Range(of, begin)


def small_sizes(module: Any) -> dict[int, int]:
    """A small size for each size of an expert's matrices. Sizes that are equal, or twice another, stay so."""
    experts, width, neurons = sizes_of(module)
    small = {neurons: _SMALL["neurons"], 2 * neurons: 2 * _SMALL["neurons"]}
    small.setdefault(width, 2 * small[width // 2] if width // 2 in small and width % 2 == 0 else _SMALL["width"])
    for size in (neurons, 2 * neurons, width):  # for matrices that hold all experts
        small.setdefault(experts * size, experts * small[size])
    return small


def _small_shape(shape: Sequence[int], small: dict[int, int], name: str, target: str) -> tuple[int, ...]:
    """A shape with small sizes. The first of three dimensions is a number of experts, which stays."""
    given = [(0, size) if len(shape) == 3 and at == 0 else (1, size) for at, size in enumerate(shape)]
    if len(shape) not in (2, 3) or any(kind and size not in small for kind, size in given):
        raise StoreFormatError(
            "experts are not of the size that the model's config says",
            where=name,
            expected=f"parts of {target}",
            got=list(shape),
        )
    return tuple(small[size] if kind else size for kind, size in given)


def _converted(
    model: Any, source: Sources, shapes: Sequence[tuple[int, ...]], wanted: torch.Size, target: str
) -> npt.NDArray[np.int64]:
    """A parameter converted from tensors of serial numbers, which count on from tensor to tensor."""
    numbers, at = [], 0
    for shape in shapes:
        count = torch.Size(shape).numel()
        numbers.append(torch.arange(at, at + count, dtype=torch.int64, device="cpu").view(shape))
        at += count
    if source.converter is None:
        made = numbers[0]
    else:
        made = _run_operations(model, source, iter(numbers), wanted, target)
    if made.shape != wanted:
        raise _refused(target, f"its conversion makes {list(made.shape)} where {list(wanted)} is wanted")
    return made.numpy()


def _run_operations(
    model: Any, source: Sources, numbers: Iterator[torch.Tensor], wanted: torch.Size, target: str
) -> torch.Tensor:
    """Run the operations of transformers' converter, in its order."""
    stand_in = SimpleNamespace(
        get_parameter=lambda name: torch.empty(wanted, dtype=torch.int64, device="meta"), config=model.config
    )
    collected: dict[str, Any] = {pattern: [next(numbers) for _ in names] for pattern, names in source.names.items()}
    patterns = {"source_patterns": source.converter.source_patterns, "target_patterns": source.converter.target_patterns}
    try:
        for operation in source.operations:
            if is_dequantizing(operation):
                collected = _dequantized(operation, collected, target)
                continue
            collected = operation.convert(
                collected, **patterns, full_layer_name=target, model=stand_in, config=model.config, missing_keys=None
            )
    except Exception as error:  # an operation may need attributes that the stand-in lacks, and fail in any way
        raise _refused(target, f"{type(operation).__name__}: {error}") from error
    mine = [value for pattern, value in collected.items() if target.endswith(pattern.replace("\\", ""))]
    if len(collected) == 1:
        mine = list(collected.values())
    if len(mine) != 1:
        raise _refused(target, f"its conversion makes {', '.join(collected)}")
    made: torch.Tensor = mine[0][0] if isinstance(mine[0], list) else mine[0]
    return made


def _dequantized(operation: Any, collected: dict[str, Any], target: str) -> dict[str, Any]:
    """The effect of a dequantizing operation on the order of numbers."""
    if type(operation).__name__ == "Mxfp4Dequantize":  # integrations/mxfp4.py: rows of outputs become columns
        return {target: next(iter(collected.values()))[0].transpose(1, 2)}
    return {target: collected["weight"]} if "weight" in collected else collected


@dataclass(frozen=True)
class _Run:
    """Outputs of a matrix whose numbers are contiguous in a file.

    Attributes:
        first: the serial number with which the run begins.
        outputs: indices of the outputs, in the order of the file.
        inputs: how many inputs an output has.
        turned: whether an output is a column in the file.
    """

    first: int
    outputs: Numbers
    inputs: int
    turned: bool


def _runs(block: Numbers, shapes: Sequence[tuple[int, ...]], target: str) -> list[_Run]:
    """Split a matrix [outputs, inputs] of serial numbers into runs that are contiguous in a file."""
    outputs, inputs = block.shape
    order = np.argsort(block[:, 0], kind="stable")
    start = block[order, 0]
    ends = np.cumsum([torch.Size(shape).numel() for shape in shapes])
    tensor = np.searchsorted(ends, start, side="right")
    step_in = int(block[0, 1] - block[0, 0])
    turned = step_in != 1 or inputs == 1
    step = 1 if turned else inputs
    apart = (np.diff(start) != step) | (np.diff(tensor) != 0)
    runs: list[_Run] = []
    for rows in np.split(np.arange(outputs), np.flatnonzero(apart) + 1):
        stride = np.array([len(rows), 1]) if turned else np.array([1, inputs])
        run = _Run(int(start[rows[0]]), order[rows], inputs, turned)
        expected = run.first + np.arange(inputs)[None, :] * stride[0] + np.arange(len(rows))[:, None] * stride[1]
        if len(runs) == _MOST_PIECES or not np.array_equal(block[run.outputs], expected):
            raise _refused(target, "an expert does not lie in a few contiguous pieces")
        runs.append(run)
    return runs


def _in_file(
    run: _Run, shapes: Sequence[tuple[int, ...]], specs: Sequence[Any], param: str, target: str
) -> tuple[Piece, tuple[int, int, int]]:
    """A run in the sizes of the file: its piece; and the index of its tensor, the matrix in the tensor, and the first row."""
    ends = np.cumsum([torch.Size(shape).numel() for shape in shapes])
    number = int(np.searchsorted(ends, run.first, side="right"))
    small, (dtype, real) = shapes[number], specs[number]
    at = run.first - (int(ends[number - 1]) if number else 0)
    row, column = divmod(at, small[-1])
    matrix, row = divmod(row, small[-2])
    stored_rows = run.inputs if run.turned else len(run.outputs)
    if column or (row * real[-2]) % small[-2] or (stored_rows * real[-2]) % small[-2]:
        raise _refused(target, "an expert does not begin with a row of its tensor")
    rows = stored_rows * real[-2] // small[-2]
    first_output, turns = _order(run, real[-1] if run.turned else rows, target)
    place = number, matrix, row * real[-2] // small[-2]
    return Piece(param, rows, real[-1], run.turned, first_output, turns, dtype), place


def _order(run: _Run, count: int, target: str) -> tuple[int, int]:
    """`first_output` and `turns` of a piece, in real sizes, from the outputs of a run."""
    small, at = len(run.outputs), run.outputs
    steps = np.diff(at)
    if (steps == 1).all():
        return int(at[0]) * count // small, 1
    if (steps == 2).all():
        return int(at[0]), -2
    if small % 2 == 0 and np.array_equal(at - at.min(), np.arange(small).reshape(2, -1).T.reshape(-1)):
        return int(at.min()) * count // small, 2
    raise _refused(target, "its outputs are in an order of their own")


def _check_outputs(forms: Sequence[Piece], outputs: int, target: str) -> None:
    """Refuse pieces that do not hold every output exactly once."""
    found = np.concatenate([piece.order for piece in forms])
    if not np.array_equal(np.sort(found), np.arange(outputs)):
        raise _refused(target, "its pieces do not make a whole")


def _refused(target: str, got: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        "the experts of this checkpoint cannot be read where they lie",
        where=target,
        expected="each expert in a few contiguous pieces of the checkpoint's tensors",
        got=got,
        hint="save the model with transformers' save_pretrained, and load that folder",
    )
