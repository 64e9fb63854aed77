"""What a loaded flash model does otherwise than its class where devices and copies are concerned.

The FFN computes on the CPU. `pipeline()` moves models to an accelerator by default where there is one; it leaves those alone
that have an `hf_device_map`, as accelerate gives them, and so flash models get one there.
"""

from __future__ import annotations

from typing import Any, Final, NoReturn

import torch

from .errors import UsageError


def stay_on_cpu(model: Any) -> None:
    """Tell pipelines, where they would move the model. Nowhere else: one with a map refuses `pipeline(device="cpu")`."""
    if torch.accelerator.is_available():
        model.hf_device_map = {"": "cpu"}


def _to(model: Any, *args: Any, **kwargs: Any) -> Any:
    device = torch._C._nn._parse_to(*args, **kwargs)[0]
    if device is not None and device.type not in ("cpu", "meta"):
        _stay(device)
    return super(type(model), model).to(*args, **kwargs)


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


def _reduce(model: Any, protocol: Any) -> NoReturn:
    raise UsageError(  # a copy would take the memory budget a second time, and open files do not travel
        "a loaded flash model cannot be copied or pickled",
        hint="load it again, in the other process too: it is all in the folder (save_pretrained keeps what was changed)",
    )


METHODS: Final = {"to": _to, "cuda": _cuda, "__reduce_ex__": _reduce}
"""Of a loaded flash model: another device is refused before anything is moved, and so are copies."""
