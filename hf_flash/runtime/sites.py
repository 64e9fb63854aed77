"""How a `FlashFFN` fits into a model, so that names, parameters and state dicts stay those of the model's class.

BlockFFN      replaces one feed-forward module, and has modules under the names of its linear layers;
              ResidualBlockFFN replaces one that is also called with the residual
InlineFFN     replaces the first linear layer where linear layers are attributes of the decoder layer itself (OPT); the
              activation and the last linear layer are replaced by modules that pass on what it computed
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
    """An empty bias like that of the linear layer that is replaced: its dtype and device are those that the loader chose."""
    bias = getattr(linear, "bias", None)
    return None if bias is None else nn.Parameter(torch.empty_like(bias), requires_grad=False)


class WeightOnFlash(OnFlash):
    """A module in place of a linear layer.

    Attributes:
        index: the layer's index.
        role: the matrix's role in the block.
        bias: the linear layer's bias, if it had one.
    """

    index: int
    role: Role
    bias: nn.Parameter | None

    def put(self, matrix: Matrix) -> None:
        """Set the weight on flash that this module stands for. Called once the rest of the model is loaded."""
        self.flash_weights = {"weight": matrix}


class Projection(WeightOnFlash):
    """In place of a linear layer of a replaced block. The block computes its product, and finds the bias here."""

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
    """In place of a feed-forward module.

    Args:
        index, d_ff, d_model, activation: as in [`FlashFFN`].
        names: names of the module's linear layers, by role.
        biases: their biases, by role; `None` for a linear layer without one.
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
            if not hasattr(self, name):  # two roles may share a linear layer
                setattr(self, name, Projection(index, role, biases[role]))

    @property
    def projections(self) -> dict[Role, WeightOnFlash]:
        return {role: getattr(self, name) for role, name in self._names.items()}

    def extra_repr(self) -> str:
        return f"layer={self.index}, d_model={self.d_model}, d_ff={self.d_ff}, {_ON_FLASH}"


class ResidualBlockFFN(BlockFFN):
    """A feed-forward module that is also called with the residual, and adds its output to it."""

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = residual + super().forward(x)
        return out


class InlineFFN(FlashFFN, WeightOnFlash):
    """In place of the first linear layer, whose parameter name `bias` it keeps.

    Args:
        index, d_ff, d_model, activation: as in [`FlashFFN`].
        bias: the first linear layer's bias, if it had one.
        last: the module in place of the last linear layer. It is not registered as a submodule of this one.
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
    """In place of the activation: passes on what [`InlineFFN`] has computed already.

    If somebody has replaced the [`InlineFFN`] by a plain up projection, the input has another width, and is activated here.
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
    """In place of the last linear layer: passes on what [`InlineFFN`] has computed. That also adds the bias found here."""

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
