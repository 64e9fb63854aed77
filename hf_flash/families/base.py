"""`Family`: how a kind of model names and shapes its feed-forward layers. It is data, not a torch module.

A family is one value: names in the module tree, names in the checkpoint, keys of the config. Everything else follows from it.
CONTRIBUTING.md tells how to add one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final

from hf_flash.compute.activation import Activation, activation_named
from hf_flash.errors import StoreFormatError, UnsupportedModelError
from hf_flash.store.names import NOTICES
from hf_flash.store.unit import COLUMN, HALVES, ROLES, ROW, Part, Role


@dataclass(frozen=True)
class Shape:
    """Sizes of a model.

    Attributes:
        d_model: width of the residual stream.
        widths: neurons of each layer's FFN.
        heads, kv_heads: attention heads, of queries, and of keys and values, which may be fewer.
        head_dim: numbers in a head.
    """

    d_model: int
    widths: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def layers(self) -> int:
        return len(self.widths)

    @property
    def d_ff(self) -> int:
        """Neurons of the widest layer."""
        return max(self.widths)

    def kv_bytes(self, itemsize: int) -> int:
        """Bytes of the KV cache per token, with numbers of `itemsize` bytes."""
        return 2 * self.layers * self.kv_heads * self.head_dim * itemsize


@dataclass(frozen=True)
class LayerNames:
    """Names of one layer's matrices in a plain checkpoint.

    Attributes:
        matrices: one name for each part, in the family's order.
        prefix: the prefix of the layer's tensor names in a store.
    """

    index: int
    matrices: tuple[str, ...]
    prefix: str

    @property
    def bundles(self) -> str:
        return f"{self.prefix}.bundles"


@dataclass(frozen=True)
class Family:
    """One kind of model. The defaults fit most families.

    Attributes:
        model_type: as in config.json.
        matrices: the name of the linear layer for each role, in the order of a unit's parts. If gate and up have the same name,
            that linear layer returns the gate's numbers first, then up's; it has no bias.
        block: the name of the feed-forward module inside a decoder layer, which is replaced as a whole; `""`: the linear layers
            are attributes of the decoder layer itself, and are replaced one by one.
        activation: the attribute of the decoder layer that holds the activation module, if `block` is `""`; else unused.
        columns: the roles whose matrix has a neuron in a column.
        adds_residual: whether the block is called with hidden states and the residual, to which it adds its result.
        layers: the path of the list of decoder layers inside the decoder, and in the names of checkpoints.
        activation_of_both: in a block with a gate, whether the activation is also applied to the product with up (dReLU).
        activation_key, level_key, heads_key, kv_heads_key, head_dim_key: keys of the config. `level_key` has the level above
            which `fatrelu` passes its input unchanged.
        d_ff_key: the config key of the number of neurons, one for all layers or a list with one for each layer.
        norm: the attribute of a decoder layer that holds the norm before the FFN; `""`: none that lookahead could use.
        norm_first_key: the config key that tells whether that norm comes before the FFN; `""`: it always does.
    """

    model_type: str
    matrices: Mapping[Role, str]
    block: str = "mlp"
    activation: str = ""
    columns: frozenset[Role] = frozenset({"down"})
    adds_residual: bool = False
    layers: str = "layers"
    activation_of_both: bool = False
    activation_key: str = "hidden_act"
    level_key: str = "hidden_act_param"
    d_ff_key: str = "intermediate_size"
    heads_key: str = "num_attention_heads"
    kv_heads_key: str = "num_key_value_heads"
    head_dim_key: str = "head_dim"
    norm: str = "post_attention_layernorm"
    norm_first_key: str = ""

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts of the family's units."""
        halves = iter(HALVES if is_fused(self.matrices) else ())
        return tuple(Part(role, COLUMN if role in self.columns else next(halves, ROW)) for role in self.matrices)

    @property
    def inline(self) -> bool:
        """Whether the linear layers are attributes of the decoder layer."""
        return not self.block

    @cached_property
    def _modules(self) -> tuple[str, ...]:
        """Names of the linear layers inside a decoder layer, in the order of the parts."""
        return tuple(".".join(filter(None, (self.block, name))) for name in self.matrices.values())

    def names(self, tensors: Iterable[str]) -> list[LayerNames]:
        """The FFN matrices among the tensors of a plain checkpoint, by layer.

        Raises:
            StoreFormatError: a layer lacks matrices, there are no layers, or there are several stacks of layers.
        """
        known, (first, *others) = set(tensors), self._modules
        stem = rf"(?P<stem>(?:.*\.)?{re.escape(self.layers)}\.)"
        pattern = re.compile(rf"(?P<layer>{stem}(?P<index>\d+)\.){re.escape(first)}\.weight")
        matches = [match for name in known if (match := pattern.fullmatch(name))]
        if len(stems := sorted({match["stem"] for match in matches})) > 1:
            raise StoreFormatError(
                "the checkpoint has several stacks of layers with FFN matrices: nothing says which one is meant",
                where=self.model_type,
                expected=f"names that begin alike up to {self.layers}.N.{first}.weight",
                got=" and ".join(f"{stem}N.{first}.weight" for stem in stems),
            )
        found = {int(match["index"]): match["layer"] for match in matches}
        layers = [
            LayerNames(i, tuple(f"{found[i]}{name}.weight" for name in self._modules), found[i] + first) for i in sorted(found)
        ]
        broken = [name for layer in layers for name in layer.matrices if name not in known]
        if not layers or sorted(found) != list(range(len(layers))) or broken:
            wanted = ", ".join(f"{self.layers}.N.{name}.weight" for name in (first, *others[:-1]))
            raise StoreFormatError(
                "the checkpoint lacks FFN matrices of this architecture",
                where=self.model_type,
                expected=f"{wanted} and {self.layers}.N.{others[-1]}.weight for every layer N",
                got=f"layers {sorted(found)}, without {broken}",
            )
        return layers

    def activation_of(self, config: Any) -> Activation:
        """The activation that a config names. Raises `UnsupportedModelError` if transformers does not know it."""
        named = activation_named(get(config, self.activation_key), self.activation_key, level=get(config, self.level_key))
        return replace(named, of_both=self.activation_of_both)

    def shape(self, config: Any) -> Shape:
        """Sizes from a config, an object or a dictionary. Raises `UnsupportedModelError` if a model cannot have them."""
        layers, d_model, heads = (_size(config, name) for name in ("num_hidden_layers", "hidden_size", self.heads_key))
        kv_heads, head_dim = get(config, self.kv_heads_key) or heads, get(config, self.head_dim_key) or d_model // heads
        return Shape(d_model, self._widths(config, layers), heads, kv_heads, head_dim)

    def _widths(self, config: Any, layers: int) -> tuple[int, ...]:
        """Neurons of each layer: the config has one number for all layers, or a list."""
        found = get(config, self.d_ff_key)
        if not isinstance(found, list | tuple):
            return (_size(config, self.d_ff_key),) * layers
        if len(found) != layers or not all(type(value) is int and value > 0 for value in found):
            expected = f"{layers} numbers, each 1 or more"
            raise UnsupportedModelError("a size in config.json is none", where=self.d_ff_key, expected=expected, got=found)
        return tuple(found)

    def looks_ahead(self, config: Any) -> bool:
        """Whether the norm before the FFN turns the layer's input into a good guess of the FFN's input, for lookahead."""
        return bool(self.norm) and (not self.norm_first_key or bool(get(config, self.norm_first_key)))

    @property
    def store_keys(self) -> list[str]:
        """Patterns of the names in a checkpoint that transformers' loader must skip."""
        names, layer = "|".join(map(re.escape, self._modules)), rf"{re.escape(self.layers)}\.\d+\."
        return [
            rf"{layer}({names})\.weight$",
            rf"{layer}{re.escape(self._modules[0])}\.(bundles|place|predictor\..+|calibration\..+)$",
            r"^calibration\.",
            *(f"^{re.escape(notice)}$" for notice in NOTICES),
        ]


def is_fused(matrices: Mapping[Role, str]) -> bool:
    """Whether gate and up are one linear layer."""
    return len(set(matrices.values())) < len(matrices)


def check_family(family: Family) -> None:
    """Refuse a description of a family that is not valid. `register_family` calls this.

    Raises:
        UnsupportedModelError: it names the invalid field.
    """
    roles = set(family.matrices)
    if not {"up", "down"} <= roles <= set(ROLES) or list(family.matrices)[-1] != "down":
        wanted = 'names for "up" and "down", and perhaps "gate"; "down" comes last'
        raise _invalid(family, "matrices", wanted, dict(family.matrices))
    if family.inline and "gate" in roles:
        wanted = 'names for "up" and "down" alone, where the linear layers are attributes of the decoder layer (`block=""`)'
        raise _invalid(family, "matrices", wanted, dict(family.matrices))
    if family.inline and not family.activation:
        wanted = "the attribute of the decoder layer with the activation module"
        raise _invalid(family, "activation", wanted, repr(family.activation))
    names = list(family.matrices.values())
    fused = list(family.matrices) == list(ROLES) and names[0] == names[1] != names[2] and family.columns == {"down"}
    if is_fused(family.matrices) and not fused:
        wanted = 'one linear layer for "gate" and "up", in this order, with neurons in rows, and another for "down"'
        raise _invalid(family, "matrices", wanted, dict(family.matrices))
    if not family.columns <= roles:
        raise _invalid(family, "columns", f"some of {', '.join(family.matrices)}", ", ".join(sorted(family.columns)))


def _invalid(family: Family, field: str, expected: str, got: object) -> UnsupportedModelError:
    return UnsupportedModelError("a family is not valid", where=f"{field} of {family.model_type}", expected=expected, got=got)


def _size(config: Any, key: str) -> int:
    """An integer of a config that is 1 or more. Raises `UnsupportedModelError` if it is not."""
    value = get(config, key)
    if type(value) is not int or value < 1:
        raise UnsupportedModelError("a size in config.json is none", where=key, expected="1 or more", got=value)
    return value


def get(config: Any, key: str) -> Any:
    """A value of a config, which is an object or the dictionary in config.json; `None` if it is not set."""
    return config.get(key) if isinstance(config, dict) else getattr(config, key, None)


_LENGTH_KEYS: Final = ("max_position_embeddings", "max_seq_len", "seq_length", "n_ctx")
_UNBOUNDED: Final = 1 << 17


def longest_sequence(config: Any) -> int:
    """The most tokens that a model is made for, from its config; 131 072 if nothing bounds them, as with ALiBi."""
    found = (get(config.get_text_config(), key) for key in _LENGTH_KEYS)
    return next((value for value in found if type(value) is int and value > 0), _UNBOUNDED)
