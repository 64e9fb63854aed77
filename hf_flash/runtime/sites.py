"""How a `FlashFFN` stands in a model, so that names, parameters and state dicts stay those of the model's class.

BlockFFN      replaces one feed-forward module, with modules under the names of its linear layers inside;
              ResidualBlockFFN one that is also called with the residual
InlineFFN     replaces the first of linear layers that are attributes of the decoder layer itself (OPT); the activation
              and the last linear layer are replaced by modules that pass on what it computed
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NoReturn

import torch
from torch import nn

from hf_flash.compute.activation import Activation, Elementwise
from hf_flash.errors import UsageError
from hf_flash.runtime.flash_weights import Matrix, OnFlash
from hf_flash.runtime.layer import FlashFFN
from hf_flash.store.unit import Role

_ON_FLASH: Final = "weights on flash, LoRA only on attention"  # what PEFT quotes when it refuses a layer


def empty_bias(linear: Any) -> nn.Parameter | None:
    """A bias like that of the linear layer that is replaced: of the dtype and on the device that the loader chose."""
    bias = getattr(linear, "bias", None)
    return None if bias is None else nn.Parameter(torch.empty_like(bias), requires_grad=False)


class WeightOnFlash(OnFlash):
    """A module that stands where a linear layer stood.

    Attributes:
        index: of the layer.
        role: of the matrix.
        bias: of the linear layer, if it had one.
    """

    index: int
    role: Role
    bias: nn.Parameter | None

    def put(self, matrix: Matrix) -> None:
        """Say what the weight is. Called once the rest of the model is loaded."""
        self.flash_weights = {"weight": matrix}


class Projection(WeightOnFlash):
    """Stands where a linear layer of a replaced block stood. The block computes its product and reads its bias here."""

    def __init__(self, index: int, role: Role, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.index, self.role, self.bias = index, role, bias

    def forward(self, x: torch.Tensor) -> NoReturn:
        raise UsageError(
            "this projection is computed by its feed-forward block, not by itself",
            where=f"FFN of layer {self.index}, {self.role}",
            hint="call the block",
        )

    def extra_repr(self) -> str:
        return _ON_FLASH


class BlockFFN(FlashFFN):
    """Stands where a feed-forward module stood.

    Args:
        names: of its linear layers, by role.
        biases: of these, or `None`.
    """

    def __init__(
        self,
        index: int,
        d_ff: int,
        d_model: int,
        activation: Activation,
        *,
        names: Mapping[Role, str],
        biases: Mapping[Role, nn.Parameter | None],
    ) -> None:
        super().__init__(index, d_ff, d_model, activation)
        self._names = dict(names)
        for role, name in names.items():
            if not hasattr(self, name):  # two roles may share a matrix
                setattr(self, name, Projection(index, role, biases[role]))

    @property
    def projections(self) -> dict[Role, WeightOnFlash]:
        return {role: getattr(self, name) for role, name in self._names.items()}

    def extra_repr(self) -> str:
        return f"layer={self.index}, d_model={self.d_model}, d_ff={self.d_ff}, {_ON_FLASH}"


class ResidualBlockFFN(BlockFFN):
    """A feed-forward module that adds what it computes to the residual."""

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = residual + super().forward(x)
        return out


class InlineFFN(FlashFFN, WeightOnFlash):
    """Stands where the first linear layer stood, and keeps its parameter name `bias`.

    Args:
        last: what stands where the last linear layer stood. It is not registered as a part of this module.
    """

    role: Role = "up"

    def __init__(
        self, index: int, d_ff: int, d_model: int, activation: Activation, bias: nn.Parameter | None, last: LastProjection
    ) -> None:
        super().__init__(index, d_ff, d_model, activation)
        self.bias = bias
        self.__dict__["_last"] = last

    @property
    def projections(self) -> dict[Role, WeightOnFlash]:
        return {"up": self, "down": self.__dict__["_last"]}

    def extra_repr(self) -> str:
        return f"layer={self.index}, d_model={self.d_model}, d_ff={self.d_ff}, {_ON_FLASH}"


class PassingActivation(nn.Module):
    """Stands where the activation stood, and passes on what [`InlineFFN`] has computed already.

    If somebody has put a plain up projection in its place, what comes is as wide as that, and is activated here.
    """

    def __init__(self, activation: Elementwise, d_model: int) -> None:
        super().__init__()
        self.activation, self.d_model = activation, d_model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] == self.d_model:
            return x
        found: torch.Tensor = self.activation(x)
        return found


class LastProjection(WeightOnFlash):
    """Stands where the last linear layer stood, and passes on what [`InlineFFN`] has computed. Its bias is added there."""

    role: Role = "down"

    def __init__(self, index: int, d_model: int, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.index, self.d_model, self.bias = index, d_model, bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] != self.d_model:
            raise UsageError(
                "the up projection in front was replaced by something that is not on flash, this one was not",
                where=f"FFN of layer {self.index}",
                expected=f"the output of the layer, [tokens, {self.d_model}]",
                got=list(x.shape),
                hint="replace both projections of the layer",
            )
        return x

    def extra_repr(self) -> str:
        return _ON_FLASH
