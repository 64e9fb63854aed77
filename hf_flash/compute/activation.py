"""`Activation`: what a layer does between its matrices, and what that says of its neurons.

One table. An activation that leaves exact zeros lets neurons be skipped without changing the answer. Functions come from
transformers, by the name that a config has for them.
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
        name: as a config has it.
        function: on any tensor.
        code: what the compiled part knows it by; `None`: it does not know it, and torch computes it.
        zeros: whether it is exactly zero for most inputs of a trained model: for those at or below `level`, that is.
        level: 0, or above (FATReLU).
        of_both: in a layer with a gate, whether it is done with the product with up, too (dReLU).
    """

    name: str
    function: Elementwise
    code: int | None = None
    zeros: bool = False
    level: float = 0.0
    of_both: bool = False

    @property
    def text(self) -> str:
        """Its name, with what else decides what it computes."""
        return f"{self.name}{f' above {self.level:g}' * bool(self.level)}{' of gate and up' * self.of_both}"

    def active(self, before: torch.Tensor) -> torch.Tensor:
        """Which pre-activations of the part that decides count as active, bool, the shape of `before`."""
        return before > self.level if self.zeros else torch.ones_like(before, dtype=torch.bool)

    def hidden(self, deciding: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden values, from the products with the gate and with up, or, in a layer without a gate, with up alone."""
        hidden = self.function(deciding)
        return hidden if up is None else hidden * (self.function(up) if self.of_both else up)


RELU, RELU2, RELU6 = 1, 2, 3  # as in the compiled part
FATRELU: Final = "fatrelu"  # x above a level that the config has, else 0: no function of transformers
_KNOWN: Final[Mapping[str, dict[str, Any]]] = {
    "relu": {"code": RELU, "zeros": True}, "relu6": {"code": RELU6, "zeros": True}, "relu2": {"code": RELU2, "zeros": True},
}  # fmt: skip
_LEARNT: Final = ("prelu", "xielu")  # have parameters of their own: no two are the same function
WITH_ZEROS: Final = (*(name for name, known in _KNOWN.items() if known["zeros"]), FATRELU)
"""Those that leave exact zeros, as a config names them."""


def activation_named(name: object, where: str = "activation", *, level: float | None = None) -> Activation:
    """The activation of that name.

    Args:
        where: the name's key in the config, for the error.
        level: of `fatrelu`, as the config has it.

    Raises:
        UnsupportedModelError: transformers has no such function.
    """
    from transformers.activations import ACT2FN  # brings kernels, flash attention and more, which loading may not need

    if name == FATRELU and isinstance(level, float | int) and level >= 0:
        return _fatrelu(float(level))
    if name not in ACT2FN:
        raise UnsupportedModelError(
            "unknown activation function", where=where, expected=f"one of {', '.join(ACT2FN)}", got=repr(name)
        )
    return Activation(str(name), ACT2FN[name], **_KNOWN.get(str(name), {}))


def activation_like(function: Elementwise) -> Activation:
    """An activation that a model has as a module or a function: under the name by which transformers knows it, if it does.

    A name means the same function where it gives the same bits, over all magnitudes.
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
    """Inputs above a level as they are, and zero for all others."""
    return Activation(FATRELU, torch.nn.Threshold(level, 0.0), RELU, zeros=True, level=level)


def _level(function: Elementwise) -> float:
    """The largest positive input whose answer is zero, if a function is zero up to there; found by halving."""
    low, high = 0.0, 100.0
    for _ in range(64):
        middle = torch.tensor([(low + high) / 2], dtype=torch.float32, device="cpu")
        answer = _answer(function, middle)
        low, high = (float(middle), high) if answer.numel() and not answer.any() else (low, float(middle))
    return low


def _answer(function: Elementwise, x: torch.Tensor) -> torch.Tensor:
    """What an activation gives; nothing if it cannot be called so."""
    try:
        with torch.no_grad(), torch.device("cpu"):
            return function(x)
    except (RuntimeError, TypeError, AttributeError):
        return torch.empty(0, dtype=torch.float32, device="cpu")
