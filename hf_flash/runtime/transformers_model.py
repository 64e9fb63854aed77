"""Everything of a transformers model that hf_flash uses and that is not public. Nothing else in the package uses these names.

transformers may change any of them in any release. Each is used in functions here, which say where transformers defines it, and
checked against transformers itself in `tests/contract/test_transformers_seam.py`.

    all_tied_weights_keys                    tied_names, tied_pairs
    _hf_peft_config_loaded                   has_adapter
    _keys_to_ignore_on_load_unexpected       ignore_on_load
    _is_hf_initialized                       mark_as_initialized
    _get_dtype_plan                          loaded_dtypes
    build_glob_alternation                   loaded_dtypes
    revert_weight_conversion                 plain_state
    _weight_conversions                      plain_state
    _original_source_patterns, and -target-  plain_state
    how the model calls its decoder          sequence_length
    how the model calls a decoder layer      hidden_of, first_layer_call
    what a decoder layer returns             run_layer

Some modules rely on further details that only they need: families/decoder.py on where the decoder layers are,
runtime/model_class.py on the class of a model, serving/transformers_serving.py on the server, registration.py on the tables of
quantizers, quantizer.py on the methods that transformers calls while it loads a model, runtime/devices.py on what
`load_adapter` reports and what `hf_device_map` does to a pipeline.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import torch

from hf_flash.errors import UnsupportedModelError
from hf_flash.families.quantized import has_numbers, is_dequantizing

_HIDDEN: Final = "hidden_states"
_CONVERSIONS: Final = "_weight_conversions"


def tied_names(model: Any) -> set[str]:
    """Names of parameters that are only second names of other parameters, as `lm_head.weight` may be of the embedding.

    `all_tied_weights_keys` of `PreTrainedModel`, since 5.0: a dictionary from such a name to the name of the other parameter.
    `post_init` sets it; a custom model may not call that.
    """
    return set(tied_pairs(model))


def tied_pairs(model: Any) -> dict[str, str]:
    """The names of [`tied_names`], each with the name of the parameter that it stands for."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def plain_state(model: Any, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Some of a model's tensors under the names and in the form of its checkpoint, but always with plain numbers.

    `revert_weight_conversion` of core_model_loading.py, since 5.0: `save_pretrained` calls it. It uses `_weight_conversions`,
    which loading sets on the model. Conversions that dequantize are not reverted.
    """
    from transformers.core_model_loading import revert_weight_conversion

    used = getattr(model, _CONVERSIONS, None)
    if used is not None:
        setattr(model, _CONVERSIONS, [found for conversion in used for found in _without_dequantizing(conversion)])
    try:
        found: dict[str, torch.Tensor] = revert_weight_conversion(model, dict(state))
    finally:
        if used is not None:
            setattr(model, _CONVERSIONS, used)
    return found


def _without_dequantizing(conversion: Any) -> Iterator[Any]:
    """A conversion without its dequantizing operations; nothing if it has no others."""
    operations = getattr(conversion, "operations", ())
    left = [operation for operation in operations if not is_dequantizing(operation)]
    if len(left) == len(operations):
        yield conversion
    elif left:
        sources = [pattern for pattern in conversion._original_source_patterns if has_numbers(pattern)]
        yield conversion.copy(sources, conversion._original_target_patterns, operations=left)


def mark_as_initialized(module: Any) -> None:
    """Keep the loader from initializing parameters that this module does not have any more.

    `_is_hf_initialized` of `PreTrainedModel._initialize_weights`, since 4.20: an attribute of a module.
    """
    module._is_hf_initialized = True


def loaded_dtypes(model: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype that each of a model's parameters is loaded in: some, such as routers, stay in fp32.

    Args:
        model: the model.
        dtype: the compute dtype.

    `_get_dtype_plan` of `PreTrainedModel` and `build_glob_alternation` of core_model_loading.py, since 5.0.
    """
    from transformers.core_model_loading import build_glob_alternation

    plan = model._get_dtype_plan(dtype) if hasattr(model, "_get_dtype_plan") else {}
    other, by_group, _ = build_glob_alternation(list(plan)) if plan else (None, {}, None)
    found = {}
    for name, weight in model.named_parameters():
        match = other.search(name) if other else None
        plain = dtype if weight.is_floating_point() else weight.dtype
        found[name] = plan[by_group[match.lastgroup]] if match else plain
    return found


def resident_bytes(model: Any, dtype: torch.dtype) -> int:
    """Bytes of all weights that a model has, in the dtypes they are loaded in; tied ones count once.

    Args:
        model: the model.
        dtype: the compute dtype.
    """
    tied, dtypes = tied_names(model), loaded_dtypes(model, dtype)
    weights = {id(p): (name, p) for name, p in [*model.named_parameters(), *model.named_buffers()] if name not in tied}
    return sum(
        p.numel() * dtypes.get(name, dtype if p.is_floating_point() else p.dtype).itemsize for name, p in weights.values()
    )


def has_adapter(model: Any) -> bool:
    """Whether transformers has put a PEFT adapter on the model (`load_adapter`, `add_adapter`).

    `_hf_peft_config_loaded` of `PeftAdapterMixin` (integrations/peft.py), since 4.33.
    """
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def ignore_on_load(model: Any, patterns: Iterable[str]) -> None:
    """Make the loader skip tensors of the checkpoint whose name one of the patterns is found in; for this model alone.

    `_keys_to_ignore_on_load_unexpected` of `PreTrainedModel`, since 4.0: regular expressions, or `None`. It is an attribute of
    the class; setting one on the model hides it. The loader reads it after the quantizer has seen the model.
    """
    model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *patterns}


def hidden_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """The hidden states [sequences, tokens, d_model] among the arguments of a decoder layer.

    Models of transformers pass them as the first positional argument, or by the name `hidden_states`.
    """
    hidden: torch.Tensor = args[0] if args else kwargs[_HIDDEN]
    return hidden


def sequence_length(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Tokens of each sequence, from the arguments of a decoder.

    Causal language models of transformers pass `input_ids` [sequences, tokens] or `inputs_embeds` [sequences, tokens, d_model]
    by name. A decoder that is called by itself may get token ids as its first positional argument.
    """
    ids = args[0] if args else kwargs.get("input_ids")
    return int(ids.shape[-1] if ids is not None else kwargs["inputs_embeds"].shape[-2])


class _Entered(Exception):
    """Ends a forward before the first decoder layer runs."""


def first_layer_call(model: Any, first: Any, batch: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
    """The arguments that the first decoder layer is called with. No decoder layer runs.

    This serves to run decoder layers one by one, which transformers has no way to do: the arguments that the model passes by
    name are the same for all layers, for the same tokens.

    Args:
        model: the model.
        first: the first of its decoder layers.
        batch: token ids [sequences, tokens].

    Returns:
        Hidden states [sequences, tokens, d_model], and the other arguments by name, which fit every layer.

    Raises:
        UnsupportedModelError: the layer is called in another way than this module knows.
    """
    call: list[Any] = []

    def stop(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call.extend((args, kwargs))
        raise _Entered

    handle = first.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(batch, use_cache=False)
    except _Entered:
        pass
    finally:
        handle.remove()
    args, kwargs = call
    if len(args) + (_HIDDEN in kwargs) != 1:
        raise UnsupportedModelError(
            "decoder layers are called in a way that hf_flash does not know",
            where=type(model).__name__,
            expected=f"hidden states as the only positional argument, or as `{_HIDDEN}`",
            got=f"{len(args)} positional arguments, and {', '.join(kwargs)} by name",
        )
    return hidden_of(args, kwargs), {name: value for name, value in kwargs.items() if name != _HIDDEN}


def run_layer(layer: Any, hidden: torch.Tensor, arguments: Mapping[str, Any]) -> torch.Tensor:
    """The output [sequences, tokens, d_model] of a decoder layer, which returns it alone or first in a tuple.

    Args:
        layer: the decoder layer.
        hidden: its input, hidden states [sequences, tokens, d_model].
        arguments: the other arguments, as [`first_layer_call`] returned them.
    """
    out = layer(hidden, **arguments)
    behind: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return behind
