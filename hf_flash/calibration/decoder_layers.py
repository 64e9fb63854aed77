"""Decoder layers one by one: the only place of calibration that knows how transformers calls them.

Calibration runs all tokens through one decoder layer before it turns to the next. transformers has no public way to do that,
so this module relies on four things that `tests/contract/test_transformers_seam.py` holds transformers to:

- `model.get_decoder().layers` are the decoder layers, in order.
- The model hands the first layer its hidden states as the only positional argument, or as `hidden_states`; all else by name.
- What the model hands the first layer by name is what it hands every layer, for the same tokens.
- A layer returns its hidden states, alone or as the first item of a tuple.
"""

from __future__ import annotations

from typing import Any

import torch

from hf_flash.errors import UnsupportedModelError


def decoder_layers(model: Any) -> Any:
    """The decoder layers of a causal language model, in order."""
    return model.get_decoder().layers


class _Entered(Exception):
    """Ends a forward at the door of the first decoder layer."""


def first_layer_call(model: Any, batch: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
    """What the first decoder layer is called with. No decoder layer runs.

    Args:
        batch: token ids [windows, context].

    Returns:
        Hidden states [windows, context, d_model], and the other arguments by name: they do for every layer.

    Raises:
        UnsupportedModelError: the layer is called in another way than this module knows.
    """
    call: list[Any] = []

    def stop(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call.extend((args, kwargs))
        raise _Entered

    handle = decoder_layers(model)[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(batch, use_cache=False)
    except _Entered:
        pass
    finally:
        handle.remove()
    args, kwargs = call
    if len(args) + ("hidden_states" in kwargs) != 1:
        raise UnsupportedModelError(
            "decoder layers are called in a way that calibration does not know",
            where=type(model).__name__,
            expected="hidden states as the only positional argument, or as `hidden_states`",
            got=f"{len(args)} positional arguments, and {', '.join(kwargs)} by name",
        )
    return (args[0] if args else kwargs.pop("hidden_states")), kwargs


def run_layer(layer: Any, hidden: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    """Hidden states behind a decoder layer; `arguments` as [`first_layer_call`] gave them."""
    out = layer(hidden, **arguments)
    behind: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return behind
