"""Methods in which a loaded flash model differs from its class: devices, dtypes, foreign weights and copies.

A flash model stays where it was loaded: on the CPU, or where `device_map` put it. If there is an accelerator, `pipeline()`
moves models to the first one by default, except those with an `hf_device_map`, as accelerate sets it. So flash models that are
elsewhere get one.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Final, NoReturn

import torch
from torch import nn

from hf_flash.errors import ConfigError, UsageError
from hf_flash.runtime.flash_embedding import FlashEmbedding
from hf_flash.runtime.flash_weights import OnFlash, refuse_adapter, refuse_move, without_flash_weights
from hf_flash.runtime.model_class import stock_methods
from hf_flash.runtime.torch_internals import target_device

logger = logging.getLogger("hf_flash")


def check_places(device_map: Mapping[str, Any]) -> None:
    """Check that a device map makes sense for a flash model.

    Raises:
        ConfigError: it names no device, the disk, a device that is not available, or several devices.
    """
    places = {str(place) for place in device_map.values()}
    if not places or "None" in places:
        raise ConfigError(
            "no device is named", where="device_map", expected='such as {"": "cuda:0"}', got=dict(device_map),
            hint='name one, or leave device_map out',
        )  # fmt: skip
    if "disk" in places:
        raise ConfigError(
            "hf_flash already keeps the FFN weights on disk",
            where="device_map",
            got=dict(device_map),
            hint='remove "disk" from device_map; memory_budget says how much may stay in memory',
        )
    here = str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else None
    kinds = {"cuda" if place.isdigit() and here is None else _kind(place) for place in places}
    if absent := sorted(kinds - {"cpu", here}):
        raise ConfigError(
            f"torch finds no such device here: the model computes on the CPU{f' or on {here}' if here else ''}",
            where="device_map",
            expected=f'"cpu", "auto" or None{f", or a device such as {here}:0" if here else ""}',
            got=", ".join(absent),
            hint="leave device_map out to compute on the CPU; for a GPU, install a torch that is built for it",
        )
    numbers = {index for place in places if (index := _index(place)) is not None and here is not None and _kind(place) == here}
    if beyond := sorted(index for index in numbers if index >= torch.accelerator.device_count()):
        raise ConfigError(
            "torch finds no device of this number",
            where="device_map",
            expected=f"{here}:0 to {here}:{torch.accelerator.device_count() - 1}",
            got=beyond,
            hint="name one that is there, or the cpu",
        )
    if len(places) > 1:
        raise ConfigError(
            "a flash model computes on one device",
            where="device_map",
            expected='one device, such as "cuda:0" or "cpu"',
            got=dict(device_map),
            hint="name one: what does not fit there stays on flash, or in this machine's memory if memory_budget names it",
        )


def _kind(place: str) -> str:
    return torch.device(int(place) if place.isdigit() else place).type


def _index(place: str) -> int | None:
    return int(place) if place.isdigit() else torch.device(place).index


def placed(device_map: Any) -> tuple[Any, torch.device | None]:
    """A device map with full device names, and the device that it names; `None`: the CPU.

    transformers loads in threads of its own, where a name without an index may mean another device than here.
    """
    if isinstance(device_map, str):
        device_map = {"": torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"}
    if not device_map:
        _say_where()
        return device_map, None
    device = _device_of(next(iter(device_map.values())))
    return (device_map if device is None else dict.fromkeys(device_map, device)), device


@lru_cache
def _say_where() -> None:
    """Log, once, that a device is available that the user has not named."""
    if torch.accelerator.is_available():
        name = torch.accelerator.current_accelerator()
        logger.warning('hf_flash: this model computes on the CPU; device_map="%s" puts it on the device that torch finds', name)


def _device_of(place: Any) -> torch.device | None:
    """The device that a value of a device map names; `None`: the CPU. `"cpu:0"` makes the CPU compute like a device."""
    found = torch.device(place)
    if found.type != "cpu":
        return torch.device(found.type, torch.accelerator.current_device_index() if found.index is None else found.index)
    if str(found) == "cpu":
        return None
    logger.warning('hf_flash: "cpu:0" computes as a GPU would, which is for tests and slow; "cpu" is the fast way')
    return found


def stay_there(model: Any) -> None:
    """Give the model a device map if a pipeline would move it. Otherwise a map would only make `pipeline(device=...)` fail."""
    if torch.accelerator.is_available() and (model.device.type == "cpu" or model.device.index):
        model.hf_device_map = {"": model.device}


def _to(model: Any, *args: Any, **kwargs: Any) -> Any:
    device = target_device(*args, **kwargs)
    if device is not None:
        _check_device(model, device)
    return stock_methods(model).to(*args, **kwargs)


def _cuda(model: Any, device: Any = None) -> Any:
    _check_device(model, torch.device("cuda", device) if isinstance(device, int) else torch.device(device or "cuda"))
    return model


def _cpu(model: Any) -> Any:
    _check_device(model, torch.device("cpu"))
    return model


def _check_device(model: Any, device: torch.device) -> None:
    """Refuse to move a model off the device it was loaded on, where its units have their slots."""
    place = next(module.place for module in model.modules() if isinstance(module, OnFlash))
    if device.type == "meta" or (device.type == place.type == "cpu"):
        return
    if device.type != place.type or (torch.accelerator.current_device_index() if device.index is None else device.index) != (
        place.index or 0
    ):
        refuse_move(place, device)


def _apply(model: Any, fn: Callable[[torch.Tensor], torch.Tensor], *args: Any, **kwargs: Any) -> Any:
    """`.to`, `.half()`, `.float()` and `.type()` call this. It refuses other dtypes and devices before it converts anything."""
    for module in model.modules():
        if isinstance(module, OnFlash):
            module.check_conversion(fn)
    return stock_methods(model)._apply(fn, *args, **kwargs)


def _load_state_dict(model: Any, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Accept FFN weights that equal those on flash; refuse others before anything is loaded."""
    return stock_methods(model).load_state_dict(without_flash_weights(model, state_dict), *args, **kwargs)


def _load_adapter(model: Any, peft_model_id: str | None = None, adapter_name: str | None = None, **kwargs: Any) -> Any:
    """Load an adapter whole or not at all: transformers would leave out the parts for the FFN, and only report them."""
    info = stock_methods(model).load_adapter(peft_model_id, adapter_name, **kwargs)
    ours = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, OnFlash))
    if dropped := sorted(name for name in info.unexpected_keys if name.startswith(ours)):
        model.delete_adapter(adapter_name or "default")
        refuse_adapter(dropped)
    return info


def _resize_token_embeddings(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Load the table of embeddings into memory, where it stays, before it is resized."""
    for module in model.modules():
        if isinstance(module, FlashEmbedding) and args + tuple(kwargs.values()):
            module.into_memory()
    return stock_methods(model).resize_token_embeddings(*args, **kwargs)


def _empty(model: Any) -> Any:
    kind: Any = type(model)
    return kind.__new__(kind)


def _deepcopy(model: Any, memo: dict[int, Any]) -> Any:
    """A copy with its own weights in memory, outside of any budget, that shares the store and the windows."""
    copied = _empty(model)
    memo[id(model)] = copied
    copied.__setstate__(copy.deepcopy(model.__dict__, memo))
    return copied


def _copy(model: Any) -> Any:
    copied = _empty(model)
    copied.__setstate__(dict(model.__dict__))
    return copied


def _reduce(model: Any, protocol: Any) -> NoReturn:
    raise UsageError(  # open files do not travel
        "a loaded flash model cannot be pickled",
        hint="load it again, in the other process too: it is all in the folder (save_pretrained keeps what was changed)",
    )


METHODS: Final = {
    "to": _to,
    "cuda": _cuda,
    "cpu": _cpu,
    "half": nn.Module.half,  # the methods of transformers refuse every quantized model, even if nothing would change
    "float": nn.Module.float,
    "_apply": _apply,
    "load_state_dict": _load_state_dict,
    "load_adapter": _load_adapter,
    "resize_token_embeddings": _resize_token_embeddings,
    "__deepcopy__": _deepcopy,
    "__copy__": _copy,
    "__reduce_ex__": _reduce,
}
