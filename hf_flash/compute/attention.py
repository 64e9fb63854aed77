"""Attention of a few tokens over the keys in a cache: decoding, batches, drafts.

For one token in 16 bits, torch's own kernel takes 9 to 70 times as long as fetching keys and values from DRAM; after 4096
tokens that is longer than everything else (docs/experiments.md). Here all queries that share keys are multiplied with them
together, so that every key and value is fetched once.
"""

from __future__ import annotations

import ctypes
from typing import Final

import torch

from hf_flash.compute import library as native
from hf_flash.compute.kernels import address_of
from hf_flash.compute.library import DTYPES, AttentionJob

MOST: Final = 16  # tokens of all sequences together
_BYTES: Final = -1  # BYTES of native.h


def few(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether [`attend`] takes a call of these tensors: at most `MOST` tokens, in a dtype of the compiled part."""
    tokens = query.shape[0] * query.shape[2]
    return 0 < tokens <= MOST and query.dtype in DTYPES and key.shape[2] > 0 and native.library() is not None


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float, *, avx512: bool = True
) -> torch.Tensor:
    """`softmax(query @ key.T * scale + mask) @ value`, accumulated in fp32 and rounded once.

    A token that sees no key gets zeros. A token gets the same bits beside others and alone, on any number of threads, with
    AVX-512 and without.

    Args:
        query: [batch, heads, tokens, width]. All tensors are on the CPU, in one dtype of `DTYPES`, with stride 1 in the last
            dimension.
        key: [batch, key_heads, length, width], value: [batch, key_heads, length, value_width]. Each of their heads serves
            heads / key_heads consecutive heads of the query.
        mask: broadcasts to [batch, heads, tokens, length]: booleans, true where a key is seen; or numbers to add, in a
            dtype of `DTYPES`.
        avx512: whether AVX-512 may be used.

    Returns:
        [batch, tokens, heads, value_width].

    Raises:
        MemoryError: there is not enough memory for the sums.
    """
    (batch, heads, tokens, width), (_, key_heads, length, value_width) = query.shape, value.shape
    out = torch.empty((batch, tokens, heads, value_width), dtype=query.dtype, device="cpu")
    seen = None if mask is None else mask.expand(batch, heads, tokens, length)
    job = AttentionJob(
        query=query.data_ptr(), key=key.data_ptr(), value=value.data_ptr(), mask=address_of(seen), out=out.data_ptr(),
        batch=batch, heads=heads, key_heads=key_heads, tokens=tokens, length=length, width=width, value_width=value_width,
        query_steps=query.stride()[:3], key_steps=key.stride()[:3], value_steps=value.stride()[:3],
        mask_steps=(0,) * 4 if seen is None else seen.stride(), scale=scale, dtype=DTYPES[query.dtype],
        mask_dtype=_BYTES if seen is None or seen.dtype == torch.bool else DTYPES[seen.dtype],
        threads=native.threads(), no_avx512=not avx512,
    )  # fmt: skip
    if not native.loaded().hf_attention(ctypes.byref(job)):  # type: ignore[union-attr]
        raise MemoryError(f"no memory for the sums of {batch * heads * tokens} rows")
    return out
