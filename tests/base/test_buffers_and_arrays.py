"""base/buffers.py and base/arrays.py: memory that tensors lie in, and counts of neurons."""

from __future__ import annotations

import mmap
import platform
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_flash.base.arrays import count_uses
from hf_flash.base.buffers import _file_mappings, _within, aligned_empty, allocate_pages, copy_to_memory, load_into_memory
from tests.conftest import in_a_fork

SHAPES = st.lists(st.integers(0, 40), min_size=1, max_size=3).map(tuple)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.int64])


@given(shape=SHAPES, dtype=DTYPES)
def test_an_empty_tensor_begins_on_a_page_and_can_be_written(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = aligned_empty(shape, dtype)
    assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype)
    assert tensor.is_contiguous()
    if tensor.numel():
        assert tensor.data_ptr() % mmap.PAGESIZE == 0
        assert torch.equal(tensor.fill_(3), torch.full(shape, 3, dtype=dtype))


@given(shape=SHAPES, dtype=DTYPES)
def test_a_copy_is_contiguous_and_shares_nothing(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    source = (
        torch.arange(torch.Size(shape).numel()).to(dtype).view(shape).T if len(shape) == 2 else torch.ones(shape, dtype=dtype)
    )
    copied = copy_to_memory(source)
    assert torch.equal(copied, source)
    assert copied.is_contiguous()
    assert not source.numel() or copied.data_ptr() != source.data_ptr()


def test_a_large_copy_gets_pages_of_its_own() -> None:
    assert copy_to_memory(torch.ones(1 << 17)).data_ptr() % mmap.PAGESIZE == 0


@pytest.mark.skipif(not hasattr(mmap, "MAP_PRIVATE"), reason="no private memory, no fork")
def test_a_forked_process_writes_to_its_own_copy() -> None:
    memory = allocate_pages(4096)
    memory[0] = 1

    def change() -> bool:
        memory[0] = 2
        return memory[0] == 2

    assert in_a_fork(change)
    assert memory[0] == 1


@pytest.mark.skipif(platform.system() != "Linux", reason="only Linux tells what is mapped")
def test_what_lies_in_a_mapped_file_moves_into_memory_and_nothing_else_does(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(np.arange(4096, dtype=np.float32).tobytes())
    mapped, plain = torch.from_file(str(path), shared=False, size=4096), torch.ones(8)
    before, wanted = plain.data_ptr(), mapped.clone()
    load_into_memory([mapped, plain])
    found = _file_mappings()
    assert found is not None
    assert not _within(found, mapped.data_ptr())
    assert plain.data_ptr() == before
    assert torch.equal(mapped, wanted)


@given(tokens=st.integers(0, 600), d_ff=st.integers(1, 9), share=st.sampled_from([0.0, 0.5, 1.0]), seed=st.integers(0, 99))
def test_uses_are_counted_as_a_plain_sum_counts_them(tokens: int, d_ff: int, share: float, seed: int) -> None:
    selected = np.random.default_rng(seed).random((tokens, d_ff)) < share
    found = count_uses(selected)
    assert found.dtype == np.int64
    assert np.array_equal(found, selected.sum(0))
