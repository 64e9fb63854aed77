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
        zeros: whether it is exactly zero for most inputs of a trained model.
    """

    name: str
    function: Elementwise
    code: int | None = None
    zeros: bool = False

    def active(self, before: torch.Tensor) -> torch.Tensor:
        """Which pre-activations count as active, bool, the shape of `before`."""
        return before > 0 if self.zeros else torch.ones_like(before, dtype=torch.bool)


RELU: Final = 1  # as in the compiled part
_KNOWN: Final[Mapping[str, dict[str, Any]]] = {
    "relu": {"code": RELU, "zeros": True}, "relu6": {"zeros": True}, "relu2": {"zeros": True},
}  # fmt: skip
_LEARNT: Final = ("prelu", "xielu")  # have parameters of their own: no two are the same function
WITH_ZEROS: Final = tuple(name for name, known in _KNOWN.items() if known.get("zeros"))
"""Those that leave exact zeros, as a config names them."""


def activation_named(name: object, where: str = "activation") -> Activation:
    """The activation of that name.

    Args:
        where: the name's key in the config, for the error.

    Raises:
        UnsupportedModelError: transformers has no such function.
    """
    from transformers.activations import ACT2FN  # brings kernels, flash attention and more, which loading may not need

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
    return Activation(getattr(function, "__name__", type(function).__name__), function)


def _answer(function: Elementwise, x: torch.Tensor) -> torch.Tensor:
    """What an activation gives; nothing if it cannot be called so."""
    try:
        with torch.no_grad(), torch.device("cpu"):
            return function(x)
    except (RuntimeError, TypeError, AttributeError):
        return torch.empty(0, dtype=torch.float32, device="cpu")
