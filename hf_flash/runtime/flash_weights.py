"""The weights on flash as other code sees them: under their names, with numbers that are read when they are used.

The modules of a flash layer have no parameter `weight`, and its experts no `down_proj`. Code that is not ours uses these names
all the same: it makes a `state_dict()`, loads one, assigns `layer.fc1.weight`. [`OnFlash`] handles this:

    reading    gives a [`FlashWeight`]: name, shape and dtype at once, numbers from flash when they are used
    writing    raises a `UsageError`, unless the values are those on flash
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, NoReturn

import torch
from torch import nn

from hf_flash.base.buffers import aligned_empty
from hf_flash.base.sizes import format_bytes
from hf_flash.errors import UsageError
from hf_flash.machine.free_memory import available_memory
from hf_flash.runtime.torch_internals import (
    ADDRESSES,
    make_wrapper,
    replaced,
    same_metadata,
    transforming,
    without_torch_function,
    written,
)
from hf_flash.store.layer_file import LayerStore
from hf_flash.store.safetensors_files import read_header
from hf_flash.store.unit import Part

_NEURONS: Final = 1024  # read or compared at a time
_NAMES_SHOWN: Final = 4
_INSTEAD: Final = "change the plain checkpoint (`hf_flash.restore` gives it back), then repack that"


class StoredWeight(ABC):
    """A parameter of the plain model whose numbers are on flash.

    Attributes:
        name: the parameter's name, for messages.
        dtype: the compute dtype.
    """

    name: str
    dtype: torch.dtype

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]: ...

    @property
    @abstractmethod
    def layer_name(self) -> str:
        """The layer that it belongs to, for messages."""

    @abstractmethod
    def _read(self, out: torch.Tensor) -> None:
        """Read the parameter into `out`, a tensor of its shape and dtype."""

    @abstractmethod
    def _equals(self, other: torch.Tensor) -> bool:
        """Whether `other`, a tensor of its shape in memory, equals the parameter once it is rounded to its dtype."""

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def read(self) -> torch.Tensor:
        """Read the parameter into memory.

        Raises:
            UsageError: it does not fit there.
            StoreError: the file is gone or damaged.
        """
        free = available_memory()
        if self.nbytes > free:
            raise UsageError(
                "the weights on flash do not fit into memory, where something outside hf_flash wants them",
                where=self.name,
                expected=f"{format_bytes(self.nbytes)} for this parameter",
                got=f"{format_bytes(free)} free",
                hint="its own save_pretrained copies the flash model's files; `hf_flash.restore` writes plain ones",
            )
        whole = aligned_empty(self.shape, self.dtype)
        self._read(whole)
        return whole

    def equals(self, other: Any) -> bool:
        """Whether `other` has this parameter's shape, and its numbers once they are rounded to its dtype."""
        if isinstance(other, FlashWeight) and other.stored == self:
            return True
        if not isinstance(other, torch.Tensor) or tuple(other.shape) != self.shape or other.is_meta:
            return False
        return self._equals(other.detach())

    def refuse(self, other: Any) -> None:
        """Raise `UsageError` if `other` does not equal the parameter on flash."""
        if not self.equals(other):
            refuse_weights([self.name])


@dataclass(frozen=True)
class Matrix(StoredWeight):
    """One of a layer's matrices, as the plain model has it.

    Attributes:
        layer: the layer's store, which holds its numbers.
        name: its name in the plain checkpoint.
        dtype: the compute dtype.
    """

    layer: LayerStore
    name: str
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        return self._parts[0].plain_shape(self.layer.d_ff, self.layer.d_model)

    @property
    def layer_name(self) -> str:
        return str(self.layer.index)

    @property
    def _parts(self) -> list[Part]:
        return self.layer.parts_of(self.name)

    def _read(self, out: torch.Tensor) -> None:
        for part in self._parts:
            by_neuron = part.by_unit(out)
            for neurons, rows in self._blocks(part):
                by_neuron[neurons] = rows

    def _equals(self, other: torch.Tensor) -> bool:
        return all(
            torch.equal(part.by_unit(other)[neurons].cpu().to(self.dtype), rows)
            for part in self._parts
            for neurons, rows in self._blocks(part)
        )

    def _blocks(self, part: Part) -> Iterator[tuple[slice, torch.Tensor]]:
        """A part, some neurons at a time: which ones, and their rows [neurons, d_model] in the compute dtype."""
        read_header(self.layer.path)  # raises a clear error if the file is gone or damaged
        rows = self.layer.part(part.role)
        for at in range(0, self.layer.d_ff, _NEURONS):
            neurons = slice(at, min(at + _NEURONS, self.layer.d_ff))
            yield neurons, rows[neurons].to(self.dtype)


def refuse_weights(names: list[str]) -> NoReturn:
    """Raise the error that values for the weights under these names are not accepted."""
    raise UsageError(
        "the weights that a flash model has on flash are only read there: others cannot be put in their place",
        where=_some(names),
        expected="the values that are on flash",
        got="others",
        hint=_INSTEAD,
    )


def refuse_adapter(names: list[str]) -> NoReturn:
    """Raise the error that a module has no place for these weights, which `strict=False` would skip silently."""
    raise UsageError(
        "the layers of a flash model that are on flash take no adapters and no weights of another form",
        where=_some(names),
        expected="the parameters that the plain layer has",
        hint="merge them into the plain checkpoint, then repack that",
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else "")


class FlashWeight(torch.Tensor):
    """A parameter on flash as a tensor that cannot be written to: what `state_dict()` gives for `fc1.weight`.

    It costs nothing until it is used. An operator reads the parameter and drops it again. Only code that asks for its address
    or storage, as safetensors does, makes it stay in memory for as long as this object lives.
    """

    stored: StoredWeight
    _kept: torch.Tensor | None

    @staticmethod
    def __new__(cls, stored: StoredWeight, kept: torch.Tensor | None = None) -> FlashWeight:
        made = make_wrapper(cls, stored.shape, stored.dtype)
        made.stored, made._kept = stored, kept
        return made

    def read(self) -> torch.Tensor:
        return self.stored.read() if self._kept is None else self._kept

    def _again(self) -> FlashWeight:
        return FlashWeight(self.stored, self._kept)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == torch.Tensor.data.__get__:  # type: ignore[attr-defined]
            return args[0]._again()
        if func in _WRITERS and isinstance(args[0], cls):
            refuse_weights([args[0].stored.name])
        if func in ADDRESSES and isinstance(args[0], cls):
            args[0]._kept = args[0].read()
            args = args[0]._kept, *args[1:]
        with without_torch_function():
            return func(*args, **kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func in _SAME:
            return args[0]._again()
        kwargs = kwargs or {}
        if names := [weight.stored.name for weight in written(cls, func, args, kwargs)]:
            refuse_weights(names)
        args, kwargs = replaced(cls, cls.read, (args, kwargs))
        return func(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.read().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: Any) -> FlashWeight:
        return self._again()

    def __repr__(self, **how: Any) -> str:  # type: ignore[override]
        return f"FlashWeight({self.stored.name}, shape={list(self.stored.shape)}, dtype={self.stored.dtype})"


_WRITERS: Final = frozenset({torch.Tensor.data.__set__, torch.Tensor.__setitem__, torch.Tensor.set_})  # type: ignore[attr-defined]
_SAME: Final = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


class OnFlash(nn.Module):
    """A module with parameters on flash, in place of a linear layer, a table of embeddings or a module of experts.

    Attributes:
        flash_weights: these parameters, by their names in the module; empty before the model is loaded.
        place: where the model was loaded.
    """

    flash_weights: Mapping[str, StoredWeight] = MappingProxyType({})
    place = torch.device("cpu")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination.update({f"{prefix}{name}": FlashWeight(stored) for name, stored in self.flash_weights.items()})
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        ours = {f"{prefix}{name}": stored for name, stored in self.flash_weights.items()}
        if wrong := [key for key, stored in ours.items() if key in state_dict and not stored.equals(state_dict[key])]:
            refuse_weights(wrong)
        state_dict = {key: value for key, value in state_dict.items() if key not in ours}
        known = {*self._parameters, *self._buffers, *self._modules}
        strange = [key for key in state_dict if key.startswith(prefix) and key[len(prefix) :].split(".")[0] not in known]
        if ours and strange:
            refuse_adapter(strange)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getattr__(self, name: str) -> Any:
        if name in self.flash_weights:
            return FlashWeight(self.flash_weights[name])
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._put(name, value, lambda: super(OnFlash, self).__setattr__(name, value))

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        self._put(name, param, lambda: super(OnFlash, self).register_parameter(name, param))

    def register_buffer(self, name: str, tensor: torch.Tensor | None, persistent: bool = True) -> None:
        self._put(name, tensor, lambda: super(OnFlash, self).register_buffer(name, tensor, persistent))

    def _put(self, name: str, value: Any, otherwise: Callable[[], None]) -> None:
        """For names of weights on flash, refuse other values than theirs. For every other name call `otherwise`."""
        if name in self.flash_weights:
            self.flash_weights[name].refuse(value)
        else:
            otherwise()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        self.check_conversion(fn)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def check_conversion(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Raise `UsageError` if `fn` would change the dtype of the module's tensors, or move them."""
        for stored in self.flash_weights.values():
            before = torch.empty(0, dtype=stored.dtype, device=self.place)
            after = fn(before)
            if after.dtype != stored.dtype:
                refuse_dtype(after.dtype, stored.dtype, stored.name)
            if after.device not in (before.device, torch.device("meta")):
                refuse_move(self.place, after.device)

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_tracing("torch.jit.script")


def refuse_dtype(found: torch.dtype, wanted: torch.dtype, where: str) -> NoReturn:
    """Raise the error that the model's dtype was changed after loading."""
    raise UsageError(
        "the dtype of the model was changed after loading",
        where=where,
        expected=wanted,
        got=found,
        hint=f"load it with from_pretrained(..., dtype={found})",
    )


def place_name(place: torch.device) -> str:
    """Where a model computes, for messages."""
    return "the CPU" if place.type == "cpu" else str(place)


def refuse_move(place: torch.device, device: torch.device) -> NoReturn:
    """Raise the error that the model stays where it was loaded."""
    raise UsageError(
        f"this flash model computes on {place_name(place)}, and stays there",
        where="moving the model",
        expected=place,
        got=device,
        hint=f'leave it there (a pipeline needs no device argument), or load it with device_map="{device}"',
    )


def is_plain(x: Any) -> bool:
    """Whether this is a tensor with numbers of its own, rather than a subclass that dispatches operators itself."""
    return isinstance(x, torch.Tensor) and type(x).__torch_dispatch__ is torch.Tensor.__torch_dispatch__


def stand_in(x: Any) -> str | None:
    """The name of whatever traces or transforms a call with this input; `None`: nothing does.

    When something does, the input's numbers are only placeholders.
    """
    if not is_plain(x):
        return type(x).__name__
    if torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        return "torch.jit.trace"
    return transforming(x)


def is_in_memory(x: Any) -> bool:
    """Whether a tensor's numbers are its own and in this machine's memory, where compiled code may read them."""
    return type(x) in (torch.Tensor, nn.Parameter) and stand_in(x) is None and x.is_cpu and not x.is_neg() and x.data_ptr() != 0


def refuse_tracing(got: str) -> NoReturn:
    """Raise the error that a flash layer cannot be traced."""
    raise UsageError(
        "a flash layer cannot be traced, exported or transformed: what it reads and computes is chosen anew for every token",
        got=got,
        hint="torch.compile works; for the others take the plain checkpoint (`hf_flash.restore` gives it back)",
    )


def without_flash_weights(model: nn.Module, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """A state dict for a whole model, without the weights that are on flash.

    Raises:
        UsageError: it has other values for some of these.
    """
    ours = {
        f"{name}.{param}": stored
        for name, module in model.named_modules()
        if isinstance(module, OnFlash)
        for param, stored in module.flash_weights.items()
    }
    wrong = [name for name, stored in ours.items() if name in state_dict and not stored.equals(state_dict[name])]
    if wrong:
        refuse_weights(wrong)
    rest = OrderedDict((name, value) for name, value in state_dict.items() if name not in ours)
    same_metadata(rest, state_dict)
    return rest
