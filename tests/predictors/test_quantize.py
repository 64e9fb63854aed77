"""Quantizing with the compiled part and with torch: the same bits, whatever the weights are."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hf_flash.compute import kernels
from hf_flash.compute.library import library, switched_off
from hf_flash.predictors.low_bit import quantize_rows, widen

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HOSTILE = (
    math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, -1e-40, 1e-38, 6e-8, -6e-8, 65504.0, -65504.0, 3.3e38, -3.3e38, 3e38, 1e30,
)  # fmt: skip
SEEDS = st.integers(0, 1 << 30)

needs_compiler = pytest.mark.skipif(library() is None, reason="no compiled part")


@pytest.fixture(autouse=True)
def always_on_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(kernels, "_WORTH_QUANTIZING", 0)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    """Whether two quantized matrices are the same; every NaN is the same number."""
    assert list(found) == list(wanted)
    kinds = [[(part.dtype, part.shape) for part in parts.values()] for parts in (found, wanted)]
    assert kinds[0] == kinds[1]
    return all(np.array_equal(found[k].double(), wanted[k].double(), equal_nan=True) for k in wanted)


def with_torch(w: torch.Tensor, bits: int, group: int) -> dict[str, torch.Tensor]:
    with switched_off():
        return quantize_rows(w, bits, group)


@st.composite
def matrices(draw: st.DrawFn) -> tuple[torch.Tensor, int, int]:
    """Weights, bits and a group size: also constant rows, numbers of any size, and what is no number."""
    bits, group = draw(st.sampled_from([4, 8])), draw(st.integers(1, 41) | st.sampled_from([64, 128, 130]))
    groups = draw(st.integers(1, 19)) if bits == 4 else 1
    assume(bits == 8 or group * groups % 2 == 0)
    rows, random = draw(st.integers(1, 40)), torch.Generator().manual_seed(draw(SEEDS))
    size, dtype = draw(st.sampled_from([1e-42, 1e-30, 1e-6, 0.02, 1.0, 1e4, 1e18, 1e37])), draw(st.sampled_from(DTYPES))
    w = size * torch.randn(rows, group * groups, generator=random)
    if draw(st.booleans()):
        w = (w / size * 8).round() * size  # many ties
    for row in draw(st.lists(st.integers(0, rows - 1), max_size=2)):
        w[row] = draw(st.sampled_from(HOSTILE) | st.just(size))
    for value in draw(st.lists(st.sampled_from(HOSTILE), max_size=4)):
        w[draw(st.integers(0, rows - 1)), draw(st.integers(0, w.shape[1] - 1))] = value
    return w.to(dtype), bits, group


@needs_compiler
@settings(deadline=None, max_examples=300)
@given(matrix=matrices(), threads=st.integers(1, 4))
def test_compiled_and_with_torch_a_matrix_has_the_same_codes(matrix: tuple[torch.Tensor, int, int], threads: int) -> None:
    torch.set_num_threads(threads)
    found, wanted = quantize_rows(*matrix), with_torch(*matrix)
    assert same(found, wanted), (matrix, found, wanted)


@needs_compiler
@settings(deadline=None, max_examples=100)
@given(matrix=matrices(), before=st.integers(0, 9), behind=st.integers(0, 9), columns=st.booleans())
def test_rows_may_lie_apart(matrix: tuple[torch.Tensor, int, int], before: int, behind: int, columns: bool) -> None:
    w, bits, group = matrix
    wide = torch.full((len(w), before + w.shape[1] + behind), math.nan, dtype=w.dtype)
    part = wide[:, before : before + w.shape[1]]
    part.copy_(w)
    assert same(quantize_rows(w.T.contiguous().T if columns else part, bits, group), with_torch(w, bits, group))


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_compiler), False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_with_what_is_no_number_has_an_error_that_is_none(value: float, bits: int, compiled: bool) -> None:
    w = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    w[1, 5] = value
    quantized = quantize_rows if compiled else with_torch
    found, clean = quantized(w, bits, 64), quantized(w[[0, 2]], bits, 64)
    assert found["error"].isfinite().tolist() == [True, False, True]
    assert same({name: part[[0, 2]] for name, part in found.items()}, clean)
    codes = widen(found["codes"], torch.ones_like(found["scales"]), torch.zeros_like(found["scales"]) if bits == 4 else None)
    assert math.isinf(value) or codes[1].eq(-127 if bits == 8 else -8).sum() >= (1 if bits == 8 else 64)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_each_group_has_the_best_of_its_ranges(dtype: torch.dtype) -> None:
    w = torch.randn(20, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = quantize_rows(w, 4, 32)
    error = (widen(found["codes"], found["scales"], found["zeros"]).double() - w.double()).view(20, 3, 32).square().sum(-1)
    torch.testing.assert_close(found["error"].double(), error.sum(1).sqrt(), rtol=1e-6, atol=0)
    low, high = w.double().view(20, 3, 32).amin(-1), w.double().view(20, 3, 32).amax(-1)
    for shrink in (1.0, 0.95, 0.9, 0.85, 0.8):
        scale = ((high - low) * shrink / 15).bfloat16().double()
        zero = ((high + low + scale) / 2).bfloat16().double()
        grouped, scale, zero = w.double().view(20, 3, 32), scale[..., None], zero[..., None]
        back = ((grouped - zero) / scale).round().clamp(-8, 7) * scale + zero
        assert (error <= (back - grouped).square().sum(-1) * (1 + 1e-5)).all()
