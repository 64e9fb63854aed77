"""What a layer on flash refuses, whether it has neurons or experts: training, tracing, other dtypes and devices."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from hf_flash.errors import UsageError
from hf_flash.runtime.engine import SharedByLayers
from hf_flash.runtime.flash_weights import place_name, refuse_dtype, refuse_tracing, stand_in

E = TypeVar("E", bound=SharedByLayers)


def usable_engine(engine: E | None, layer: nn.Module, x: torch.Tensor, width: int, where: str) -> E:
    """The engine of a layer, if the layer can compute this input.

    Args:
        engine: the layer's engine; `None`: it was never attached.
        layer: the layer.
        x: the input, which has to be [..., width].
        width: the layer's width.
        where: the layer's name, for messages.

    Raises:
        UsageError: it cannot, for the reason that the message gives.
    """
    if tracer := stand_in(x):
        refuse_tracing(tracer)
    if layer.training:
        raise UsageError("a flash model is for inference only", where=where, got="model.train()", hint="call model.eval()")
    if engine is None:
        raise UsageError("the layer has no store", where=where, hint="load the model with from_pretrained")
    if x.device.type != engine.device.type or (x.device.index or 0) != (engine.device.index or 0):
        raise UsageError(
            f"what is on flash computes on {place_name(engine.device)}",
            where=where,
            expected=f"input on {engine.device}",
            got=x.device,
            hint=f'move the model back, or load it with device_map="{x.device}"',
        )
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise UsageError(
            "a flash layer cannot be part of a CUDA graph: what it reads is chosen anew for every token",
            where=where,
            hint="leave graphs out: use_cuda_graph=False in continuous batching",
        )
    if x.dtype != engine.dtype and not torch.is_autocast_enabled(x.device.type):
        refuse_dtype(x.dtype, engine.dtype, where)
    if x.shape[-1:] != (width,):
        raise UsageError("the input has another width", where=where, expected=f"[..., {width}]", got=list(x.shape))
    return engine


def without_backward(out: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
    """A layer's output, tracked if its inputs are, so that a backward raises an error instead of silently skipping it."""
    if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)):
        return out
    tracked: torch.Tensor = _NoBackward.apply(out, *inputs)  # type: ignore[no-untyped-call]
    return tracked


class _NoBackward(torch.autograd.Function):
    """Lets a forward run with gradients enabled, and refuses a backward."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        return out.clone()  # autograd would make `out` itself a view, to which models may not add in place

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise UsageError(
            "a flash model has no gradients: some of its weights are on flash", hint="use the plain checkpoint to train"
        )
