"""`Activation`: the function between a layer's matrices, and which neurons it leaves active.

All known activations are in one table. Where an activation leaves exact zeros, neurons can be skipped without changing the
answer. The functions come from transformers, under the names that configs use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from hf_flash.errors import UnsupportedModelError

Elementwise = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Activation:
    """An elementwise function.

    Attributes:
        name: as in the config.
        function: applies it to a tensor of any shape.
        code: its number in the compiled part; `None` if the compiled part does not know it, so that torch computes it.
        zeros: whether it is exactly zero for inputs at or below `level`, which are most inputs in a trained model.
        level: 0, or above (FATReLU).
        of_both: in a layer with a gate, whether it is also applied to the product with up (dReLU).
    """

    name: str
    function: Elementwise
    code: int | None = None
    zeros: bool = False
    level: float = 0.0
    of_both: bool = False

    @property
    def text(self) -> str:
        """The name, with the parameters that decide what it computes."""
        return f"{self.name}{f' above {self.level:g}' * bool(self.level)}{' of gate and up' * self.of_both}"

    def active(self, before: torch.Tensor) -> torch.Tensor:
        """Which pre-activations of the deciding part count as active: bool, in the shape of `before`."""
        return before > self.level if self.zeros else torch.ones_like(before, dtype=torch.bool)

    def hidden(self, deciding: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden values from the products with gate and up. In a layer without a gate, `deciding` is the product with up."""
        hidden = self.function(deciding)
        return hidden if up is None else hidden * (self.function(up) if self.of_both else up)


RELU, RELU2, RELU6 = 1, 2, 3  # as in native.h
FATRELU: Final = "fatrelu"  # x above a level from the config, else 0; transformers has no such function
_KNOWN: Final[Mapping[str, dict[str, Any]]] = {
    "relu": {"code": RELU, "zeros": True}, "relu6": {"code": RELU6, "zeros": True}, "relu2": {"code": RELU2, "zeros": True},
}  # fmt: skip
_LEARNT: Final = ("prelu", "xielu")  # they have learnt parameters, so a name does not identify a function
WITH_ZEROS: Final = (*(name for name, known in _KNOWN.items() if known["zeros"]), FATRELU)
"""Activations that leave exact zeros, by their names in a config."""


def activation_named(name: object, where: str = "activation", *, level: float | None = None) -> Activation:
    """The activation that a config names.

    Args:
        where: the config key of the name, for the error.
        level: the level of `fatrelu`, from the config.

    Raises:
        UnsupportedModelError: transformers has no such function.
    """
    from transformers.activations import ACT2FN  # imports kernels, flash attention and more, which loading may not need

    if name == FATRELU and isinstance(level, float | int) and level >= 0:
        return _fatrelu(float(level))
    if name not in ACT2FN:
        raise UnsupportedModelError(
            "unknown activation function", where=where, expected=f"one of {', '.join(ACT2FN)}", got=repr(name)
        )
    return Activation(str(name), ACT2FN[name], **_KNOWN.get(str(name), {}))


def activation_like(function: Elementwise) -> Activation:
    """The activation that a model holds as a module or a function, under its transformers name if it has one.

    A function matches a name if both give the same bits over all magnitudes.
    """
    from transformers.activations import ACT2FN

    grid = torch.cat([sign * torch.logspace(-6, 2, 400, dtype=torch.float32, device="cpu") for sign in (-1.0, 1.0)])
    found = _answer(function, grid)
    for name in ACT2FN:
        if name not in _LEARNT and torch.equal(_answer(ACT2FN[name], grid), found):
            return activation_named(name)
    fatrelu = _fatrelu(_level(function))
    if torch.equal(fatrelu.function(grid), found):
        return fatrelu
    return Activation(getattr(function, "__name__", type(function).__name__), function)


def _fatrelu(level: float) -> Activation:
    """FATReLU: inputs above a level pass unchanged, all others become zero."""
    return Activation(FATRELU, torch.nn.Threshold(level, 0.0), RELU, zeros=True, level=level)


def _level(function: Elementwise) -> float:
    """The largest positive input that a function maps to zero, if it is zero up to there; found by bisection."""
    low, high = 0.0, 100.0
    for _ in range(64):
        middle = torch.tensor([(low + high) / 2], dtype=torch.float32, device="cpu")
        answer = _answer(function, middle)
        low, high = (float(middle), high) if answer.numel() and not answer.any() else (low, float(middle))
    return low


def _answer(function: Elementwise, x: torch.Tensor) -> torch.Tensor:
    """The result of an activation; an empty tensor if it cannot be called with a tensor alone."""
    try:
        with torch.no_grad(), torch.device("cpu"):
            return function(x)
    except (RuntimeError, TypeError, AttributeError):
        return torch.empty(0, dtype=torch.float32, device="cpu")
