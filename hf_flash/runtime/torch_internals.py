"""Everything of torch that hf_flash uses and that is not public. Nothing else in the package uses these names, with two
exceptions.

torch may change any of them in any release. `tests/contract/test_torch_seam.py` checks each against torch itself.

    torch._C._nn._parse_to                                     target_device
    torch.Tensor._make_wrapper_subclass                        make_wrapper
    torch._C.DisableTorchFunctionSubclass                      without_torch_function
    OpOverload._schema                                         written
    torch.utils._pytree                                        written, replaced
    torch.Tensor._typed_storage                                ADDRESSES
    torch._C._functorch.peek_interpreter_stack                 transforming
    torch.autograd.forward_ad._current_level                   transforming
    torch._C._TorchDispatchModeKey, torch._C._get_dispatch_mode, torch._ops._get_dispatch_mode_pre_dispatch
                                                               transforming
    _metadata of a state dict                                  same_metadata

The exceptions: predictors/low_bit.py uses torch's own low-bit products, which it tries out first. And modules override
`_apply`, `_save_to_state_dict`, `_load_from_state_dict` and `__prepare_scriptable__` of `nn.Module`, and read its
`_parameters`, `_buffers` and `_modules`: this has to be in the class (flash_weights.py, resident_linear.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

import torch
from torch import _ops
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves, tree_map_only

_KEY: Final = torch._C._TorchDispatchModeKey
_dispatch_mode: Final = torch._C._get_dispatch_mode
_before_dispatch: Final[Callable[..., Any]] = _ops._get_dispatch_mode_pre_dispatch
_transforms: Final[Callable[..., Any]] = torch._C._functorch.peek_interpreter_stack

T = TypeVar("T", bound=torch.Tensor)

without_torch_function: Final = torch._C.DisableTorchFunctionSubclass
"""A context in which `__torch_function__` of subclasses is not called. torch's own default implementation uses it."""

ADDRESSES: Final[frozenset[Any]] = frozenset(
    {
        torch.Tensor.data_ptr, torch.Tensor.untyped_storage, torch.Tensor.storage, torch.Tensor._typed_storage,
        torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.__dlpack__, torch.Tensor.tolist,
    }
)  # fmt: skip
"""Methods that give access to a tensor's numbers or their address without calling an operator."""


def target_device(*args: Any, **kwargs: Any) -> torch.device | None:
    """The device among the arguments of `nn.Module.to`, which takes them in many forms; `None` if they name none."""
    device: torch.device | None = torch._C._nn._parse_to(*args, **kwargs)[0]
    return device


def make_wrapper(kind: type[T], shape: tuple[int, ...], dtype: torch.dtype) -> T:
    """A tensor of a subclass, on the CPU, that has a shape and a dtype but no numbers."""
    made: T = torch.Tensor._make_wrapper_subclass(kind, shape, dtype=dtype, device=torch.device("cpu"))
    return made


def written(kind: type[T], func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[T]:
    """The tensors of class `kind` that an operator writes to when it is called with these arguments."""
    given = (
        kwargs.get(argument.name, args[number] if number < len(args) else None)
        for number, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    return [part for value in given for part in tree_leaves(value) if isinstance(part, kind)]


def replaced(kind: type[T], change: Callable[[T], Any], given: Any) -> Any:
    """Arguments with every tensor of class `kind` replaced by `change(tensor)`, also within lists and dictionaries."""
    return tree_map_only(kind, change, given)


def transforming(x: torch.Tensor) -> str | None:
    """The name of what traces or transforms a call with this input from outside; `None`: nothing, as in ordinary calls."""
    if _transforms() is not None:
        return "torch.func"
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:  # type: ignore[no-untyped-call]
        return "forward-mode differentiation"
    if _dispatch_mode(_KEY.FAKE) is not None:
        return "a fake tensor mode"
    if (_dispatch_mode(_KEY.PROXY) or _before_dispatch(_KEY.PROXY)) is not None:
        return "a tracer such as make_fx"
    return None


def same_metadata(state_dict: Any, source: Any) -> None:
    """Copy the module versions of one state dict to another: `nn.Module.load_state_dict` looks for them there."""
    if hasattr(source, "_metadata"):
        state_dict._metadata = source._metadata
