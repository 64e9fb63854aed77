"""One token in one call of the compiled part, beside the same token step by step.

That the window then holds what it should, and what is read for it, is in test_window_and_reads.py, whose layers go either way.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
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
from hf_flash.memory import aligned_empty
from hf_flash.native import library
from hf_flash.reader import open_reader
from hf_flash.step import TokenStep
from hf_flash.store import FlashStore
from hf_flash.uring import Ring
from tests.conftest import in_a_fork

pytestmark = pytest.mark.skipif(library() is None, reason="no compiled part")

LAYOUTS = [
    Layout(512, FULL, FULL), Layout(64, FULL, FULL, placed=True), Layout(512, BRAIN, BRAIN), Layout(27, BRAIN, BRAIN),
]  # fmt: skip


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[Layout, FlashStore]:
    return {layout: make_store(tmp_path_factory.mktemp("store"), layout) for layout in LAYOUTS}


def ring_expected(rig: Rig, reader: str) -> bool:
    """What the reader should find out, found out in another way."""
    try:
        Ring(8)
        if reader == "direct":
            return rig.store.bundle_bytes % rig.unit == 0
        with open(rig.store.path, "rb") as file, suppress(BlockingIOError):
            os.preadv(file.fileno(), [bytearray(8)], 8, os.RWF_NOWAIT)
    except OSError:
        return False
    return True


@pytest.fixture(params=["direct", "mmap"])
def rig(stores: dict[Layout, FlashStore], request: pytest.FixtureRequest) -> Iterator[Rig]:
    with Rig(stores[LAYOUTS[0]], FULL, request.param, 60, 2) as rig:
        if not ring_expected(rig, request.param):
            pytest.skip("no io_uring")
        yield rig


def some(share: float, seed: int) -> torch.Tensor:
    return torch.rand(1, D_FF, generator=torch.Generator().manual_seed(seed)) < share


def ask(rig: Rig, mask: torch.Tensor) -> Any:
    """The step by itself."""
    x = torch.randn(1, rig.store.d_model, generator=torch.Generator().manual_seed(1)).to(rig.dtype)
    return rig.ffn.step.run(x, mask, rig.ffn.bias, rig.engine.reader.ring(LAYER))  # type: ignore[union-attr]


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
    return (*(part.tolist() for part in window.arrays), window.clock, window.free, window.gain)


@settings(max_examples=60, deadline=None)
@given(
    layout=st.sampled_from(LAYOUTS), reader=st.sampled_from(["direct", "mmap"]),
    capacity=st.integers(0, D_FF), window=st.integers(1, 4), threads=st.integers(1, 2), longest=st.sampled_from([3, 256]),
    calls=st.lists(st.tuples(st.floats(0, 0.5), st.integers(0, 9)), min_size=1, max_size=8),
)  # fmt: skip
def test_it_gives_the_bits_the_reads_and_the_window_of_the_long_way(
    stores: dict[Layout, FlashStore], layout: Layout, reader: str, capacity: int, window: int, threads: int,
    longest: int, calls: list[tuple[float, int]],
) -> None:  # fmt: skip
    x, found, before = torch.randn(1, layout.d_model).to(layout.dtype), [], torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for whole in (True, False):
            with pytest.MonkeyPatch.context() as patch, Rig(stores[layout], layout.dtype, reader, capacity, window) as rig:
                for module in ("sources", "step"):
                    patch.setattr(f"hf_flash.{module}.longest_chunk", lambda size: longest)
                rig.ffn.step = TokenStep(rig.engine.scratch.kernel.room, rig.window, rig.store) if whole else None
                answers, done, expected = [], runs(rig, patch), ring_expected(rig, reader)
                for share, seed in calls:
                    rig.predictor.next = some(share, seed)
                    answers.append(rig.ffn(x))
                    assert len(rig.resident()) <= capacity
                    assert not whole or not expected or done[-1] is (int(rig.predictor.next.sum()) <= capacity)
                counted = {name: value for name, value in asdict(rig.engine.counters).items() if not name.endswith("_s")}
                slot_of, _, last_used, _, worth = (part.tolist() for part in rig.window.arrays)
                there = [slot >= 0 for slot in slot_of]
                found.append((answers, counted, there, last_used, worth, rig.window.clock, rig.window.free, rig.window.gain))
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
    rig.engine.reader.ring = lambda layer: None  # type: ignore[method-assign]
    assert ask(rig, some(0.2, 1)) is None  # nothing to read with
    assert state(rig) == before
    assert ask(rig, some(0.2, 0)) is not None  # nothing to be read


@pytest.mark.parametrize("rig", ["direct"], indirect=True)
def test_a_ring_that_is_in_use_is_left_alone(rig: Rig) -> None:
    reader, out = rig.engine.reader, aligned_empty((8, 2 * rig.store.d_model), FULL)
    reading = reader.start(LAYER, np.arange(8), out, np.arange(8))
    assert reader.ring(LAYER) is None
    rig.call(some(0.2, 3), 1)
    reading.wait()
    assert torch.equal(out, rig.bundles[:8])
    assert reader.ring(LAYER) is not None


@pytest.mark.parametrize("where", ["kernel", "disk"])
def test_a_read_that_fails_costs_the_window_nothing_but_what_went(rig: Rig, where: str) -> None:
    rig.call(some(0.2, 0), 1)
    kept = rig.resident()
    right: Any = rig.engine.reader.ring(LAYER)
    with open(os.devnull, "rb") as empty:  # brings no bytes
        wrong = right._replace(fd=-1 if where == "kernel" else empty.fileno())
        rig.engine.reader.ring = lambda layer: wrong  # type: ignore[method-assign]
        mask = some(0.3, 1)
        assert ask(rig, mask) is None
        assert rig.resident() <= kept
        rig.call(mask, 1)  # the long way, which reads with its own
    del rig.engine.reader.ring
    assert rig.engine.reader.ring(LAYER) == right
    rig.call(some(0.3, 2), 1)
    assert rig.ffn.step is not None
    assert rig.ffn.step.did.failed == 0


def test_a_ring_that_takes_nothing_is_an_error_for_the_long_way(rig: Rig) -> None:
    ring, fd, _ = rig.engine.reader.ring(LAYER)  # type: ignore[misc]
    tail = int(ring._sq_tail[0])
    real, ring.fd = ring.fd, fd  # not a ring
    assert ask(rig, some(0.3, 1)) is None
    ring.fd = real
    assert int(ring._sq_tail[0]) == tail
    assert rig.resident() == set()
    rig.call(some(0.3, 1), 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_worker_leaves_the_ring_to_its_parent(rig: Rig) -> None:
    mask, parent = some(0.3, 1), rig.engine.reader.ring(LAYER)

    def own() -> bool:
        found = rig.engine.reader.ring(LAYER)
        rig.call(mask, 1)
        return found is None or found.ring is not parent.ring  # type: ignore[union-attr]

    assert in_a_fork(own)
    rig.call(mask, 1)


@pytest.mark.parametrize("lacking", ["hf_flash.sources.Ring", "os.preadv"])
def test_the_page_cache_is_read_step_by_step_where_a_ring_is_of_no_use(
    stores: dict[Layout, FlashStore], lacking: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Rig(stores[LAYOUTS[0]], FULL, "mmap", 100, 2) as rig:
        monkeypatch.setattr(lacking, Mock(side_effect=OSError(95, "Operation not supported")))
        assert rig.engine.reader.ring(LAYER) is None
        done = runs(rig, monkeypatch)
        rig.call(some(0.3, 1), 1)
        assert done == [False]
        rig.call(some(0.3, 1), 1)  # nothing is missing
        assert done == [False, True]


@pytest.mark.parametrize("name", ["direct", "mmap"])
def test_files_are_closed_whatever_happens(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def files() -> int:
        gc.collect()
        return sum(os.readlink(link).startswith(str(tmp_path)) for link in Path("/proc/self/fd").iterdir() if link.is_symlink())

    store = make_store(tmp_path, LAYOUTS[0])
    before = files()
    for close in (True, False):
        reader = open_reader(store, name, 3, FULL, 0)
        reader.ring(LAYER)
        assert files() > before
        if close:
            reader.close()
            assert files() == before
        del reader
        assert files() == before
    monkeypatch.setattr("hf_flash.sources.hold", Mock(side_effect=[None, MemoryError]))
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
