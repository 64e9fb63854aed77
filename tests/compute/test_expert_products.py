"""Products with experts where they lie in their slots: right, and the same bits in every company."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_flash.compute import dense
from hf_flash.compute import library as native
from hf_flash.compute.expert_gate import known_gate, stock_gate
from hf_flash.compute.expert_products import ExpertProducts, Group, Memory
from hf_flash.store.experts import ExpertLayer, Piece

ONE_ROUNDING = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
DTYPES = list(ONE_ROUNDING)
needs_library = pytest.mark.skipif(native.library() is None, reason="no compiled part here")


def pieces_of(outputs: int, inputs: int, turned: bool, form: str, dtype: torch.dtype) -> tuple[Piece, ...]:
    """A parameter of so many outputs in one piece or two."""

    def piece(count: int, first: int, turns: int) -> Piece:
        rows, columns = (inputs, count) if turned else (count, inputs)
        return Piece("up", rows, columns, turned, first, turns, dtype)

    half = outputs // 2
    return {
        "whole": (piece(outputs, 0, 1),),
        "halves": (piece(half, 0, 1), piece(outputs - half, half, 1)),
        "taking turns": (piece(outputs, 0, 2),),
        "every other": (piece(half, 0, -2), piece(half, 1, -2)),
    }[form]


def stored(pieces: tuple[Piece, ...], experts: int, gap: int, seed: int) -> tuple[Any, Any, torch.Tensor]:
    """Slots with an expert each at odd places, where its pieces begin, and the parameter [experts, outputs, inputs]."""
    random = np.random.default_rng(seed)
    nbytes = sum(piece.nbytes + gap for piece in pieces)
    slots = np.zeros((experts, nbytes + 8), np.uint8)
    at = np.zeros((experts, len(pieces)), np.int64)
    outputs = sum(piece.outputs for piece in pieces)
    whole = torch.zeros(experts, outputs, pieces[0].inputs, dtype=pieces[0].dtype)
    for expert in range(experts):
        begin = int(random.integers(0, 8))
        for number, piece in enumerate(pieces):
            matrix = torch.from_numpy(random.normal(size=(piece.rows, piece.columns))).to(piece.dtype)
            raw = matrix.view(torch.uint8).reshape(-1).numpy()
            slots[expert, begin : begin + len(raw)] = raw
            at[expert, number] = begin
            begin += len(raw) + gap
            whole[expert, torch.from_numpy(piece.order)] = matrix.T if piece.turned else matrix
    return slots, at, whole


def products_of(pieces: tuple[Piece, ...], at: Any, dtype: torch.dtype) -> ExpertProducts:
    layer = ExpertLayer("experts", len(at), pieces[0].inputs, 1, "up", pieces, ((),) * len(at), at)
    return ExpertProducts(layer, "up", at, dtype)


def close(found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> bool:
    exact, size = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    return bool(((found.double() - exact).abs() <= ONE_ROUNDING[found.dtype] * exact.abs() + 2e-6 * size + 1e-7).all())


FORMS = st.sampled_from(["whole", "halves", "taking turns", "every other"])


@settings(max_examples=80, deadline=None)
@given(
    outputs=st.integers(1, 40).map(lambda half: 2 * half) | st.just(1200), inputs=st.integers(2, 70), turned=st.booleans(),
    form=FORMS, dtype=st.sampled_from(DTYPES), tokens=st.lists(st.integers(1, 18), min_size=1, max_size=4),
    compiled=st.booleans(), seed=st.integers(0, 999),
)  # fmt: skip
def test_products_are_those_of_the_parameter(
    outputs: int, inputs: int, turned: bool, form: str, dtype: torch.dtype, tokens: list[int], compiled: bool, seed: int
) -> None:
    pieces = pieces_of(outputs, inputs, turned, form, dtype)
    slots, at, whole = stored(pieces, len(tokens), 3, seed)
    memory = Memory(slots, torch.empty(1, 4096))
    bounds = np.cumsum([0, *tokens]).tolist()
    groups = [Group(e, e, bounds[e], bounds[e + 1]) for e in range(len(tokens))]
    x = torch.randn(bounds[-1], inputs, generator=torch.Generator().manual_seed(seed)).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        if not compiled:
            patch.setattr(native, "library", lambda: None)
        products = products_of(pieces, at, dtype)
        found = products.multiply(x, groups, memory)
        for group in groups:
            rows = slice(group.begin, group.end)
            assert close(found[rows], x[rows], whole[group.expert])
            assert torch.equal(products.multiply(x[rows], [group], memory), found[rows])  # an expert alone, and beside others


@needs_library
@settings(max_examples=60, deadline=None)
@given(
    outputs=st.integers(1, 40).map(lambda half: 2 * half) | st.just(1100), inputs=st.integers(2, 70), turned=st.booleans(),
    dtype=st.sampled_from(DTYPES), tokens=st.integers(1, 8), threads=st.integers(1, 3), seed=st.integers(0, 999),
)  # fmt: skip
def test_a_token_gets_the_same_bits_in_every_company(
    outputs: int, inputs: int, turned: bool, dtype: torch.dtype, tokens: int, threads: int, seed: int
) -> None:
    pieces = pieces_of(outputs, inputs, turned, "whole", dtype)
    slots, at, _ = stored(pieces, 1, 0, seed)
    memory, products = Memory(slots, torch.empty(1, 4096)), products_of(pieces, at, dtype)
    x = torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(seed)).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "threads", lambda: threads)
        found = products.multiply(x, [Group(0, 0, 0, tokens)], memory)
    for token in range(tokens):
        assert torch.equal(products.multiply(x[token : token + 1], [Group(0, 0, token, token + 1)], memory)[0], found[token])


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("turned", [False, True])
def test_a_file_of_16_bits_is_computed_in_32_exactly(dtype: torch.dtype, turned: bool) -> None:
    pieces = pieces_of(24, 40, turned, "whole", dtype)
    slots, at, whole = stored(pieces, 1, 0, 5)
    products = products_of(pieces, at, torch.float32)
    x = torch.randn(3, 40)
    assert products.few(3)
    assert close(products.multiply(x, [Group(0, 0, 0, 3)], Memory(slots, torch.empty(1, 4096))), x, whole[0])


@pytest.mark.parametrize("turned", [False, True])
def test_a_file_of_32_bits_is_rounded_to_16_as_loading_would(turned: bool) -> None:
    pieces = pieces_of(24, 40, turned, "halves", torch.float32)
    slots, at, whole = stored(pieces, 1, 0, 5)
    products = products_of(pieces, at, torch.bfloat16)
    x = torch.randn(3, 40).bfloat16()
    found = products.multiply(x, [Group(0, 0, 0, 3)], Memory(slots, torch.empty(1, 4096)))
    assert close(found, x, whole[0].bfloat16())


def test_where_16_bits_are_slow_turned_matrices_are_widened_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "_widened_from", lambda dtype: 1)
    x, weight = torch.randn(30, 50).bfloat16(), torch.randn(50, 12).bfloat16()
    assert close(dense.multiply_turned(x, weight, torch.empty(1, 12 * 7 + 3)), x, weight.T)


class Gates:
    """Stock modules of experts, as far as their gates are asked."""

    class Silu:
        has_gate = True

        def _apply_gate(self, products: torch.Tensor) -> torch.Tensor:
            gate, up = products.chunk(2, dim=-1)
            return torch.nn.functional.silu(gate) * up

    class Limited(Silu):
        swiglu_limit = 7.0

        def _apply_gate(self, products: torch.Tensor) -> torch.Tensor:
            gate, up = products.chunk(2, dim=-1)
            return torch.nn.functional.silu(gate.clamp(max=7.0)) * up.clamp(-7.0, 7.0)

    class GptOss:
        has_gate, limit, alpha = True, 7.0, 1.702

        def _apply_gate(self, products: torch.Tensor) -> torch.Tensor:
            gate, up = products[..., ::2].clamp(max=7.0), products[..., 1::2].clamp(-7.0, 7.0)
            return (up + 1) * (gate * torch.sigmoid(gate * 1.702))

    class Relu2:
        has_gate = False

        def act_fn(self, products: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.relu(products).square()

    class Gelu(Silu):
        def _apply_gate(self, products: torch.Tensor) -> torch.Tensor:
            gate, up = products.chunk(2, dim=-1)
            return torch.nn.functional.gelu(gate) * up


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [Gates.Silu, Gates.Limited, Gates.GptOss, Gates.Relu2])
def test_known_gates_are_computed_as_the_stock_module_does(kind: Any, dtype: torch.dtype) -> None:
    module = kind()
    gate = known_gate(module)
    assert gate is not None
    products = (8 * torch.randn(9, 24 if module.has_gate else 12, generator=torch.Generator().manual_seed(2))).to(dtype)
    products[3, 5] = float("nan")
    hidden = torch.empty(9, 12, dtype=dtype)
    native.loaded().hf_expert_gate(  # type: ignore[union-attr]
        ctypes.byref(gate), products.data_ptr(), hidden.data_ptr(), 9, 12, native.DTYPES[dtype]
    )
    wanted = stock_gate(module, products)
    torch.testing.assert_close(hidden, wanted, rtol=4 * ONE_ROUNDING[dtype], atol=1e-6, equal_nan=True)


def test_other_gates_are_left_to_torch() -> None:
    assert known_gate(Gates.Gelu()) is None


@needs_library
def test_what_is_not_a_number_stays_so() -> None:
    pieces = pieces_of(20, 12, True, "whole", torch.bfloat16)
    slots, at, _ = stored(pieces, 1, 0, 1)
    products, memory = products_of(pieces, at, torch.bfloat16), Memory(slots, torch.empty(1, 64))
    x = torch.randn(5, 12).bfloat16()
    x[1, 7] = float("nan")
    found = products.multiply(x, [Group(0, 0, 0, 5)], memory)
    assert found[1].isnan().all()
    assert found[[0, 2, 3, 4]].isfinite().all()
