"""Where each model family keeps its feed-forward layers: in the module tree, in the checkpoint, in the config.

Supporting another family means another [`Adapter`] here, and nothing elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn
from transformers.activations import ACT2FN

from hf_flash.errors import StoreFormatError, UnsupportedModelError
from hf_flash.runtime.flash_weights import stand_in
from hf_flash.runtime.layer import FlashFFN
from hf_flash.runtime.swap import DownBias, FlashActivation
from hf_flash.store.layout import NOTICE

_EXACT_ZEROS: Final = frozenset({"relu"})  # activations that leave most neurons exactly zero


@dataclass(frozen=True)
class FFNNames:
    """Names of one layer's FFN in a checkpoint."""

    index: int
    up: str
    down: str

    @property
    def bundles(self) -> str:
        return self.up.removesuffix(".weight") + ".bundles"


@dataclass(frozen=True)
class Adapter:
    """One family. The default values of the names are those of OPT.

    Attributes:
        model_type: as in config.json.
        up, down: module names inside a decoder layer.
        activation: the layer's activation module, and `activation_key` its name in the config.
    """

    model_type: str
    up: str = "fc1"
    down: str = "fc2"
    activation: str = "activation_fn"
    activation_key: str = "activation_function"
    d_ff_key: str = "ffn_dim"
    bias_key: str = "enable_bias"
    norm: str = "final_layer_norm"
    norm_first_key: str = "do_layer_norm_before"

    def names(self, tensors: Iterable[str]) -> list[FFNNames]:
        """The FFN matrices among the tensors of a plain checkpoint, by layer.

        Raises:
            StoreFormatError: a layer without both matrices, or none at all.
        """
        known = set(tensors)
        pattern = re.compile(rf"(?:.*\.)?layers\.(\d+)\.{self.up}\.weight")
        found = {int(match[1]): match[0] for name in known if (match := pattern.fullmatch(name))}
        layers = [
            FFNNames(i, found[i], found[i].removesuffix(f"{self.up}.weight") + f"{self.down}.weight") for i in sorted(found)
        ]
        broken = [layer.down for layer in layers if layer.down not in known]
        if not layers or sorted(found) != list(range(len(layers))) or broken:
            raise StoreFormatError(
                "the checkpoint lacks FFN matrices of this architecture",
                where=self.model_type,
                expected=f"layers.N.{self.up}.weight and layers.N.{self.down}.weight for every layer N",
                got=f"layers {sorted(found)}, without {broken}",
            )
        return layers

    def sparse(self, config: Any) -> bool:
        """Whether the activation leaves exact zeros, so that skipping neurons changes nothing."""
        return self.activation_name(config) in _EXACT_ZEROS

    def activation_name(self, config: Any) -> str:
        """The activation function's name; an error if transformers does not know it."""
        name = _get(config, self.activation_key)
        if name not in ACT2FN:
            raise UnsupportedModelError(
                "unknown activation function",
                where=self.activation_key,
                expected=f"one of {', '.join(ACT2FN)}",
                got=repr(name),
            )
        return str(name)

    def dims(self, config: Any) -> tuple[int, int, int]:
        """layers, d_ff and d_model; an error if they are none that a model could have."""
        found = {name: getattr(config, name) for name in ("num_hidden_layers", self.d_ff_key, "hidden_size")}
        for name, value in found.items():
            if type(value) is not int or value < 1:
                raise UnsupportedModelError("a size in config.json is none", where=name, expected="1 or more", got=value)
        layers, d_ff, d_model = found.values()
        return layers, d_ff, d_model

    def swap(self, model: nn.Module, dtype: torch.dtype) -> list[FlashFFN]:
        """Replace every FFN in a model whose parameters are still on the meta device. Returns the new modules, by layer."""
        config: Any = model.config
        _, d_ff, d_model = self.dims(config)
        bias = bool(getattr(config, self.bias_key))
        layers: Any = model.get_decoder().layers  # type: ignore[operator]
        ffns = []
        for index, layer in enumerate(layers):
            ffn = FlashFFN(index, d_ff, d_model, bias, getattr(layer, self.activation))
            for name, ours in ((self.up, ffn), (self.down, DownBias(index, d_model, bias, dtype))):
                stock = getattr(layer, name).bias
                if bias:  # of the dtype and on the device that the loader chose
                    ours.bias = nn.Parameter(torch.empty_like(stock), requires_grad=False)
                setattr(layer, name, ours)
            setattr(layer, self.activation, FlashActivation(ffn.activation, d_model))
            ffns.append(ffn)
        return ffns

    def watch(self, model: nn.Module, ffns: Sequence[FlashFFN]) -> None:
        """Let every layer's FFN look ahead while that layer's attention runs.

        The residual stream as it enters a layer, through the norm in front of the FFN, is close to what the FFN will get.
        Where the norm comes after the FFN there is nothing of the kind, and nothing is done.
        """
        if not getattr(model.config, self.norm_first_key):
            return
        layers: Any = model.get_decoder().layers  # type: ignore[operator]
        for layer, ffn in zip(layers, ffns, strict=True):
            layer.register_forward_pre_hook(_Lookahead(ffn, getattr(layer, self.norm)), with_kwargs=True)

    @property
    def store_keys(self) -> list[str]:
        """Patterns of the checkpoint names that are not for transformers' loader."""
        return [
            rf"layers\.\d+\.({self.up}|{self.down})\.weight$",
            rf"layers\.\d+\.{self.up}\.(bundles|place|predictor\..+|calibration\..+)$",
            r"^calibration\.",
            f"^{re.escape(NOTICE)}$",
        ]


class _Lookahead:
    """A hook before a decoder layer. Only for one token: several need most neurons, which no guess can spare."""

    def __init__(self, ffn: FlashFFN, norm: nn.Module) -> None:
        self.ffn, self.norm = ffn, norm

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: torch.Tensor = args[0] if args else kwargs["hidden_states"]
        if x.numel() == self.ffn.d_model and x.device.type == "cpu" and not stand_in(x):
            with torch.no_grad():
                self.ffn.look_ahead(self.norm(x.view(1, -1)))


_ADAPTERS: Final = {adapter.model_type: adapter for adapter in [Adapter("opt")]}


def adapter_for(config: Any) -> Adapter:
    """The adapter of a model, from its config (an object or the dictionary in config.json).

    Raises:
        UnsupportedModelError: no adapter for this architecture.
    """
    model_type = _get(config, "model_type")
    if model_type not in _ADAPTERS:
        raise UnsupportedModelError(
            "this architecture is not supported",
            where="model_type in config.json",
            expected=f"one of {', '.join(sorted(_ADAPTERS))}",
            got=repr(model_type),
        )
    return _ADAPTERS[model_type]


def _get(config: Any, key: str) -> Any:
    return config.get(key) if isinstance(config, dict) else getattr(config, key, None)
