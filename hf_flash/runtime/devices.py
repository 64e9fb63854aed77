"""What a loaded flash model does differently from its class, with devices, dtypes, foreign weights and copies.

The FFN computes on the CPU. `pipeline()` moves models to an accelerator by default where there is one; it leaves those alone
that have an `hf_device_map`, as accelerate gives them, and so flash models get one there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Final, NoReturn

import torch
from torch import nn

from hf_flash.errors import UsageError
from hf_flash.runtime.flash_embedding import FlashEmbedding
from hf_flash.runtime.flash_weights import OnFlash, refuse_adapter, without_flash_weights
from hf_flash.runtime.model_class import stock_methods
from hf_flash.runtime.torch_internals import target_device


def stay_on_cpu(model: Any) -> None:
    """Give the model a device map where a pipeline would move it. Elsewhere a map would make `pipeline(device="cpu")` fail."""
    if torch.accelerator.is_available():
        model.hf_device_map = {"": "cpu"}


def _to(model: Any, *args: Any, **kwargs: Any) -> Any:
    device = target_device(*args, **kwargs)
    if device is not None and device.type not in ("cpu", "meta"):
        _stay(device)
    return stock_methods(model).to(*args, **kwargs)


def _cuda(model: Any, *args: Any, **kwargs: Any) -> NoReturn:
    _stay("cuda")


def _stay(device: object) -> NoReturn:
    raise UsageError(
        "a flash model computes on the CPU",
        where="moving the model",
        expected="cpu",
        got=device,
        hint="leave it there: a pipeline needs no device argument, lm-eval needs --device cpu",
    )


def _apply(model: Any, fn: Callable[[torch.Tensor], torch.Tensor], *args: Any, **kwargs: Any) -> Any:
    """What `.to`, `.half()`, `.float()` and `.type()` call. It refuses them before anything is converted."""
    for module in model.modules():
        if isinstance(module, OnFlash):
            module.check_conversion(fn)
    return stock_methods(model)._apply(fn, *args, **kwargs)


def _load_state_dict(model: Any, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """FFN weights are taken if they are those on flash, and refused before anything is loaded otherwise."""
    return stock_methods(model).load_state_dict(without_flash_weights(model, state_dict), *args, **kwargs)


def _load_adapter(model: Any, peft_model_id: str | None = None, adapter_name: str | None = None, **kwargs: Any) -> Any:
    """An adapter is loaded whole or not at all: transformers would pass over what belongs on the FFN, and only report it."""
    info = stock_methods(model).load_adapter(peft_model_id, adapter_name, **kwargs)
    ours = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, OnFlash))
    if dropped := sorted(name for name in info.unexpected_keys if name.startswith(ours)):
        model.delete_adapter(adapter_name or "default")
        refuse_adapter(dropped)
    return info


def _resize_token_embeddings(model: Any, *args: Any, **kwargs: Any) -> Any:
    """The table of embeddings is in memory from here on."""
    for module in model.modules():
        if isinstance(module, FlashEmbedding) and args + tuple(kwargs.values()):
            module.into_memory()
    return stock_methods(model).resize_token_embeddings(*args, **kwargs)


def _empty(model: Any) -> Any:
    kind: Any = type(model)
    return kind.__new__(kind)


def _deepcopy(model: Any, memo: dict[int, Any]) -> Any:
    """A model that has the weights in memory again, outside of any budget, and shares the store and the windows."""
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
    "half": nn.Module.half,  # those of transformers refuse every quantized model, also what changes nothing
    "float": nn.Module.float,
    "_apply": _apply,
    "load_state_dict": _load_state_dict,
    "load_adapter": _load_adapter,
    "resize_token_embeddings": _resize_token_embeddings,
    "__deepcopy__": _deepcopy,
    "__copy__": _copy,
    "__reduce_ex__": _reduce,
}
