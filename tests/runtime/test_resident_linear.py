"""Matrices that stay in memory: products as torch's up to the order of sums, and torch's own wherever more is asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrize, prune
from transformers import AutoModelForCausalLM

from hf_flash import FlashOffloadConfig
from hf_flash.compute import dense, kernels
from hf_flash.compute import library as native
from hf_flash.runtime import resident_linear
from hf_flash.runtime.resident_linear import ResidentLinear, make_linears_resident

ONE_ROUNDING = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # half of a last place, and more
DTYPES = list(ONE_ROUNDING)
needs_library = pytest.mark.skipif(native.library() is None, reason="no compiled part here")


def matrices(rows: int, columns: int, tokens: int, bias: bool, dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
    random = torch.Generator().manual_seed(seed)
    weight, x = (torch.randn(n, columns, generator=random).to(dtype) for n in (rows, tokens))
    return x, weight, torch.randn(rows, generator=random).to(dtype) if bias else None


def close(found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether it is the exact result, summed in fp32 and rounded once."""
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    size = F.linear(x.double().abs(), weight.double().abs(), None if bias is None else bias.double().abs())
    return bool(((found.double() - exact).abs() <= ONE_ROUNDING[found.dtype] * exact.abs() + 2e-6 * size + 1e-7).all())


def module(weight: torch.Tensor, bias: torch.Tensor | None, room: int = 1 << 12) -> ResidentLinear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    made.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resident_linear, "_WORTH_BYTES", 0)
        engine: Any = SimpleNamespace(lock=_Lock(), wide=torch.empty(1, room))
        make_linears_resident(made, engine)
    assert type(made) is ResidentLinear
    return made


class _Lock:
    taken = 0

    def __enter__(self) -> None:
        self.taken += 1

    def __exit__(self, *exc: Any) -> None:
        pass


@needs_library
@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 100), columns=st.integers(1, 100) | st.integers(500, 520), tokens=st.integers(1, 17),
    bias=st.booleans(), dtype=st.sampled_from(DTYPES), threads=st.integers(1, 3), seed=st.integers(0, 999),
)  # fmt: skip
def test_a_token_gets_the_same_bits_in_every_company(
    rows: int, columns: int, tokens: int, bias: bool, dtype: torch.dtype, threads: int, seed: int
) -> None:
    x, weight, b = matrices(rows, columns, tokens, bias, dtype, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "threads", lambda: threads)
        found = kernels.linear(x, weight, b)
    assert close(found, x, weight, b)
    assert torch.equal(kernels.linear(x, weight, b, avx512=False), found)
    for token in range(tokens):
        assert torch.equal(kernels.linear(x[token : token + 1], weight, b)[0], found[token])


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_a_number_stays_so(dtype: torch.dtype) -> None:
    x, weight, b = matrices(9, 40, 3, True, dtype, 0)
    x[1, 7], weight[4, 3] = float("nan"), float("inf")
    found = kernels.linear(x, weight, b)
    assert found[1].isnan().all()
    assert found[:, 4].isfinite().tolist() == [False] * 3
    rest = torch.ones(3, 9, dtype=torch.bool)
    rest[1], rest[:, 4] = False, False
    assert found[rest].isfinite().all()


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 90), columns=st.integers(1, 70), tokens=st.integers(1, 40), bias=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]), room=st.integers(70, 700), seed=st.integers(0, 999),
)  # fmt: skip
def test_rows_are_widened_as_many_as_fit_at_a_time(
    rows: int, columns: int, tokens: int, bias: bool, dtype: torch.dtype, room: int, seed: int
) -> None:
    x, weight, b = matrices(rows, columns, tokens, bias, dtype, seed)
    ours = module(weight, b, room)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(dense, "_few_of", lambda dtype: 0)
        patch.setattr(dense, "_widened_from", lambda dtype: 1)
        found = ours(x[None])
    assert close(found[0], x, weight, b)
    assert ours.engine.lock.taken == 1  # type: ignore[attr-defined]


def calls(patch: pytest.MonkeyPatch) -> list[str]:
    """Every product that is not torch's own."""
    seen: list[str] = []

    def few(*args: Any) -> torch.Tensor:
        seen.append("few")
        return kernels.linear(*args)

    def many(*args: Any) -> torch.Tensor:
        seen.append("many")
        return widened(*args)

    widened = dense._widened
    patch.setattr(dense, "linear", few)
    patch.setattr(dense, "_widened", many)
    patch.setattr(dense, "_few_of", lambda dtype: 8 if dtype == torch.float32 else 16)
    patch.setattr(dense, "_widened_from", lambda dtype: float("inf") if dtype == torch.float32 else 17)
    return seen


@needs_library
def test_how_many_tokens_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = calls(monkeypatch)
    for dtype in DTYPES:
        x, weight, b = matrices(12, 32, 20, True, dtype, 1)
        ours = module(weight, b)
        with torch.inference_mode():
            assert ours(x[:0]).shape == (0, 12)
            for some in (x[0], x[:8].view(2, 4, 32), x[:8].t().contiguous().t(), x[:16].view(4, 4, 32), x):
                found = ours(some)
                assert found.shape == (*some.shape[:-1], 12)
                assert close(found.reshape(-1, 12), some.reshape(-1, 32), weight, b)
        assert seen == ["few"] * 3 if dtype == torch.float32 else seen == ["few"] * 4 + ["many"]
        seen.clear()


@pytest.mark.parametrize(("can", "bf16", "fp16"), [
    ({}, "never", "never"),
    ({"avx2": True}, 17, 17),
    ({"avx512_bf16": True, "cpu_name": "Intel Xeon"}, 96, 17),
    ({"avx512_bf16": True, "cpu_name": "AMD EPYC"}, "never", 17),
    ({"avx512_bf16": True, "avx512_fp16": True, "cpu_name": "Intel Xeon"}, 96, "never"),
    ({"amx_bf16": True, "avx512_bf16": True, "avx512_fp16": True, "cpu_name": "Intel Xeon"}, "never", "never"),
])  # fmt: skip
def test_from_where_on_widening_pays(
    can: dict[str, Any], bf16: int | str, fp16: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As measured on processors that can do this; docs/experiments.md has the figures."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can, raising=False)
    monkeypatch.setattr(dense.platform, "machine", lambda: "x86_64")
    found = [dense._widened_from.__wrapped__(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)]
    assert found == [float("inf") if name == "never" else name for name in (bf16, fp16, "never")]
    monkeypatch.setattr(dense.platform, "machine", lambda: "aarch64")
    assert dense._widened_from.__wrapped__(torch.float16) == float("inf")


class Marked(torch.Tensor):
    pass


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("tokens", [3, 20])
def test_more_than_inference_is_left_to_torch(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = calls(monkeypatch)
    x, weight, b = matrices(12, 32, tokens, True, torch.bfloat16, 2)
    ours, stock = module(weight, b), nn.Linear(32, 12, dtype=torch.bfloat16)
    stock.load_state_dict(ours.state_dict())
    out = ours(x)
    assert torch.equal(out, stock(x))
    out.sum().backward()
    assert ours.weight.grad is not None
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.float16):
        assert torch.equal(ours(x.float()), stock(x.float()))
        assert ours(x).dtype == torch.float16
    with torch.no_grad():
        assert torch.equal(torch.jit.trace(ours, x, check_trace=False)(x), stock(x))
        assert torch.equal(torch.compile(ours, backend="eager", fullgraph=True)(x), stock(x))
        assert torch.equal(ours(x.as_subclass(Marked)), stock(x))
        assert torch.equal(torch.func.functionalize(ours)(x), stock(x))
        assert torch.equal(torch.func.vmap(ours)(x[None]), torch.func.vmap(stock)(x[None]))
        assert torch.equal(ours(torch._neg_view(x)), stock(torch._neg_view(x)))
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert ours(x).shape == (tokens, 12)
        for wrong in (x.float(), x[:, :31]):
            with pytest.raises(RuntimeError):
                ours(wrong)
        assert torch.equal(torch.fx.symbolic_trace(nn.Sequential(ours))(x), stock(x))
    assert seen == []


@pytest.mark.parametrize("tokens", [3, 20])
def test_weights_that_something_has_replaced_are_used_as_they_are(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = calls(monkeypatch)
    x, weight, b = matrices(12, 32, tokens, True, torch.bfloat16, 2)
    with torch.no_grad():
        halved = module(weight, b)
        parametrize.register_parametrization(halved, "weight", _Half())
        assert torch.equal(halved(x), F.linear(x, weight / 2, b))
        pruned = module(weight, b)
        prune.random_unstructured(pruned, "weight", 0.5)
        assert torch.equal(pruned(x), F.linear(x, pruned.weight, b))
        mixed = module(weight, b)
        mixed.bias = nn.Parameter(b.float())
        with pytest.raises(RuntimeError):
            mixed(x)
        assert module(weight, b).to("meta")(x.to("meta")).shape == (tokens, 12)
    assert seen == []


class _Half(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / 2


def test_small_matrices_and_others_classes_are_left_alone() -> None:
    class Own(nn.Linear):
        pass

    long = nn.Linear(1 << 18, 1)  # a row that the buffer does not hold
    model = nn.Sequential(nn.Linear(8, 8), Own(1024, 1024), nn.Linear(1024, 1024), nn.Linear(1024, 1024).double(), long)
    make_linears_resident(model, SimpleNamespace(wide=torch.empty(4, 1024)))  # type: ignore[arg-type]
    assert [type(part) for part in model] == [nn.Linear, Own, ResidentLinear, nn.Linear, nn.Linear]


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_model_says_what_the_stock_model_says(
    dtype: torch.dtype, opt: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every way of calling it that takes few tokens, many, or both; also where one model has both kinds of layers."""
    monkeypatch.setattr(resident_linear, "_WORTH_BYTES", 0)
    folder, seen = opt("pre_ln"), calls(monkeypatch)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    flash = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=FlashOffloadConfig(predictor="none")
    ).eval()
    kinds = [type(part) for part in flash.modules() if isinstance(part, nn.Linear)]
    assert set(kinds) == {ResidentLinear}
    assert len(kinds) == 4 * flash.config.num_hidden_layers + 1
    ids = torch.randint(5, 90, (3, 9), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        wanted, found = stock(ids).logits, flash(ids).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 if dtype == torch.float32 else 0.1)
    if dtype == torch.float32:  # 27 tokens are many
        assert seen == []
        for settings_ in ({}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}):
            arguments: Any = {"max_new_tokens": 6, "do_sample": False, **settings_}
            rows = ids[:1] if "prompt_lookup_num_tokens" in settings_ else ids
            mask = torch.ones_like(rows)
            assert torch.equal(
                flash.generate(rows, attention_mask=mask, **arguments), stock.generate(rows, attention_mask=mask, **arguments)
            )
        assert set(seen) == {"few"}
    else:
        assert set(seen) == {"many"}
