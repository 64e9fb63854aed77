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
_KNOWN: Final[Mapping[str, dict[str, Any]]] = {"relu": {"code": RELU, "zeros": True}}
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
