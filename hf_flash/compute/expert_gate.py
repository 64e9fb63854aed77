"""`ExpertGate`: the function between the products of an expert, if the compiled part knows it.

The stock module's own code (`_apply_gate`, or `act_fn`) is the reference. It is compared on random numbers, some of them large,
with the functions of the compiled part. If none of them agrees, the gate is left to torch, which is slower for few tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F

from hf_flash.compute.library import ExpertGate

_SILU, _SWIGLU, _RELU2 = 0, 1, 2  # EXPERT_SILU, EXPERT_SWIGLU and EXPERT_RELU2 of native.h
_NO_LIMIT: Final = float("inf")
_LIMITS: Final = ("swiglu_limit", "limit")  # attributes of stock modules
_ROWS, _NEURONS, _SEED = 64, 32, 5
_SIZES: Final = (1.0, 10.0, 100.0)  # standard deviations of the random numbers


class _Known(NamedTuple):
    """A gate function of the compiled part.

    Attributes:
        code: its number in native.h.
        compute: the same function by torch, of products [rows, outputs], the limit and alpha.
        gated: whether the products hold both gate and up.
    """

    code: int
    compute: Callable[[torch.Tensor, float, float], torch.Tensor]
    gated: bool = True


def _silu(products: torch.Tensor, limit: float, alpha: float) -> torch.Tensor:
    gate, up = products.chunk(2, dim=-1)
    return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


def _swiglu(products: torch.Tensor, limit: float, alpha: float) -> torch.Tensor:
    gate, up = products[..., ::2].clamp(max=limit), products[..., 1::2].clamp(-limit, limit)
    return (up + 1) * (gate * torch.sigmoid(gate * alpha))


def _relu2(products: torch.Tensor, limit: float, alpha: float) -> torch.Tensor:
    return F.relu(products).square()


_FUNCTIONS: Final = (_Known(_SILU, _silu), _Known(_SWIGLU, _swiglu), _Known(_RELU2, _relu2, gated=False))


def known_gate(module: Any) -> ExpertGate | None:
    """The gate of a stock module of experts, for the compiled part; `None` if the compiled part does not know it."""
    limits = [float(found) for name in _LIMITS if isinstance(found := getattr(module, name, None), int | float)]
    alpha = float(getattr(module, "alpha", 1.0)) if isinstance(getattr(module, "alpha", 1.0), int | float) else 1.0
    random = torch.Generator().manual_seed(_SEED)
    width = _NEURONS * (2 if module.has_gate else 1)
    tries = [size * torch.randn(_ROWS, width, generator=random, dtype=torch.float32, device="cpu") for size in _SIZES]
    with torch.no_grad():
        stock = [_stock(module, products) for products in tries]
    for known in _FUNCTIONS:
        for limit in (_NO_LIMIT, *limits):
            if known.gated == bool(module.has_gate) and _agree(known, stock, tries, limit, alpha):
                return ExpertGate(limit, alpha, known.code)
    return None


def stock_gate(module: Any, products: torch.Tensor) -> torch.Tensor:
    """The hidden values that a stock module of experts makes of its first products, by its own code.

    That code is `_apply_gate`, which every class has that transformers' `use_experts_implementation` (integrations/moe.py,
    since 5.0) decorates, or `act_fn` where `has_gate` is false.

    Args:
        products: [rows, outputs].

    Returns:
        [rows, neurons].
    """
    hidden: torch.Tensor = module._apply_gate(products) if module.has_gate else module.act_fn(products)
    return hidden


def _stock(module: Any, products: torch.Tensor) -> Any:
    try:
        return stock_gate(module, products)
    except Exception:  # noqa: BLE001  # a module's code may need attributes that it lacks, and fail in any way
        return None


def _agree(known: _Known, stock: list[Any], tries: list[torch.Tensor], limit: float, alpha: float) -> bool:
    for wanted, products in zip(stock, tries, strict=True):
        found = known.compute(products, limit, alpha)
        if not isinstance(wanted, torch.Tensor) or wanted.shape != found.shape:
            return False
        if not torch.allclose(found, wanted, rtol=1e-5, atol=1e-6):
            return False
    return True
