"""Recognise the feed-forward blocks of a model that no family describes, by the structure of its modules.

A block is recognised if every decoder layer has one such module, under the same name, that holds linear layers under one of the
known sets of names and nothing else, and that computes `down(act(up x))`, or `down(act(gate x) * up x)`. The arithmetic is
tried (arithmetic_check.py), so a model that loads computes the right result (contract C9).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from hf_flash.compute.activation import Activation
from hf_flash.errors import UnsupportedModelError
from hf_flash.families.arithmetic_check import arithmetic_of, in_a_line, inline_arithmetic_of, is_turned
from hf_flash.families.base import Family, Shape, get
from hf_flash.families.decoder import decoder_of
from hf_flash.store.unit import Role

_NAMES: Final[tuple[Mapping[Role, str], ...]] = (
    {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
    {"gate": "w1", "up": "w3", "down": "w2"},
    {"gate": "gate_up_proj", "up": "gate_up_proj", "down": "down_proj"},
    {"gate": "Wi", "up": "Wi", "down": "Wo"},
    {"gate": "fc1", "up": "fc1", "down": "fc2"},
    {"up": "up_proj", "down": "down_proj"},
    {"up": "fc1", "down": "fc2"},
    {"up": "dense_h_to_4h", "down": "dense_4h_to_h"},
    {"up": "c_fc", "down": "c_proj"},
    {"up": "fc_in", "down": "fc_out"},
    {"up": "intermediate", "down": "output"},
    {"up": "0", "down": "2"},
)
_INLINE: Final[tuple[Mapping[Role, str], ...]] = (  # linear layers in a decoder layer itself
    {"up": "fc1", "down": "fc2"},
    {"up": "intermediate.dense", "down": "output.dense"},
)
_NORMS: Final = (  # names of the norm before the feed-forward block, the surest first
    "pre_feedforward_layernorm", "pre_mlp_layernorm", "post_attention_layernorm", "ffn_norm", "ln_2", "norm_2", "ln_mlp",
    "input_layernorm", "ln_1",
)  # fmt: skip
_WIDTH_KEYS: Final = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff", "inner_dim")


@dataclass(frozen=True, kw_only=True)
class Recognised(Family):
    """A family that was recognised from a model's modules. Its shape and activation come from there, not from the config.

    Attributes:
        found_shape: the shape of the model.
        found_activation: the activation of the model.
    """

    found_shape: Shape
    found_activation: Activation

    def activation_of(self, config: Any) -> Activation:
        return self.found_activation

    def shape(self, config: Any) -> Shape:
        return self.found_shape


def skeleton(config: Any) -> Any:
    """A language model of transformers on the meta device, without memory: a causal one, or one that also takes images.

    Args:
        config: a config object, or the dictionary in config.json.

    Raises:
        UnsupportedModelError: transformers cannot build such a model.
    """
    try:
        with torch.device("meta"):
            return _built(config_object(config) if isinstance(config, dict) else config)
    except Exception as error:  # with a wrong config, a model's code may raise anything
        raise UnsupportedModelError(
            "this architecture is not supported",
            where="config.json",
            expected="a causal language model that transformers can build",
            got=f"{get(config, 'model_type')!r}: {in_a_line(error)}",
            hint="a model with code of its own: load it with from_pretrained(..., trust_remote_code=True), or describe its "
            "feed-forward layers with hf_flash.register_family",
        ) from error


def _built(config: Any) -> Any:
    """A model of the first auto class that knows this kind of config."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    errors = []
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        try:
            return auto.from_config(config)
        except ValueError as error:  # the class does not know it, or the config is wrong
            errors.append(error)
    raise errors[0]


def config_object(values: dict[str, Any]) -> Any:
    """The transformers config for the values of a config.json."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**_decoded(values))


def _decoded(value: Any) -> Any:
    """A value of config.json, including floats that JSON cannot express: transformers writes `{"__float__": "NaN"}`."""
    if isinstance(value, dict):
        return float(value["__float__"]) if value.keys() == {"__float__"} else {k: _decoded(v) for k, v in value.items()}
    return [_decoded(item) for item in value] if isinstance(value, list) else value


def recognise(model: Any) -> Family:
    """Recognise the family of a model.

    Args:
        model: a causal language model of transformers, on any device, including meta. It is not changed.

    Raises:
        UnsupportedModelError: it is not recognised; the message names what was expected.
    """
    experts = [type(module).__name__ for path, module in decoder_of(model).named_modules() if "experts" in path.split(".")]
    if experts:
        raise _not_recognised(
            model, "blocks of neurons, or experts in the form that transformers shares among models", f"experts of {experts[0]}"
        )
    name, layers = _decoder_layers(model)
    found = [dict(_blocks(layer)) for layer in layers]
    paths = [path for path in found[0] if all(path in blocks for blocks in found)]
    if len(paths) != 1:
        raise _not_recognised(model, *_what_differs(name, layers, found, paths))
    path = paths[0]
    matrices = found[0][path]
    blocks = [layer.get_submodule(path) for layer in layers]
    columns = frozenset(role for role, linear in matrices.items() if _is_by_column(blocks[0].get_submodule(linear), role))
    where = f"{name}.0{'.' * bool(path)}{path} of {type(model).__name__}"
    arithmetic = arithmetic_of(blocks[0], matrices, where) if path else inline_arithmetic_of(blocks[0], matrices, where)
    shape = _shape(model, blocks, matrices)
    norms = [norm for norm in _NORMS if isinstance(getattr(layers[0], norm, None), nn.Module)]
    return Recognised(
        model_type=model.config.model_type, matrices=matrices, block=path, columns=columns, layers=name,
        d_ff_key=_width_key(model.config, shape), norm=(norms or [""])[0], adds_residual=arithmetic.adds_residual,
        activation=arithmetic.attribute if not path else "", found_shape=shape, found_activation=arithmetic.activation,
    )  # fmt: skip


def _decoder_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers, and its name in the decoder."""
    decoder = decoder_of(model)
    lists = [
        (name, module) for name, module in decoder.named_modules()
        if name.count(".") < 2 and isinstance(module, nn.ModuleList) and len(module)
    ]  # fmt: skip
    with_blocks = [(name, layers) for name, layers in lists if dict(_blocks(layers[0]))]
    if len(with_blocks) != 1:
        raise _not_recognised(
            model,
            f"one list of decoder layers with feed-forward blocks in {type(decoder).__name__}",
            f"lists {_listed(lists)}, with blocks {_listed(with_blocks)}",
        )
    return with_blocks[0]


def _listed(lists: list[tuple[str, nn.ModuleList]]) -> str:
    return ", ".join(name for name, _ in lists) or "none"


def _blocks(layer: nn.Module) -> Iterator[tuple[str, Mapping[Role, str]]]:
    """Modules in a decoder layer that hold linear layers under known names: paths and names; `""` is the layer itself."""
    inside = {path for path, module in layer.named_modules() if path.count(".") < 2 and _is_linear(module)}
    yield from (("", names) for names in _INLINE if set(names.values()) <= inside)
    for path, module in layer.named_modules():
        if not path or path.count(".") > 1:
            continue
        held = {name: child for name, child in module.named_children() if _is_linear(child)}
        matches = [names for names in _NAMES if set(names.values()) <= held.keys() and _fits(held, names)]
        if matches:
            yield path, matches[0]


def _fits(held: Mapping[str, Any], names: Mapping[Role, str]) -> bool:
    """Whether up has as many outputs as down has inputs; twice as many if gate and up are fused."""
    first, last = (held[names[role]] for role in ("up", "down"))  # `_is_linear` has checked their weights
    given, taken = first.weight.shape[is_turned(first)], last.weight.shape[not is_turned(last)]
    return bool(given == taken * list(names.values()).count(names["up"]))


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.ndim == 2 and not isinstance(module, nn.Embedding)


def _is_by_column(linear: nn.Module, role: Role) -> bool:
    """Whether a unit is a column of the matrix: so for down. In a `Conv1D`, which has its inputs first, it is the opposite."""
    return (role == "down") != is_turned(linear)


def _shape(model: Any, blocks: list[nn.Module], matrices: Mapping[Role, str]) -> Shape:
    downs: list[Any] = [block.get_submodule(matrices["down"]) for block in blocks]
    sizes = [tuple(down.weight.shape) for down in downs]
    d_models, widths = zip(*(size[::-1] if is_turned(downs[0]) else size for size in sizes), strict=True)
    if len(set(d_models)) > 1:
        raise _not_recognised(model, "feed-forward blocks as wide as each other", f"outputs of {sorted(set(d_models))} numbers")
    config = model.config.get_text_config()
    heads = _number(config, "num_attention_heads") or 1
    kv_heads = _number(config, "num_key_value_heads") or heads
    return Shape(d_models[0], widths, heads, kv_heads, _number(config, "head_dim") or max(1, d_models[0] // heads))


def _number(config: Any, key: str) -> int | None:
    """A positive integer of a config; `None` if it has none that holds for all layers."""
    try:
        found = get(config, key)
    except Exception:  # noqa: BLE001  # transformers raises for configs whose layers differ
        return None
    return found if isinstance(found, int) and found > 0 else None


def _width_key(config: Any, shape: Shape) -> str:
    """The config key that has the number of neurons of a layer; the first known key if none matches."""
    text = config.get_text_config()
    return next((key for key in _WIDTH_KEYS if _number(text, key) == shape.d_ff), _WIDTH_KEYS[0])


def _what_differs(
    name: str, layers: nn.ModuleList, found: list[dict[str, Mapping[Role, str]]], paths: list[str]
) -> tuple[str, str]:
    """For the error: what was expected of the decoder layers, and what they have instead."""
    if paths:
        return "one feed-forward block in a decoder layer", f"{', '.join(paths)} in {name}.0"
    first, *_ = found[0]
    without = next(index for index, blocks in enumerate(found) if first not in blocks)
    inside = ", ".join(child for child, _ in layers[without].named_children())
    return f"{first} in every decoder layer", f"layer {without} with {inside}"


def _not_recognised(model: Any, expected: str, got: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        "the feed-forward layers of this model are not recognised",
        where=f"{type(model).__name__} ({model.config.model_type})",
        expected=expected,
        got=got,
        hint="describe them with hf_flash.register_family, if they are of two or three matrices",
    )
