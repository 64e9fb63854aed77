"""Contract C9 for mixtures: the result of a module of experts is compared with what hf_flash computes in its place.

The stock module's own forward runs on random input, with small random experts in place of its own. It needs no weights of the
model, so it is done before they load.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import nn

from hf_flash.compute.expert_gate import stock_gate
from hf_flash.errors import UnsupportedModelError
from hf_flash.families.experts import expert_modules, first_of, sizes_of, small_sizes
from hf_flash.store.experts import SECOND

_TOKENS, _USED, _SEED = 7, 3, 3
_NORM: Final = "post_expert_norm"


def check_experts(model: Any) -> None:
    """Refuse a model whose experts compute something else than hf_flash would.

    Args:
        model: a transformers model on the meta device. It is not changed.

    Raises:
        UnsupportedModelError: it names the difference.
    """
    tried = set[type]()
    for name, module in expert_modules(model).items():
        if type(module) not in tried:
            tried.add(type(module))
            _check(module, f"{name} of {type(model).__name__}")


def _check(module: Any, where: str) -> None:
    experts, width, _ = sizes_of(module)
    used = min(_USED, experts)
    with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.device("cpu"):
        torch.manual_seed(_SEED)
        small = _small_module(module)
        x, weights = (
            torch.randn(_TOKENS, small_sizes(module)[width], dtype=torch.float32, device="cpu"),
            torch.rand(_TOKENS, used, dtype=torch.float32, device="cpu"),
        )
        index = torch.stack([torch.randperm(experts, dtype=torch.int64, device="cpu")[:used] for _ in range(_TOKENS)])
        try:
            stock = type(module).forward(small, x, index, weights)
        except Exception as error:  # a module's code may need attributes that it lacks here, and fail in any way
            raise _differs(where, f"{type(error).__name__}: {error}") from error
        mine = _computed(small, x, index, weights)
    if not isinstance(stock, torch.Tensor) or stock.shape != mine.shape:
        raise _differs(where, f"{type(stock).__name__} {list(getattr(stock, 'shape', ()))} for {list(x.shape)}")
    if not torch.allclose(stock, mine, rtol=1e-4, atol=1e-5):
        raise _differs(where, f"sums that differ by {float((stock - mine).abs().max()):.2g}")


def _small_module(module: Any) -> Any:
    """A module of the same class and settings, with as many experts, but small ones."""
    kind: Any = type(module)
    small, sizes = kind.__new__(kind), small_sizes(module)
    nn.Module.__init__(small)
    for name, value in vars(module).items():
        if not name.startswith("_") or type(value) is bool:  # nn.Module's own attributes stay new
            vars(small)[name] = sizes.get(value, value) if type(value) is int else value
    small.num_experts = sizes_of(module)[0]
    small.config = _Eager(module.config)
    for name, child in module.named_children():
        small.add_module(name, child)
    if module.has_post_expert_norm:
        small.add_module(_NORM, nn.RMSNorm(sizes[sizes_of(module)[1]], dtype=torch.float32, device="cpu"))
    for name, parameter in module.named_parameters(recurse=False):
        shape = [parameter.shape[0], *(sizes.get(size, size) for size in parameter.shape[1:])]
        values = 0.5 * torch.randn(shape, dtype=torch.float32, device="cpu")
        small.register_parameter(name, nn.Parameter(values, requires_grad=False))
    return small


class _Eager:
    """A config that makes experts compute by their own code, not by a shared function of transformers."""

    _experts_implementation = "eager"

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def _computed(module: Any, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The result of hf_flash, computed token by token and expert by expert."""
    first = first_of(module)
    out = torch.zeros_like(x)
    for token in range(len(x)):
        for expert, weight in zip(index[token].tolist(), weights[token], strict=True):
            hidden = _product(module, first, expert, x[token : token + 1])
            hidden = stock_gate(module, hidden)
            found = _product(module, SECOND, expert, hidden)
            out[token] += weight * (module.post_expert_norm(found) if module.has_post_expert_norm else found)[0]
    return out


def _product(module: Any, name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
    matrix = module.get_parameter(name)[expert]
    found: torch.Tensor = x @ (matrix if module.is_transposed else matrix.T)
    return found + module.get_parameter(f"{name}_bias")[expert] if module.has_bias else found


def _differs(where: str, got: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        "a module of experts computes something else than its description says",
        where=where,
        expected="for each token, the sum over its experts of weight * down(gate(up x))",
        got=got,
        hint="nothing that reads it from flash would compute what this module does",
    )
