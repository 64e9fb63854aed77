"""Matrices in 4 or 8 bits: the numbers they stand for, and products with these."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_flash.compute import coded
from hf_flash.compute import library as native
from hf_flash.compute.library import DTYPES, LinearJob
from hf_flash.store.experts import E2M1, E4M3, E8M0, Piece, Scales
from tests.quantized import from_mxfp4

ONE_ROUNDING = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
needs_library = pytest.mark.skipif(native.library() is None, reason="no compiled part here")
COMPUTED = st.sampled_from(list(DTYPES))


def matrix(rows: int, columns: int, dtype: torch.dtype, scales: Scales, seed: int) -> tuple[Piece, Any, Any, torch.Tensor]:
    """A piece, its bytes and those of its scales, at odd addresses; and what it stands for, in fp32."""
    random = np.random.default_rng(seed)
    piece = Piece("up", rows, columns, False, 0, 1, dtype, scales)
    codes = torch.from_numpy(random.integers(0, 256, piece.nbytes, np.uint8))
    if dtype == E4M3:
        codes[(codes & 0x7F) == 0x7F] = 3  # which are no numbers
    grid = torch.from_numpy(random.uniform(1e-3, 1e-2, piece.grid)).float().to(scales.dtype)
    raw = grid.view(torch.uint8)
    if scales.dtype == E8M0:
        raw = torch.from_numpy(random.integers(112, 130, piece.grid, np.uint8))
        grid = raw.view(E8M0)
    if dtype == E2M1:
        plain = from_mxfp4(codes.view(rows, -1), raw.view(piece.grid))
    else:
        wide = grid.float().repeat_interleave(scales.block_rows, 0).repeat_interleave(scales.block_columns, 1)
        plain = codes.view(E4M3).view(rows, columns).float() * wide[:rows, :columns]
    at_odd = [np.concatenate([np.zeros(1, np.uint8), part.reshape(-1).numpy()])[1:] for part in (codes, raw)]
    return piece, *at_odd, plain


FP4 = st.builds(lambda blocks: (E2M1, 32 * blocks, Scales(E8M0, 1, 32)), st.integers(1, 5))
FP8 = st.builds(
    lambda columns, dtype, rows, block: (E4M3, columns, Scales(dtype, rows, block)),
    st.integers(1, 90), st.sampled_from([torch.float32, torch.bfloat16, torch.float16, E8M0]), st.integers(1, 40),
    st.integers(1, 100),
)  # fmt: skip


@settings(max_examples=120, deadline=None)
@given(
    kind=FP4 | FP8, rows=st.integers(1, 50), dtype=COMPUTED, compiled=st.booleans(), seed=st.integers(0, 999), data=st.data()
)
def test_they_become_the_numbers_that_transformers_makes_of_them(
    kind: Any, rows: int, dtype: torch.dtype, compiled: bool, seed: int, data: Any
) -> None:
    piece, numbers, scales, plain = matrix(rows, kind[1], kind[0], kind[2], seed)
    first = kind[2].block_rows * data.draw(st.integers(0, (rows - 1) // kind[2].block_rows))
    some = slice(first, data.draw(st.integers(first + 1, rows)))
    with pytest.MonkeyPatch.context() as patch:
        if not compiled:
            patch.setattr(native, "library", lambda: None)
        found = coded.decode(piece, numbers, scales, some, dtype)
    assert torch.equal(found, plain[some].to(dtype))


@needs_library
@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
def test_every_byte_is_known(dtype: torch.dtype) -> None:
    codes = np.arange(256, dtype=np.uint8)
    found = coded.decode(
        Piece("up", 1, 256, False, 0, 1, E4M3, Scales(torch.float32, 1, 256)), codes, one(), slice(0, 1), dtype
    )
    assert torch.equal(found[0].nan_to_num(7), torch.from_numpy(codes).view(E4M3).to(dtype).nan_to_num(7))
    exponents = np.arange(256, dtype=np.uint8)
    ones = np.full(256 * 16, 0x22, np.uint8)
    piece = Piece("up", 1, 256 * 32, False, 0, 1, E2M1, Scales(E8M0, 1, 32))
    found = coded.decode(piece, ones, exponents, slice(0, 1), dtype)[0, ::32]
    assert torch.equal(found.nan_to_num(7), torch.from_numpy(exponents).view(E8M0).float().to(dtype).nan_to_num(7))


def one() -> Any:
    return np.frombuffer(np.float32(1).tobytes(), np.uint8)


def product(
    piece: Piece, numbers: Any, scales: Any, x: torch.Tensor, *, threads: int = 1, narrow: bool = False
) -> torch.Tensor:
    out = torch.empty(len(x), piece.rows, dtype=x.dtype)
    job = LinearJob(
        weight=numbers.ctypes.data, x=x.data_ptr(), out=out.data_ptr(), rows=piece.rows, columns=piece.columns, tokens=len(x),
        out_stride=piece.rows, scales=coded.scales_of(piece), dtype=DTYPES[x.dtype], weight_dtype=coded.CODES[piece.dtype],
        threads=threads, no_avx512=narrow,
    )  # fmt: skip
    job.scales.at = scales.ctypes.data
    assert native.loaded().hf_linear(ctypes.byref(job))  # type: ignore[union-attr]
    return out


@needs_library
@settings(max_examples=120, deadline=None)
@given(
    kind=FP4 | FP8, rows=st.integers(1, 70), dtype=COMPUTED, tokens=st.integers(1, 9), threads=st.integers(1, 3),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_products_are_those_of_these_numbers(
    kind: Any, rows: int, dtype: torch.dtype, tokens: int, threads: int, seed: int
) -> None:
    piece, numbers, scales, plain = matrix(rows, kind[1], kind[0], kind[2], seed)
    x = torch.randn(tokens, kind[1], generator=torch.Generator().manual_seed(seed)).to(dtype)
    found = product(piece, numbers, scales, x, threads=threads)
    weight = plain if piece.dtype == E2M1 else plain.to(dtype)  # of E2M1 nothing is rounded that fp32 and bf16 do not hold
    exact, size = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    assert bool(((found.double() - exact).abs() <= ONE_ROUNDING[dtype] * exact.abs() + 2e-6 * size + 1e-7).all())
    assert torch.equal(product(piece, numbers, scales, x, narrow=True), found), "vectors of another width"
    for token in range(tokens):
        assert torch.equal(product(piece, numbers, scales, x[token : token + 1])[0], found[token]), "alone"


@needs_library
@pytest.mark.parametrize("scale", [2.0**127, 2.0**-126], ids=["large", "small"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scales_may_be_as_large_and_small_as_numbers_are(scale: float, dtype: torch.dtype) -> None:
    codes = np.tile(np.array([0, 1, 8, 0x38, 0x80], np.uint8), 16)  # 0, 2**-9, 2**-6, 1, -0
    piece = Piece("up", 1, 80, False, 0, 1, E4M3, Scales(torch.float32, 1, 80))
    scales = np.frombuffer(np.float32(scale).tobytes(), np.uint8)
    plain = torch.from_numpy(codes).view(E4M3).float() * scale
    assert torch.equal(coded.decode(piece, codes, scales, slice(0, 1), dtype)[0], plain.to(dtype))
    x = torch.zeros(1, 80, dtype=dtype)
    x[0, 3] = 1.0
    assert float(product(piece, codes, scales, x)) == plain[3]


@pytest.mark.parametrize(("dtype", "wrong"), [(torch.float32, float("nan")), (torch.bfloat16, float("inf")), (E8M0, None)])
def test_scales_that_are_no_numbers(dtype: torch.dtype, wrong: float | None) -> None:
    piece = Piece("up", 4, 64, False, 0, 1, E4M3, Scales(dtype, 2, 32))
    good = torch.ones(piece.grid).to(dtype)
    assert coded.are_numbers(piece, good.view(torch.uint8).reshape(-1).numpy())
    bad = good.view(torch.uint8).clone().reshape(-1)
    bad[-1] = 0xFF
    if wrong is not None:
        bad = torch.tensor([1, 1, 1, wrong]).to(dtype).view(torch.uint8)
    assert not coded.are_numbers(piece, bad.numpy())
    if native.loaded() is not None:
        codes, said = coded.CODES[dtype], native.loaded().hf_has_no_number  # type: ignore[union-attr]
        assert said(ctypes.c_void_p(bad.data_ptr()), ctypes.c_int64(4), codes)
        assert not said(ctypes.c_void_p(good.data_ptr()), ctypes.c_int64(4), codes)


def test_what_the_compiled_part_does_not_know_is_left_to_torch() -> None:
    odd = Scales(torch.float32, 1, 16)
    assert not coded.is_known(Piece("up", 4, 64, False, 0, 1, E2M1, odd))
    numbers = matrix(4, 64, E2M1, Scales(E8M0, 1, 32), 0)[1]
    scales = torch.rand(4, 4)
    found = coded.decode(
        Piece("up", 4, 64, False, 0, 1, E2M1, odd),
        numbers,
        scales.view(torch.uint8).reshape(-1).numpy(),
        slice(0, 4),
        torch.float32,
    )
    plain = from_mxfp4(torch.from_numpy(numbers).view(4, 32), torch.full((4, 2), 127, dtype=torch.uint8))
    assert torch.equal(found, plain * scales.repeat_interleave(16, 1))
    assert not coded.is_known(Piece("up", 4, 64, False, 0, 1, torch.bfloat16))
