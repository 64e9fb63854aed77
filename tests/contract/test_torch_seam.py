"""The parts of torch that are no public interface and that hf_flash stands on, each tested by its name.

A release of torch that changes one of them fails here first, and the name of the test says which one it is. Only
hf_flash/runtime/torch_internals.py knows them, with the exceptions that it names (`tests/contract/test_structure.py` looks).
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from hf_flash.predictors.low_bit import widen
from hf_flash.runtime import torch_internals
from hf_flash.runtime.resident_linear import ResidentLinear
from hf_flash.runtime.torch_internals import (
    ADDRESSES,
    make_wrapper,
    replaced,
    same_metadata,
    target_device,
    transforming,
    without_torch_function,
    written,
)

aten = torch.ops.aten

# --- nn.Module.to ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("args", "kwargs", "wanted"), [
    (("meta",), {}, "meta"), ((torch.device("cuda", 1),), {}, "cuda:1"), ((), {"device": "cpu"}, "cpu"),
    ((torch.float16,), {}, "None"), ((torch.zeros(1),), {}, "cpu"), (("cpu", torch.bfloat16, True), {}, "cpu"),
    ((), {"memory_format": torch.channels_last}, "None"),
])  # fmt: skip
def test_parse_to_finds_the_device_in_every_form_of_the_arguments(args: Any, kwargs: Any, wanted: str) -> None:
    assert str(target_device(*args, **kwargs)) == wanted


# --- a tensor without numbers ---------------------------------------------------------------------------------------------


class Wrapper(torch.Tensor):
    """Records what it is asked."""

    asked: list[Any]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.asked.append(func)
        with without_torch_function():
            return func(*args, **kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return torch.zeros(())


@pytest.fixture
def wrapper() -> Wrapper:
    Wrapper.asked = []
    return make_wrapper(Wrapper, (2, 3), torch.bfloat16)


def test_make_wrapper_subclass_gives_shape_and_dtype_and_no_storage(wrapper: Wrapper) -> None:
    with without_torch_function():
        assert type(wrapper) is Wrapper
        assert (tuple(wrapper.shape), wrapper.dtype, wrapper.device.type) == ((2, 3), torch.bfloat16, "cpu")
        assert wrapper.data_ptr() == 0


def test_disable_torch_function_subclass_ends_the_asking_and_not_the_dispatch(wrapper: Wrapper) -> None:
    assert (wrapper + 1).shape == ()  # what the dispatch answers
    assert len(Wrapper.asked) == 1
    with without_torch_function():
        assert (wrapper + 1).shape == ()
    assert len(Wrapper.asked) == 1


@pytest.mark.parametrize(("call", "count"), [
    (lambda x, y: x.add(y), 0), (lambda x, y: x.add_(y), 1), (lambda x, y: torch.add(y, y, out=x), 1),
    (lambda x, y: y.copy_(x), 0), (lambda x, y: torch._foreach_add_([x, x], 1.0), 2), (lambda x, y: x.view(3, 2), 0),
])  # fmt: skip
def test_schema_says_which_arguments_an_operator_writes_to(
    wrapper: Wrapper, call: Callable[[Any, Any], Any], count: int
) -> None:
    found: list[list[Wrapper]] = []

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found.append(written(Wrapper, func, args, kwargs or {}))
            return torch.zeros(2, 3, dtype=torch.bfloat16) if func._schema.returns else None

    with Seen(), without_torch_function():
        call(wrapper, torch.zeros(2, 3, dtype=torch.bfloat16))
    assert len(found[-1]) == count
    assert all(one is wrapper for one in found[-1])


def test_pytree_goes_into_lists_tuples_and_dictionaries(wrapper: Wrapper) -> None:
    given = ([wrapper, 1], {"a": (wrapper, "b"), "c": None})
    with without_torch_function():
        assert replaced(Wrapper, lambda one: "ours", given) == (["ours", 1], {"a": ("ours", "b"), "c": None})


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("name", sorted(method.__name__ for method in ADDRESSES))
def test_a_method_that_gives_out_the_address_asks_the_subclass_first(wrapper: Wrapper, name: str) -> None:
    """`_typed_storage` and the others; if not, numbers that are not there would be read."""
    try:
        getattr(wrapper, name)()
    except (RuntimeError, TypeError, BufferError, NotImplementedError):  # there is nothing at that address
        pass
    assert ADDRESSES & set(Wrapper.asked)


# --- what traces or transforms a call --------------------------------------------------------------------------------------


def seen_in(transform: Callable[[Callable[[torch.Tensor], torch.Tensor]], Any]) -> set[str | None]:
    """What `transforming` answers inside of a transformed call."""
    found: set[str | None] = set()

    def call(x: torch.Tensor) -> torch.Tensor:
        found.add(transforming(x))
        return (x * 2).sum()

    transform(call)
    return found


def in_forward_mode(call: Callable[[torch.Tensor], torch.Tensor]) -> None:
    with forward_ad.dual_level():
        call(forward_ad.make_dual(torch.ones(2), torch.ones(2)))


def in_fake_mode(call: Callable[[torch.Tensor], torch.Tensor]) -> None:
    with FakeTensorMode():
        call(torch.ones(2))


X = torch.ones(2)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # of torch, about its own use of it
@pytest.mark.parametrize(("transform", "wanted"), [
    (lambda call: call(X), None),
    (lambda call: torch.func.grad(call)(X), "torch.func"),
    (lambda call: torch.func.vmap(call)(X[None]), "torch.func"),
    (in_forward_mode, "forward-mode differentiation"),
    (in_fake_mode, "a fake tensor mode"),
    (lambda call: make_fx(call)(X), "a tracer such as make_fx"),
    (lambda call: make_fx(call, pre_dispatch=True)(X), "a tracer such as make_fx"),
], ids=[
    "nothing", "peek_interpreter_stack-grad", "peek_interpreter_stack-vmap", "forward_ad._current_level",
    "_get_dispatch_mode-FAKE", "_get_dispatch_mode-PROXY", "_get_dispatch_mode_pre_dispatch-PROXY",
])  # fmt: skip
def test_what_transforms_a_call_is_found_from_inside(transform: Any, wanted: str | None) -> None:
    assert seen_in(transform) == {wanted}
    assert transforming(X) is None  # and no longer when it is over


def test_a_dual_level_alone_transforms_nothing() -> None:
    with forward_ad.dual_level():
        assert transforming(X) is None


# --- nn.Module -------------------------------------------------------------------------------------------------------------


def test_load_state_dict_finds_versions_in_metadata() -> None:
    module = nn.BatchNorm1d(2)
    state = module.state_dict()
    copied = OrderedDict(state.items())
    assert not hasattr(copied, "_metadata")
    same_metadata(copied, state)
    assert copied._metadata == state._metadata == {"": {"version": 2}}  # type: ignore[attr-defined]
    del copied["num_batches_tracked"]
    with pytest.raises(RuntimeError, match="num_batches_tracked"):  # which files of version 1 need not have
        module.load_state_dict(copied)
    copied._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    module.load_state_dict(copied)
    same_metadata(plain := OrderedDict[str, Any](), {})
    assert not hasattr(plain, "_metadata")


class Ours(nn.Linear):
    """Overrides what `OnFlash` and `ResidentLinear` do, and records."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.seen: list[str] = []

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.seen.append(f"_save_to_state_dict {prefix}")
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.seen.append(f"_load_from_state_dict {prefix}")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.seen.append(f"_apply {fn(torch.zeros(1)).dtype}")
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def __prepare_scriptable__(self) -> nn.Linear:
        self.seen.append("__prepare_scriptable__")
        plain = nn.Linear(2, 2, device="meta")
        plain._parameters = self._parameters
        return plain


@pytest.mark.parametrize(("call", "wanted"), [
    (lambda whole: whole.state_dict(), ["_save_to_state_dict inner."]),
    (lambda whole: whole.load_state_dict(nn.Sequential(OrderedDict(inner=nn.Linear(2, 2))).state_dict()),
     ["_load_from_state_dict inner."]),
    (lambda whole: whole.half(), ["_apply torch.float16"]),
    (lambda whole: whole.to(torch.bfloat16), ["_apply torch.bfloat16"]),
    (lambda whole: whole.type(torch.float64), ["_apply torch.float64"]),
])  # fmt: skip
def test_module_asks_its_parts_by_the_methods_that_ours_override(call: Callable[[Any], Any], wanted: list[str]) -> None:
    whole = nn.Sequential(OrderedDict(inner=Ours()))
    call(whole)
    assert whole.inner.seen == wanted  # type: ignore[union-attr]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of TorchScript
def test_script_compiles_what_prepare_scriptable_gives_with_its_parameters() -> None:
    ours = Ours()
    scripted = torch.jit.script(nn.Sequential(ours))  # type: ignore[attr-defined]
    assert "__prepare_scriptable__" in ours.seen
    assert torch.equal(scripted(X), ours(X))


def test_parameters_buffers_and_modules_are_dictionaries_that_forward_may_read() -> None:
    module = nn.Sequential(nn.BatchNorm1d(2))
    (inner,) = module._modules.values()
    assert inner is module[0]
    assert inner._parameters.get("weight") is module[0].weight
    assert set(inner._buffers) == {"running_mean", "running_var", "num_batches_tracked"}
    assert nn.Linear(2, 2, bias=False)._parameters.get("bias", 1) is None


def test_class_of_a_linear_layer_may_be_assigned() -> None:
    """runtime/resident_linear.py makes a model's linear layers its own."""
    layer = nn.Linear(2, 2)
    wanted, kept = layer(X), dict(layer.__dict__)
    layer.__class__ = ResidentLinear
    assert layer.__dict__ == kept
    assert torch.equal(layer(X), wanted)


# --- low-bit products: hf_flash/predictors/low_bit.py ----------------------------------------------------------------------


def test_weight_int8pack_mm_multiplies_by_codes_and_scales() -> None:
    torch.manual_seed(0)
    x, codes = torch.randn(2, 64).bfloat16(), torch.randint(-127, 128, (16, 64), dtype=torch.int8)
    scales = torch.rand(16).bfloat16()
    found = aten._weight_int8pack_mm(x, codes, scales)
    torch.testing.assert_close(found.float(), x.float() @ widen(codes, scales[:, None], None).T, rtol=2e-2, atol=0.5)


def test_weight_int4pack_mm_for_cpu_multiplies_what_convert_weight_to_int4pack_for_cpu_packed() -> None:
    torch.manual_seed(0)
    x, nibbles = torch.randn(2, 64).bfloat16(), torch.randint(0, 16, (32, 64), dtype=torch.int32)
    scales, zeros = torch.rand(2, 32, 1, 2).bfloat16().squeeze(2).unbind(-1)
    pairs = torch.stack([scales, zeros], dim=-1).contiguous()  # [groups, rows, 2]
    found = aten._weight_int4pack_mm_for_cpu(x, aten._convert_weight_to_int4pack_for_cpu(nibbles, 1), 32, pairs)
    grouped = (nibbles - 8).float().view(32, 2, 32)
    weight = (grouped * scales.T.float()[..., None] + zeros.T.float()[..., None]).view(32, 64)
    torch.testing.assert_close(found.float(), x.float() @ weight.T, rtol=2e-2, atol=0.5)


# --- the list ---------------------------------------------------------------------------------------------------------------


def test_the_module_lists_all_that_it_uses() -> None:
    names = {
        "_parse_to", "_make_wrapper_subclass", "DisableTorchFunctionSubclass", "_schema", "_pytree", "_typed_storage",
        "peek_interpreter_stack", "_current_level", "_TorchDispatchModeKey", "_get_dispatch_mode", "_metadata",
        "_get_dispatch_mode_pre_dispatch", "_apply", "_save_to_state_dict", "_load_from_state_dict", "__prepare_scriptable__",
        "_parameters", "_buffers", "_modules",
    }  # fmt: skip
    text = inspect.getdoc(torch_internals) or ""
    assert [name for name in names if name not in text] == []
