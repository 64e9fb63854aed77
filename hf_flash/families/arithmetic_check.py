"""Contract C9: the result of a feed-forward block is compared with what hf_flash would compute in its place.

The model's own block runs on random input, with small random matrices in place of its own. This reveals any activation, factor,
clamp or norm that hf_flash would leave out. It needs no weights of the model, so it is done before they load.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import nn

from hf_flash.compute.activation import Activation, activation_like
from hf_flash.errors import UnsupportedModelError
from hf_flash.families.base import Family, is_fused
from hf_flash.families.decoder import replace_module
from hf_flash.store.unit import Role

_D_MODEL, _NEURONS, _TOKENS = 24, 40, 7
_SEED: Final = 3
_HINT: Final = "nothing that reads it from flash would compute what this block does"
_FUNCTIONAL: Final = (nn.functional.silu, nn.functional.gelu, nn.functional.relu)


@dataclass(frozen=True)
class BlockArithmetic:
    """What a block computes besides the products with its matrices.

    Attributes:
        activation: the function between the matrices.
        attribute: the block's attribute with the activation, or a torch function's name; inline, the path in the decoder layer.
        adds_residual: whether the block is called with hidden states and the residual, to which it adds its result.
    """

    activation: Activation
    attribute: str
    adds_residual: bool = False


def check_arithmetic(layer: nn.Module, family: Family, activation: Activation, where: str) -> None:
    """Refuse a decoder layer whose feed-forward block computes something else than its family describes.

    Args:
        layer: a decoder layer of the model, on any device. It is not changed.
        activation: the family's activation for the model's config.
        where: the layer's name, for the error.

    Raises:
        UnsupportedModelError: it names the difference.
    """
    if family.inline:
        found = inline_arithmetic_of(layer, family.matrices, where)
    else:
        found = arithmetic_of(layer.get_submodule(family.block), family.matrices, f"{family.block} of {where}")
    if activation.code is None:
        named = activation_like(activation.function)  # a function may have several names
        activation = replace(named, of_both=activation.of_both)
    said = activation.text, family.activation if family.inline else "", family.adds_residual
    computed = found.activation.text, found.attribute if family.inline else "", found.adds_residual
    if said != computed:
        raise _differs(where, "the activation {} {}, residual added: {}".format(*said), "{} {}, {}".format(*computed))


def arithmetic_of(block: nn.Module, matrices: Mapping[Role, str], where: str) -> BlockArithmetic:
    """Find out how a block computes `down(act(up x))` or `down(act(gate x) * up x)`.

    Args:
        block: the model's own module, on any device. It is not changed.
        matrices: names of its linear layers.
        where: the block's name, for the error.

    Raises:
        UnsupportedModelError: it computes something else.
    """
    held = {name for tensors in (block.named_parameters, block.named_buffers) for name, _ in tensors(remove_duplicate=False)}
    weights, biases = ({f"{name}.{kind}" for name in matrices.values()} for kind in ("weight", "bias"))
    if not weights <= held <= weights | biases:
        raise UnsupportedModelError(
            "a feed-forward block does not hold what its family describes",
            where=where,
            expected=f"{', '.join(sorted(weights))}, and perhaps their biases",
            got=", ".join(sorted(held)),
            hint=_HINT,
        )
    if is_fused(matrices) and any(f"{name}.bias" in held for name in matrices.values()):
        raise _differs(where, "a linear layer for gate and up without a bias", "one with a bias")
    inside = {name.partition(".")[0] for name in weights}
    with _on_its_own():
        tried = _Trial(block, matrices)
        wanted = tried.of_block(where)
        for (name, function), of_both in itertools.product(_functions(block), (False, True)):
            if name not in inside and tried.agrees(wanted, function, of_both=of_both):
                return BlockArithmetic(replace(activation_like(function), of_both=of_both), name, tried.adds_residual)
    formula = "down(act(gate x) * up x)" if "gate" in matrices else "down(act(up x))"
    raise _differs(where, f"{formula}, with an activation that is an attribute of the block", "other numbers on random input")


def inline_arithmetic_of(layer: nn.Module, matrices: Mapping[Role, str], where: str) -> BlockArithmetic:
    """The same for linear layers that are attributes of a decoder layer: what passes between them is recorded.

    The layer runs with few neurons, and with modules in place of its attention that return their input.
    """
    parent = matrices["up"].rpartition(".")[0]
    with _on_its_own():
        for name, function in _attributes(layer.get_submodule(parent)):
            path = ".".join(filter(None, (parent, name)))
            if _passes_through(layer, matrices, path, where):
                return BlockArithmetic(activation_like(function), path)
    raise _differs(where, "an activation that is an attribute of the layer between up and down", "something else between them")


def _passes_through(layer: nn.Module, matrices: Mapping[Role, str], activation: str, where: str) -> bool:
    """Whether, in a forward of the layer, the activation gets the output of up, and down that of the activation."""
    random = torch.Generator().manual_seed(_SEED)
    trial, width = _small_layer(layer, matrices, activation, random)
    x = torch.randn(1, _TOKENS, width, generator=random, dtype=torch.float32, device="cpu")
    seen: dict[str, tuple[Any, Any]] = {}
    for path in (*matrices.values(), activation):
        keep = functools.partial(seen.__setitem__, path)
        trial.get_submodule(path).register_forward_hook(lambda _, args, out, keep=keep: keep((args[0], out)))
    try:
        trial(x)
    except Exception as error:  # a layer's code may raise anything
        raise _differs(where, "a decoder layer that runs on hidden states alone", in_a_line(error)) from error
    (_, up), (before, after), (hidden, _) = (
        seen.get(path, (None, None)) for path in (matrices["up"], activation, matrices["down"])
    )
    return all(isinstance(tensor, torch.Tensor) for tensor in (up, before, after, hidden)) and (
        torch.equal(up, before) and torch.equal(after, hidden)
    )


def _small_layer(
    layer: nn.Module, matrices: Mapping[Role, str], activation: str, random: torch.Generator
) -> tuple[nn.Module, int]:
    """A copy of a decoder layer with few neurons and without attention, and its width."""
    trial: Any = copy.deepcopy(layer).eval()
    width = int(trial.get_submodule(matrices["down"]).weight.shape[0])
    for role, path in matrices.items():
        inputs, outputs = (_NEURONS, width) if role == "down" else (width, _NEURONS)
        linear = nn.Linear(inputs, outputs, dtype=torch.float32, device="cpu")
        linear.weight.copy_(torch.randn(outputs, inputs, generator=random, dtype=torch.float32, device="cpu") / inputs**0.5)
        replace_module(trial, path, linear)
    replace_module(trial, activation, _Watched(operator.attrgetter(activation)(trial)))
    used = {path.partition(".")[0] for path in (*matrices.values(), activation)}
    for name, child in trial.named_children():
        if name not in used and any(tensor.ndim > 1 for tensor in child.parameters()):
            setattr(trial, name, _Passing())
    for module in trial.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if tensor.is_meta:  # the weights of norms
                ones = torch.ones(tensor.shape, dtype=torch.float32, device="cpu")
                setattr(module, name, nn.Parameter(ones) if isinstance(tensor, nn.Parameter) else ones)
    return trial, width


class _Watched(nn.Module):
    """A function as a module, so that it can be hooked."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


class _Passing(nn.Module):
    """Replaces attention: returns the hidden states, and no attention weights."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, None]:
        return next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None


class _Trial:
    """Small random matrices and input, with which the block and hf_flash's arithmetic are compared."""

    def __init__(self, block: nn.Module, matrices: Mapping[Role, str]) -> None:
        self._matrices, random = matrices, torch.Generator().manual_seed(_SEED)
        self._block = copy.deepcopy(block).eval()
        self.adds_residual = _takes_residual(self._block)
        self._residual = torch.randn(1, _TOKENS, _D_MODEL, generator=random, dtype=torch.float32, device="cpu")
        self._x = 2 * torch.randn(1, _TOKENS, _D_MODEL, generator=random, dtype=torch.float32, device="cpu")
        self._tensors, self._by_role = dict[str, torch.Tensor](), dict[str, tuple[torch.Tensor, torch.Tensor | None]]()
        for role, name in matrices.items():  # the parts of a fused matrix are appended to each other
            linear: Any = self._block.get_submodule(name)
            shape = (_D_MODEL, _NEURONS) if role == "down" else (_NEURONS, _D_MODEL)
            weight = torch.randn(shape, generator=random, dtype=torch.float32, device="cpu") / shape[1] ** 0.5
            bias = torch.randn(shape[0], generator=random, dtype=torch.float32, device="cpu")
            has_bias, turned = getattr(linear, "bias", None) is not None, is_turned(linear)
            if turned:
                linear.nf = shape[0]
            before = [self._tensors[f"{name}.weight"]] if f"{name}.weight" in self._tensors else []
            self._tensors[f"{name}.weight"] = weight.T.contiguous() if turned else torch.cat([*before, weight])
            self._tensors |= {f"{name}.bias": bias} if has_bias else {}
            self._by_role[role] = weight, bias if has_bias else None

    def of_block(self, where: str) -> torch.Tensor:
        """The block's own result."""
        try:
            given = (self._x, self._residual) if self.adds_residual else (self._x,)
            found = torch.func.functional_call(self._block, self._tensors, given)
        except Exception as error:  # a module's code may raise anything
            raise _differs(where, "a module that is called with hidden states alone", in_a_line(error)) from error
        if not isinstance(found, torch.Tensor) or found.shape != self._x.shape:
            got = f"{type(found).__name__} {list(getattr(found, 'shape', []))}"
            raise _differs(where, "a tensor in the shape of its input", got)
        return found

    def agrees(self, wanted: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor], *, of_both: bool) -> bool:
        """Whether the arithmetic of neurons with this activation gives the same result."""
        products = [self._product(role, self._x) for role in ("gate", "up") if role in self._matrices]
        if of_both and len(products) == 1:
            return False
        try:
            out = self._product("down", Activation("", function, of_both=of_both).hidden(*products))
            return torch.allclose(out + self._residual if self.adds_residual else out, wanted, rtol=1e-4, atol=1e-4)
        except (RuntimeError, TypeError, ValueError):  # not an activation
            return False

    def _product(self, role: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self._by_role[role]
        return nn.functional.linear(x, weight, bias)


@contextmanager
def _on_its_own() -> Iterator[None]:
    """Run without settings of the loader or the user: default device, gradients, autocast."""
    with torch.device("cpu"), torch.no_grad(), torch.autocast("cpu", enabled=False):
        yield


def in_a_line(error: Exception) -> str:
    """The type and message of another library's error in one line, at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def is_turned(linear: nn.Module) -> bool:
    """Whether a linear layer is a `Conv1D` of transformers, whose matrix is [inputs, outputs]."""
    return type(linear).__name__ == "Conv1D"


def _functions(block: nn.Module) -> Iterator[tuple[str, Callable[[torch.Tensor], torch.Tensor]]]:
    """Candidates for a block's activation: its attributes, and torch functions that its forward may call directly."""
    yield from _attributes(block)
    yield from ((function.__name__, function) for function in _FUNCTIONAL)


def _attributes(block: nn.Module) -> Iterator[tuple[str, Callable[[torch.Tensor], torch.Tensor]]]:
    """The modules without parameters, and the functions, that are attributes of a block."""
    for name, child in block.named_children():
        if not any(True for _ in child.parameters()):
            yield name, child
    for name, value in vars(block).items():
        if name != "forward" and not name.startswith("_") and callable(value) and not isinstance(value, type | nn.Module):
            yield name, value


def _takes_residual(block: nn.Module) -> bool:
    """Whether a block is called with hidden states and the residual."""
    needed = [p for p in inspect.signature(block.forward).parameters.values() if p.default is p.empty]
    return [p.name for p in needed if p.kind is p.POSITIONAL_OR_KEYWORD][1:] == ["residual"]


def _differs(where: str, expected: str, got: Any) -> UnsupportedModelError:
    return UnsupportedModelError(
        "a feed-forward block does not compute what hf_flash would compute in its place",
        where=where,
        expected=expected,
        got=got,
        hint=_HINT,
    )
