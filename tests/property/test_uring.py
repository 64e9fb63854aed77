"""io_uring: every byte where it was asked for, every failure noticed, whatever the batch."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_flash.uring import Ring

SIZE = 64 << 10
UNIT = 64


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "data").write_bytes(np.random.default_rng(0).bytes(SIZE))
    fd = os.open(tmp_path / "data", os.O_RDONLY)
    yield fd
    os.close(fd)


@pytest.fixture
def ring() -> Ring:
    try:
        return Ring(8)
    except OSError as error:
        pytest.skip(f"no io_uring here: {error}")


def memory(count: int) -> np.ndarray:
    return np.frombuffer(mmap.mmap(-1, max(1, count) * UNIT), np.uint8)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(places=st.lists(st.integers(0, SIZE // UNIT - 1), max_size=40), background=st.booleans(), vectored=st.booleans())
def test_batches_of_any_size_arrive_whole(ring: Ring, file: int, places: list[int], background: bool, vectored: bool) -> None:
    """Up to five times as many reads as the ring has entries; vectored ones in halves that are swapped."""
    offsets, out = UNIT * np.array(places, dtype=np.int64), memory(len(places))
    addresses = out.ctypes.data + UNIT * np.arange(len(places))
    iovecs = np.stack([addresses + UNIT // 2, addresses], 1).reshape(-1)
    iovecs = np.stack([iovecs, np.full(len(iovecs), UNIT // 2)], 1)
    if vectored:
        where, lengths = iovecs.ctypes.data + 32 * np.arange(len(places)), np.full(len(places), 2)
    else:
        where, lengths = addresses, np.full(len(places), UNIT)
    batch = ring.read(file, offsets, where, lengths, (out, iovecs), vectored=vectored, background=background)
    assert (batch.wait() == UNIT).all()
    for i, place in enumerate(places):
        data = os.pread(file, UNIT, place * UNIT)
        wanted = data[UNIT // 2 :] + data[: UNIT // 2] if vectored else data
        assert out[i * UNIT : (i + 1) * UNIT].tobytes() == wanted


def test_batches_may_be_waited_for_in_any_order(ring: Ring, file: int) -> None:
    out = memory(60)
    batches = []
    for start in range(0, 60, 20):
        rows = start + np.arange(20)
        batches.append(
            ring.read(file, rows * UNIT, out.ctypes.data + rows * UNIT, np.full(20, UNIT), out, vectored=False, background=True)
        )
    for batch in reversed(batches):
        assert (batch.wait() == UNIT).all()
    assert out.tobytes()[: 60 * UNIT] == os.pread(file, 60 * UNIT, 0)
    ring.settle()


def test_what_fails_is_told(ring: Ring, file: int) -> None:
    out = memory(3)
    offsets, where = np.array([0, SIZE - UNIT // 2, SIZE + UNIT]), out.ctypes.data + UNIT * np.arange(3)
    lengths = np.full(3, UNIT)
    assert ring.read(file, offsets, where, lengths, out, vectored=False, background=False).wait().tolist() == [
        UNIT,
        UNIT // 2,
        0,
    ]
    bad = ring.read(1 << 20, offsets, where, lengths, out, vectored=False, background=False)
    assert bad.wait().tolist() == [-errno.EBADF] * 3
    nowhere = ring.read(file, offsets, np.zeros(3, dtype=np.int64), lengths, out, vectored=False, background=False)
    assert nowhere.wait()[0] == -errno.EFAULT


def test_reads_that_nobody_waits_for_are_settled(ring: Ring, file: int) -> None:
    out = memory(30)
    rows = np.arange(30)
    ring.read(file, rows * UNIT, out.ctypes.data + rows * UNIT, np.full(30, UNIT), out, vectored=False, background=True)
    ring.settle()
    assert out.tobytes()[: 30 * UNIT] == os.pread(file, 30 * UNIT, 0)


def test_an_interruption_waits_for_the_reads_first(ring: Ring, file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    out, rows = memory(30), np.arange(30)
    batch = ring.read(file, rows * UNIT, out.ctypes.data + rows * UNIT, np.full(30, UNIT), out, vectored=False, background=True)
    real, calls = ring.advance, 0

    def interrupted(one: object) -> None:
        nonlocal calls
        calls += 1
        if calls < 3:
            raise KeyboardInterrupt
        real(batch)

    monkeypatch.setattr(ring, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        batch.wait()
    assert (batch.results == UNIT).all()
