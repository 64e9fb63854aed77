"""One token in one call of the compiled part, beside the same token step by step.

That the window then holds what it should, and what is read for it, is in test_window_and_reads.py, whose layers go either way.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_window_and_reads import BRAIN, D_FF, FULL, LAYER, Layout, Rig, make_store

from hf_flash import StoreReadError
from hf_flash.memory import aligned_empty
from hf_flash.native import library
from hf_flash.store import FlashStore

pytestmark = pytest.mark.skipif(library() is None, reason="no compiled part")

LAYOUTS = [
    Layout(512, FULL, FULL), Layout(64, FULL, FULL, placed=True), Layout(512, BRAIN, BRAIN), Layout(27, BRAIN, BRAIN),
]  # fmt: skip


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[Layout, FlashStore]:
    return {layout: make_store(tmp_path_factory.mktemp("store"), layout) for layout in LAYOUTS}


@pytest.fixture(params=["direct", "mmap"])
def rig(stores: dict[Layout, FlashStore], request: pytest.FixtureRequest) -> Iterator[Rig]:
    with Rig(stores[LAYOUTS[0]], FULL, request.param, 60, 2) as rig:
        if rig.engine.reader.ring(LAYER) is None:
            pytest.skip("no io_uring")
        yield rig


def some(share: float, seed: int) -> torch.Tensor:
    return torch.rand(1, D_FF, generator=torch.Generator().manual_seed(seed)) < share


def ask(rig: Rig, mask: torch.Tensor) -> Any:
    """The step by itself."""
    x = torch.randn(1, rig.store.d_model, generator=torch.Generator().manual_seed(1)).to(rig.dtype)
    return rig.ffn.step.run(x, mask, rig.ffn.bias, rig.engine.reader.ring(LAYER))  # type: ignore[union-attr]


def state(rig: Rig) -> tuple[Any, ...]:
    window = rig.window
    return (*(part.tolist() for part in window.arrays), window.clock, window.free, window.gain)


@settings(max_examples=60, deadline=None)
@given(
    layout=st.sampled_from(LAYOUTS), reader=st.sampled_from(["direct", "mmap"]),
    capacity=st.integers(0, D_FF), window=st.integers(1, 4), threads=st.integers(1, 2),
    calls=st.lists(st.tuples(st.floats(0, 0.5), st.integers(0, 9)), min_size=1, max_size=8),
)  # fmt: skip
def test_it_gives_the_bits_the_reads_and_the_window_of_the_long_way(
    stores: dict[Layout, FlashStore], layout: Layout, reader: str, capacity: int, window: int, threads: int,
    calls: list[tuple[float, int]],
) -> None:  # fmt: skip
    x, found, before = torch.randn(1, layout.d_model).to(layout.dtype), [], torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for whole in (True, False):
            with Rig(stores[layout], layout.dtype, reader, capacity, window) as rig:
                assert rig.ffn.step is not None
                if not whole:
                    rig.ffn.step = None
                answers = []
                for share, seed in calls:
                    rig.predictor.next = some(share, seed)
                    answers.append(rig.ffn(x))
                    assert len(rig.resident()) <= capacity
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
    done = []
    step = rig.ffn.step
    assert step is not None
    real = step.run
    monkeypatch.setattr(step, "run", lambda *args: done.append(real(*args)) or done[-1])
    for seed in range(5):
        rig.call(some(0.3, seed), 1)
    assert len(done) == 5
    assert all(out is not None for out in done)
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
