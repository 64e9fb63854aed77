"""Attention of a few tokens, compiled: against torch in float64, whatever the shape, the mask and the memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as attention_of_torch

from hf_flash.compute import library as native
from hf_flash.compute.attention import MOST, attend, few
from tests.conftest import torch_threads

pytestmark = pytest.mark.skipif(native.library() is None, reason="no compiled part")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PIECE = 256  # keys that are summed together: attention.c


def made(
    dtype: torch.dtype, batch: int = 1, heads: int = 8, key_heads: int = 2, tokens: int = 1, length: int = 50, width: int = 32,
    value_width: int = 0, seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random).to(dtype)

    return (
        normal(batch, heads, tokens, width),
        normal(batch, key_heads, length, width),
        normal(batch, key_heads, length, value_width or width),
    )


def in_float64(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.double()
    wide = (part.double() for part in (query, key, value))
    return attention_of_torch(*wide, attn_mask=mask, scale=scale, enable_gqa=True).transpose(1, 2)


def check(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None, fp32: float = 2e-6
) -> torch.Tensor:
    scale = query.shape[-1] ** -0.5
    found = attend(query, key, value, mask, scale)
    assert found.dtype == query.dtype
    assert found.is_contiguous()
    close = {torch.float32: fp32, torch.bfloat16: 8e-3, torch.float16: 1e-3}[query.dtype]
    torch.testing.assert_close(found.double(), in_float64(query, key, value, mask, scale), rtol=close, atol=close)
    for avx512 in (True, False):
        for threads in (1, 2, 3):
            with torch_threads(threads):
                assert torch.equal(attend(query, key, value, mask, scale, avx512=avx512), found)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [
    {}, {"tokens": 5}, {"batch": 3, "tokens": 2}, {"batch": 16}, {"heads": 8, "key_heads": 8}, {"heads": 7, "key_heads": 1},
    {"heads": 71, "key_heads": 1, "width": 64}, {"length": 1}, {"length": 3}, {"length": PIECE}, {"length": PIECE + 1},
    {"length": 3 * PIECE - 1, "tokens": 3}, {"width": 1}, {"width": 7}, {"width": 24}, {"width": 80}, {"width": 96},
    {"width": 192, "value_width": 128}, {"width": 16, "value_width": 5}, {"width": 3, "value_width": 67}, {"width": 256},
])  # fmt: skip
def test_it_is_what_torch_computes(shape: dict[str, int], dtype: torch.dtype) -> None:
    check(*made(dtype, **shape))


def test_random_shapes() -> None:
    random = torch.Generator().manual_seed(7)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=random))

    for seed in range(60):
        key_heads, tokens = draw(1, 4), draw(1, 6)
        shape = {"batch": draw(1, 16 // tokens), "heads": key_heads * draw(1, 6), "key_heads": key_heads, "tokens": tokens,
                 "length": draw(1, 700), "width": draw(1, 140), "value_width": draw(1, 140)}  # fmt: skip
        check(*made(DTYPES[seed % 3], **shape, seed=seed))


# --- masks


@pytest.mark.parametrize("kind", [torch.bool, *DTYPES])
@pytest.mark.parametrize("shared", ["", "batch", "heads", "tokens", "batch heads tokens"])
def test_masks_of_every_kind(shared: str, kind: torch.dtype) -> None:
    batch, heads, tokens, length = 3, 8, 4, PIECE + 30
    random = torch.Generator().manual_seed(1)
    sizes = {"batch": batch, "heads": heads, "tokens": tokens}
    seen = torch.rand([1 if name in shared else size for name, size in sizes.items()] + [length], generator=random) < 0.6
    mask = seen if kind == torch.bool else torch.where(seen, torch.randn(seen.shape, generator=random), torch.finfo(kind).min)
    check(*made(torch.float32, batch=batch, tokens=tokens, length=length), mask.to(kind))


def test_a_causal_mask_and_one_of_a_cache_with_room_left() -> None:
    query, key, value = made(torch.float32, tokens=4, length=3 * PIECE)
    seen = torch.ones(4, 3 * PIECE, dtype=torch.bool).tril(100)[None, None]
    found = check(query, key, value, seen)
    key[:, :, 104:], value[:, :, 104:] = float("nan"), float("nan")  # nobody sees them
    short = check(query, key[:, :, :104], value[:, :, :104], seen[..., :104])
    torch.testing.assert_close(found, short)
    key[:, :, 104:PIECE], value[:, :, 104:PIECE] = 0, 0  # whole pieces that nobody sees are not looked at
    torch.testing.assert_close(attend(query, key, value, seen, 32**-0.5), short)


def test_who_sees_nothing_gets_zeros_and_disturbs_nobody() -> None:
    query, key, value = made(torch.float32, batch=3, length=PIECE + 9)
    seen = torch.ones(3, 1, 1, PIECE + 9, dtype=torch.bool)
    seen[1] = False
    seen[2, ..., :PIECE] = False
    found = attend(query, key, value, seen, 1.0)
    assert torch.equal(found[1], torch.zeros_like(found[1]))
    for row in (slice(0, 1), slice(2, 3)):
        assert torch.equal(found[row], attend(query[row], key[row], value[row], seen[row], 1.0))
    nothing = torch.full((1, 1, 1, PIECE + 9), -float("inf"))
    assert torch.equal(attend(query[:1], key[:1], value[:1], nothing, 1.0), torch.zeros_like(found[:1]))


# --- contracts


def test_a_token_has_the_same_bits_beside_others_and_alone() -> None:
    query, key, value = made(torch.bfloat16, batch=4, tokens=4, length=PIECE + 70)
    seen = torch.ones(4, PIECE + 70, dtype=torch.bool).tril(PIECE + 66)[None, None]
    found = attend(query, key, value, seen, 0.2)
    for row in range(4):
        for token in range(4):
            some = slice(row, row + 1), slice(None), slice(token, token + 1)
            alone = attend(query[some], key[row : row + 1], value[row : row + 1], seen[:, :, token : token + 1], 0.2)
            assert torch.equal(alone[0, 0], found[row, token])


def test_numbers_lie_where_strides_say() -> None:
    query, key, value = made(torch.bfloat16, batch=2, tokens=3, length=40)
    spread = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in (query, key, value)]
    longer = torch.zeros(2, 2, 100, 32, dtype=torch.bfloat16)
    longer[:, :, 10:50] = key
    assert not spread[0].is_contiguous()
    found = attend(query, key, value, None, 0.2)
    assert torch.equal(attend(spread[0], longer[:, :, 10:50], spread[2], None, 0.2), found)
    assert torch.equal(attend(query[:1].expand(2, -1, -1, -1), key, value, None, 0.2)[0], found[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_what_is_no_number_does_not_vanish(where: int, bad: float) -> None:
    parts = made(torch.float32, length=PIECE + 20)
    parts[where][0, 1, 0, 3] = bad
    found, wanted = attend(*parts, None, 1.0), in_float64(*parts, None, 1.0)
    assert torch.equal(found.isfinite(), wanted.isfinite())


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores(dtype: torch.dtype) -> None:
    query, key, value = made(dtype, length=300)
    check(query * 30, key * 5, value, fp32=1e-3)  # of scores near 1000, 1e-4 is a unit in the last place
    check(query * 0, key, value)


def test_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, _ = made(torch.float32)
    assert few(query, key)
    assert few(query.expand(MOST, -1, -1, -1), key)
    for wrong in (query.expand(MOST + 1, -1, -1, -1), query.double(), query[:0], query[:, :, :0]):
        assert not few(wrong, key)
    assert not few(query, key[:, :, :0])
    monkeypatch.setattr(native, "library", lambda: None)
    assert not few(query, key)


def test_memory_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        def hf_attention(self, job: Any) -> int:
            return 0

    monkeypatch.setattr(native, "loaded", Failing)
    with pytest.raises(MemoryError, match="8 rows"):
        attend(*made(torch.float32), None, 1.0)
