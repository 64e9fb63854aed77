"""One token in one call of the compiled part, beside the same token step by step.

That the window then holds what it should, and what is read for it, is in test_window_and_reads.py, whose layers go either way.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_window_and_reads import BRAIN, D_FF, FULL, LAYER, Layout, Rig, make_store

from hf_flash import StoreReadError
from hf_flash.base.buffers import aligned_empty
from hf_flash.compute.library import library
from hf_flash.reading.compiled_queue import CompiledQueue
from hf_flash.reading.reader import open_reader
from hf_flash.runtime.token_step import MOST_TOKENS, token_step
from hf_flash.store.layout import FlashStore
from tests.conftest import in_a_fork

pytestmark = pytest.mark.skipif(library() is None, reason="no compiled part")

LAYOUTS = [
    Layout(512, FULL, FULL), Layout(64, FULL, FULL, placed=True), Layout(512, BRAIN, BRAIN), Layout(27, BRAIN, BRAIN),
]  # fmt: skip


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[Layout, FlashStore]:
    return {layout: make_store(tmp_path_factory.mktemp("store"), layout) for layout in LAYOUTS}


READERS = ["direct", "mmap", "direct without a ring", "mmap without a ring"]


def make_rig(store: FlashStore, dtype: torch.dtype, reader: str, capacity: int, window: int) -> Rig:
    """With io_uring or with threads, as the end of `reader` says."""
    name, _, ringless = reader.partition(" ")
    with pytest.MonkeyPatch.context() as patch:
        if ringless:
            patch.setattr("hf_flash.reading.layer_files.CompiledQueue", partial(CompiledQueue, ring=False))
        return Rig(store, dtype, name, capacity, window)


@pytest.fixture(params=READERS)
def rig(stores: dict[Layout, FlashStore], request: pytest.FixtureRequest) -> Iterator[Rig]:
    with make_rig(stores[LAYOUTS[0]], FULL, request.param, 60, 2) as rig:
        yield rig


def some(share: float, seed: int, tokens: int = 1) -> torch.Tensor:
    return torch.rand(tokens, D_FF, generator=torch.Generator().manual_seed(seed)) < share


def ask(rig: Rig, mask: torch.Tensor) -> Any:
    """The step by itself."""
    x = torch.randn(1, rig.store.d_model, generator=torch.Generator().manual_seed(1)).to(rig.dtype)
    return rig.ffn.step.run(x, mask, {"up": rig.ffn.bias}, rig.engine.reader.step_file(LAYER))  # type: ignore[union-attr]


def runs(rig: Rig, patch: pytest.MonkeyPatch) -> list[bool]:
    """Of the step: whether each did it all."""
    done: list[bool] = []
    if rig.ffn.step is not None:
        real = rig.ffn.step.run

        def run(*args: Any) -> torch.Tensor | None:
            out = real(*args)
            done.append(out is not None)
            return out

        patch.setattr(rig.ffn.step, "run", run)
    return done


def state(rig: Rig) -> tuple[Any, ...]:
    window = rig.window
    return (*(part.tolist() for part in window.arrays), window.clock, window.free, window.use_score)


@settings(max_examples=60, deadline=None)
@given(
    layout=st.sampled_from(LAYOUTS), reader=st.sampled_from(READERS),
    capacity=st.integers(0, D_FF), window=st.integers(1, 4), threads=st.integers(1, 2), longest=st.sampled_from([3, 256]),
    calls=st.lists(
        st.tuples(st.floats(0, 0.5), st.integers(0, 9), st.just(1) | st.integers(1, MOST_TOKENS)), min_size=1, max_size=8
    ),
)  # fmt: skip
def test_it_gives_the_bits_the_reads_and_the_window_of_the_long_way(
    stores: dict[Layout, FlashStore], layout: Layout, reader: str, capacity: int, window: int, threads: int,
    longest: int, calls: list[tuple[float, int, int]],
) -> None:  # fmt: skip
    x, found, before = torch.randn(MOST_TOKENS, layout.d_model).to(layout.dtype), [], torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for whole in (True, False):
            with pytest.MonkeyPatch.context() as patch, make_rig(stores[layout], layout.dtype, reader, capacity, window) as rig:
                for module in ("reading.chunks", "runtime.token_step"):
                    patch.setattr(f"hf_flash.{module}.longest_chunk", lambda size: longest)
                rig.ffn.step = token_step(rig.engine.arithmetic, rig.window, rig.store) if whole else None
                answers, done = [], runs(rig, patch)
                for share, seed, tokens in calls:
                    rig.predictor.next = some(share, seed, tokens)
                    answers.append(rig.ffn(x[:tokens]))
                    assert len(rig.resident()) <= capacity
                    assert not whole or done[-1] is (int(rig.predictor.next.any(0).sum()) <= capacity)
                counted = {name: value for name, value in asdict(rig.engine.counters).items() if not name.endswith("_s")}
                slot_of, _, last_used, _, score = (part.tolist() for part in rig.window.arrays)
                there = [slot >= 0 for slot in slot_of]
                found.append(
                    (answers, counted, there, last_used, score, rig.window.clock, rig.window.free, rig.window.use_score)
                )
    finally:
        torch.set_num_threads(before)
    (ours, *after), (theirs, *after_too) = found
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert after == after_too


def test_it_is_what_decoding_uses(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    done = runs(rig, monkeypatch)
    for seed in range(5):
        rig.call(some(0.3, seed), 1)
    assert done == [True] * 5
    assert rig.engine.counters.calls == 5
    assert rig.engine.counters.reads > 0


def test_what_is_not_for_it_is_refused_with_nothing_changed(rig: Rig) -> None:
    rig.call(some(0.2, 0), 1)
    before = state(rig)
    assert ask(rig, torch.ones(1, D_FF, dtype=torch.bool)) is None  # more than fit into the window
    rig.engine.reader.step_file = lambda layer: None  # type: ignore[method-assign]
    assert ask(rig, some(0.2, 1)) is None  # nothing to read with
    assert state(rig) == before
    assert ask(rig, some(0.2, 0)) is not None  # nothing to be read


def test_reads_of_others_that_are_under_way_do_not_disturb_it(rig: Rig) -> None:
    reader, out = rig.engine.reader, aligned_empty((8, 2 * rig.store.d_model), FULL)
    reading = reader.start(LAYER, np.arange(8), out, np.arange(8), background=True)
    assert ask(rig, some(0.2, 3)) is not None
    reading.wait()
    assert torch.equal(out, rig.bundles[:8])
    rig.call(some(0.3, 3), 1)


@pytest.mark.parametrize("where", ["kernel", "disk"])
def test_a_read_that_fails_costs_the_window_nothing_but_what_went(rig: Rig, where: str) -> None:
    rig.call(some(0.2, 0), 1)
    kept, mask, state = rig.resident(), some(0.3, 1), rig.engine.reader.source.files[LAYER].state
    with open(os.devnull, "rb") as empty:  # brings no bytes
        right, state.fd = state.fd, 1 << 20 if where == "kernel" else empty.fileno()
        assert ask(rig, mask) is None
        assert rig.resident() <= kept
        with pytest.raises(StoreReadError):
            rig.call(mask, 1)
    state.fd = right
    rig.call(mask, 1)
    rig.call(some(0.3, 2), 1)
    assert ask(rig, some(0.3, 3)) is not None


def test_a_file_that_was_overwritten_is_an_error_until_it_is_put_back(tmp_path: Path, rig: Rig) -> None:
    path = rig.store.path
    whole, mask = path.read_bytes(), some(0.3, 1)
    with open(path, "r+b") as file:
        file.seek(rig.store.offset)
        file.write(bytes(len(whole) - rig.store.offset))
    for tokens, wanted in ((1, mask), (3, None)):
        with pytest.raises(StoreReadError, match="changed since the model was loaded"):
            rig.call(wanted, tokens)
    rig.resident()
    path.write_bytes(whole)
    for tokens, wanted in ((1, mask), (3, None), (1, some(0.4, 2))):
        rig.call(wanted, tokens)
    os.utime(path)
    rig.call(some(0.4, 3), 1)  # the same bytes


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_worker_reads_by_itself(rig: Rig) -> None:
    mask = some(0.3, 1)
    rig.call(some(0.3, 0), 1)

    def decodes() -> bool:
        for seed in range(4):
            rig.call(some(0.3, seed), 1)
        return ask(rig, mask) is not None

    assert in_a_fork(decodes)
    assert decodes()


@pytest.mark.parametrize("name", ["direct", "mmap"])
def test_files_are_closed_whatever_happens(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def files() -> int:
        gc.collect()
        return sum(os.readlink(link).startswith(str(tmp_path)) for link in Path("/proc/self/fd").iterdir() if link.is_symlink())

    store = make_store(tmp_path, LAYOUTS[0])
    before = files()
    for close in (True, False):
        reader = open_reader(store, name, 3, FULL, 0)
        assert files() > before
        if close:
            reader.close()
            assert files() == before
        del reader
        assert files() == before
    monkeypatch.setattr("hf_flash.reading.layer_files.hold", Mock(side_effect=[None, MemoryError]))
    with pytest.raises(MemoryError):
        open_reader(store, name, 3, FULL, 0)
    assert files() == before


@pytest.mark.parametrize("reader", ["direct", "mmap"])
def test_a_file_that_became_shorter_is_an_error_with_its_name(tmp_path: Path, reader: str) -> None:
    store = make_store(tmp_path, LAYOUTS[0])
    with Rig(store, FULL, reader, 100, 2) as rig:
        rig.call(some(0.2, 0), 1)
        path = store.layers[LAYER].path
        os.truncate(path, path.stat().st_size // 2)
        with pytest.raises(StoreReadError, match=r"flash-layer-00001\.safetensors"):
            rig.call(some(0.5, 1), 1)
        rig.resident()
        rig.call(some(0.2, 0), 1)
