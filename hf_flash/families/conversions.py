"""Finds which tensors of a checkpoint become which parameters of a model, by transformers' own conversion mapping."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hf_flash.families.quantized import dequantizer, has_numbers, is_dequantizing, name_of_scales, quantization_of
from hf_flash.store.checkpoint import Checkpoint
from hf_flash.store.codecs import codec_of


@dataclass
class Sources:
    """The tensors of a checkpoint that become one parameter.

    Attributes:
        converter: the converter of transformers, or `None` if the tensor is taken unchanged.
        names: names of the tensors, by the source pattern that they match, in the order in which transformers collects them.
    """

    converter: Any
    names: dict[str, list[str]]

    @property
    def tensors(self) -> list[str]:
        return [name for names in self.names.values() for name in names]

    @property
    def operations(self) -> list[Any]:
        return [] if self.converter is None else list(self.converter.operations)

    @property
    def as_it_is(self) -> str | None:
        """The one tensor that is the parameter, apart from dequantization; `None` if the parameter is made in another way."""
        numbers = self.without_scales()[0].tensors
        return numbers[0] if len(numbers) == 1 and all(map(is_dequantizing, self.operations)) else None

    def without_scales(self) -> tuple[Sources, dict[str, str]]:
        """The sources that hold numbers; and for those with scales, a dictionary from tensor to tensor of scales."""
        if not any(map(is_dequantizing, self.operations)):
            return self, {}
        numbers = {pattern: names for pattern, names in self.names.items() if has_numbers(pattern)}
        pairs = ((names, self.names.get(name_of_scales(pattern), [])) for pattern, names in numbers.items())
        scales = {
            name: scale for names, some in pairs if len(names) == len(some) for name, scale in zip(names, some, strict=True)
        }
        return Sources(self.converter, numbers), scales


class Conversions:
    """How transformers renames and converts the tensors of a checkpoint for a model.

    It uses `get_model_conversion_mapping` of transformers' conversion_mapping.py; `rename_source_key`, `WeightConverter`,
    `WeightRenaming` and `dot_natural_key` of core_model_loading.py, all since 5.0. It follows
    `convert_and_load_state_dict_in_model` there.
    """

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        quantization = quantization_of(model.config)
        quantizer = None if quantization is None else dequantizer(quantization)
        mapping = get_model_conversion_mapping(model, hf_quantizer=quantizer)
        self.renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self.converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self.by_pattern = {pattern: entry for entry in self.converters for pattern in entry.source_patterns}
        self.prefix, self.state = model.base_model_prefix, model.state_dict()

    def sources_of(self, wanted: set[str], tensors: Sequence[str]) -> dict[str, Sources]:
        """For each wanted parameter that is among the targets of `tensors`, its sources."""
        from transformers.core_model_loading import dot_natural_key

        found: dict[str, Sources] = {}
        for tensor in sorted(tensors, key=dot_natural_key):
            for target, pattern in self._targets(tensor):
                if target in wanted:
                    sources = found.setdefault(target, Sources(self.by_pattern.get(pattern or ""), {}))
                    sources.names.setdefault(pattern or tensor, []).append(tensor)
        return found

    def _targets(self, tensor: str) -> Iterator[tuple[str, str | None]]:
        """The parameters that a tensor becomes, or becomes a part of, each with the source pattern of its converter."""
        from transformers.core_model_loading import rename_source_key

        name, pattern = rename_source_key(tensor, self.renamings, self.converters, self.prefix, self.state)
        if name not in self.state and tensor in self.state:
            name, pattern = rename_source_key(tensor, [], [], self.prefix, self.state)
        yield name, pattern
        for other in self.by_pattern[pattern].target_patterns[1:] if pattern is not None else ():
            yield name.replace(self.by_pattern[pattern].target_patterns[0], other), pattern


def table_on_disk(model: Any, name: str, checkpoint: Checkpoint) -> str | None:
    """The tensor of a checkpoint that is a matrix of a model, row after row; `None` if the matrix is made in another way.

    Args:
        name: the name of the parameter.
    """
    wanted = tuple(model.get_parameter(name).shape)
    alike = [tensor for tensor, (_, shape) in checkpoint.specs.items() if shape == wanted]  # fewer tensors to rename
    source = Conversions(model).sources_of({name}, alike).get(name)
    tensor = source.as_it_is if source else None
    if tensor is None or codec_of(checkpoint.specs[tensor][0]) is None:
        return None
    return tensor if checkpoint.is_safetensors(tensor) else None
