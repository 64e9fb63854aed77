"""Queues of reads: every byte where it was asked for, every failure told, whatever interrupts, forks or forbids."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_flash.base.buffers import allocate_pages
from hf_flash.compute import library as native
from hf_flash.reading.chunks import Chunks
from hf_flash.reading.compiled_queue import CompiledQueue
from hf_flash.reading.open_file import FileChangedError, OpenFile
from hf_flash.reading.pages_queue import PagesQueue
from hf_flash.reading.queues import ReadQueue
from tests.conftest import in_a_fork, interrupting
from tests.seccomp import forbid_ring

COUNT, ALIGN = 64, 512
SIZES = {"aligned": 4096, "odd": 1000}
KINDS = ["io_uring", "threads", "python"]


def make(kind: str, file: OpenFile, threads: int = 3) -> ReadQueue:
    if kind == "python":
        return PagesQueue()
    if native.library() is None:
        pytest.skip("no compiled part here")
    queue = CompiledQueue(threads, file, ring=kind == "io_uring")
    if kind == "io_uring" and not queue.has_ring:
        pytest.skip("no io_uring here")
    return queue


@contextmanager
def opened(path: Path, direct: bool, kind: str) -> Iterator[OpenFile]:
    """Python reads through the page cache alone, and gives pages back where it should have read directly."""
    past = direct and kind != "python"
    try:
        fd = os.open(path, os.O_RDONLY | (os.O_DIRECT if past else 0))
    except OSError:
        pytest.skip("no direct reads here")
    try:
        yield OpenFile(fd, ALIGN if past else 0, transient=direct)
    finally:
        os.close(fd)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture(params=[True, False], ids=["direct", "page cache"])
def file(request: pytest.FixtureRequest, data: Path, kind: str) -> Iterator[OpenFile]:
    with opened(data, request.param, kind) as found:
        yield found


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data").write_bytes(contents())
    return tmp_path / "data"


def contents(seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(COUNT * 4096)


def rows(count: int, size: int) -> Any:
    return np.frombuffer(allocate_pages(count * size), np.uint8, count * size).reshape(count, size)


def chunks(at: list[int], lengths: list[int], places: Any, size: int) -> Chunks:
    first = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Chunks(np.array(at, np.int64) * size, first, np.asarray(places, np.int64), size)


def alone(at: list[int], size: int) -> Chunks:
    return chunks(at, [1] * len(at), range(len(at)), size)


def correct(out: Any, asked: Chunks) -> bool:
    whole = contents()
    for chunk, offset in enumerate(asked.offset.tolist()):
        for k, row in enumerate(asked.rows[asked.first[chunk] : asked.first[chunk + 1]].tolist()):
            if out[row].tobytes() != whole[offset + k * asked.size :][: asked.size]:
                return False
    return True


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_batches_arrive_whole_and_in_any_order(kind: str, file: OpenFile, size: int, data: st.DataObject) -> None:
    queue, batches = make(kind, file), []
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.lists(st.integers(0, COUNT - 4), max_size=40))
        lengths = [data.draw(st.integers(1, 4)) for _ in at]
        places = data.draw(st.permutations(range(sum(lengths))))
        asked, out = chunks(at, lengths, places, size), rows(max(1, sum(lengths)), size)
        batches.append((queue.start(file, asked, out, background=data.draw(st.booleans())), asked, out))
    for ticket, asked, out in data.draw(st.permutations(batches)):
        queue.wait(ticket)
        assert correct(out, asked)
    queue.close()


def test_more_reads_than_a_ring_has_room_for(kind: str, file: OpenFile) -> None:
    queue, batches = make(kind, file), []
    for _ in range(4):
        asked, out = alone([i % COUNT for i in range(1500)], 512), rows(1500, 512)
        batches.append((queue.start(file, asked, out, background=True), asked, out))
    queue.settle()
    for ticket, asked, out in batches:
        assert kind == "python" or correct(out, asked)  # which reads when it is waited for
        queue.wait(ticket)
        assert correct(out, asked)
    queue.close()


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_what_fails_is_told(kind: str, file: OpenFile, size: int) -> None:
    queue = make(kind, file)
    for at, message in (([1, COUNT * 5], "shorter than when it was opened"), ([COUNT * 5, 1], "shorter")):
        with pytest.raises(OSError, match=message):
            queue.wait(queue.start(file, alone(at, size), rows(2, size), background=False))
    real, file.fd = file.fd, 1 << 20
    file.state.fd = 1 << 20
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        queue.wait(queue.start(file, alone([1, 2, 3], size), rows(3, size), background=True))
    file.fd = file.state.fd = real
    asked, out = alone([3, 1, 2], size), rows(3, size)
    queue.wait(queue.start(file, asked, out, background=False))
    assert correct(out, asked)
    queue.close()


def test_forgotten_reads_write_nothing_and_are_told(kind: str, file: OpenFile) -> None:
    if kind == "python":
        pytest.skip("nothing goes on behind the caller's back")
    queue, out = make(kind, file), rows(60, 4096)
    ticket = queue.start(file, alone([i % COUNT for i in range(60)], 4096), out, background=True)
    queue.forget()
    before = out.copy()
    with pytest.raises(OSError, match=os.strerror(errno.ECANCELED)):
        queue.wait(ticket)
    assert (out == before).all()
    queue.close()


def test_a_file_that_changed_is_noticed_and_accepted_if_its_bytes_are_the_same(kind: str, file: OpenFile, data: Path) -> None:
    header = (8).to_bytes(8, "little") + b"{}      "
    data.write_bytes(header + contents()[16:])
    crc32, queue, asked = f"{zlib.crc32(contents()[16:]):08x}", make(kind, file), alone([5, 9], 4096)
    with pytest.raises(FileChangedError):
        queue.wait(queue.start(file, asked, rows(2, 4096), background=False))
    file.verify(crc32)
    queue.wait(queue.start(file, asked, rows(2, 4096), background=False))
    with open(data, "r+b") as other:
        other.seek(5 * 4096)
        other.write(b"something else")
    with pytest.raises(FileChangedError):
        queue.wait(queue.start(file, asked, rows(2, 4096), background=False))
    with pytest.raises(FileChangedError):
        file.verify(crc32)
    with open(data, "r+b") as other:
        other.write(header + contents()[16:])
    os.utime(data, ns=(1, 1))
    file.verify(crc32)
    queue.wait(queue.start(file, asked, rows(2, 4096), background=False))
    queue.close()


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_interruptions_anywhere_hang_nothing_and_lose_nothing(kind: str, file: OpenFile, size: int) -> None:
    """Real signals: a queue goes on after each as if nothing had been, and what is not interrupted is right."""
    queue, generator, interrupted = make(kind, file), random.Random(1), 0
    asked = alone([generator.randrange(COUNT) for _ in range(24)], size)
    for _ in range(250):
        out = rows(24, size)
        try:
            with interrupting(generator.uniform(1e-5, 6e-4)):
                tickets = [queue.start(file, asked, out, background=generator.random() < 0.5) for _ in range(2)]
                for ticket in tickets:
                    queue.wait(ticket)
            assert correct(out, asked)
        except KeyboardInterrupt:
            interrupted += 1
            queue.forget()
            again = rows(24, size)
            queue.wait(queue.start(file, asked, again, background=False))
            assert correct(again, asked)
    assert interrupted > 20
    queue.close()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_process_reads_with_a_queue_of_its_own(kind: str, file: OpenFile) -> None:
    queue, out, asked = make(kind, file), rows(40, 4096), alone(list(range(40)), 4096)
    under_way = queue.start(file, asked, out, background=True)
    queue.settle()

    def reads() -> bool:
        queue.wait(under_way)  # done before the fork
        again = rows(40, 4096)
        queue.wait(queue.start(file, asked, again, background=True))
        queue.close()
        return correct(again, asked) and correct(out, asked)

    assert in_a_fork(reads)
    assert reads()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_what_a_fork_left_under_way_is_told_or_read_again(kind: str, file: OpenFile) -> None:
    """Without the parent's `settle`, as when C code forks."""
    queue, asked = make(kind, file), alone([i % COUNT for i in range(400)], 4096)
    for _ in range(3):
        out = rows(400, 4096)
        ticket = queue.start(file, asked, out, background=True)

        def reads(ticket: Any = ticket, out: Any = out) -> bool:
            try:
                queue.wait(ticket)
            except OSError as error:
                return error.errno == errno.ECANCELED
            return correct(out, asked)

        assert in_a_fork(reads)
        queue.wait(ticket)
        assert correct(out, asked)
    queue.close()


def test_threads_may_share_a_queue(kind: str, file: OpenFile) -> None:
    if kind == "python":
        pytest.skip("it has no state")
    queue, failed = make(kind, file), []

    def work(seed: int) -> None:
        generator = random.Random(seed)
        for _ in range(60):
            asked, out = alone([generator.randrange(COUNT) for _ in range(30)], 4096), rows(30, 4096)
            queue.wait(queue.start(file, asked, out, background=generator.random() < 0.5))
            if not correct(out, asked):
                failed.append(seed)

    threads = [threading.Thread(target=work, args=[seed]) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    queue.close()


def test_a_queue_that_is_dropped_ends_its_threads(kind: str, data: Path) -> None:
    tasks = Path("/proc/self/task")
    if not tasks.exists():
        pytest.skip("no /proc here")
    for _ in range(3):
        with opened(data, True, kind) as file:
            before = len(list(tasks.iterdir()))
            queue, out = make(kind, file, 6), rows(40, 1000)
            queue.start(file, alone(list(range(40)), 1000), out, background=True)
            assert len(list(tasks.iterdir())) > before or kind == "python"
            queue.close()
            del queue
            for _ in range(300):  # the kernel's own workers for io_uring end a little later
                if len(list(tasks.iterdir())) <= before:
                    break
                threading.Event().wait(0.02)
            assert len(list(tasks.iterdir())) <= before


# --- io_uring that is forbidden: a real seccomp filter, in a process of its own --------------------------------------------


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.parametrize("error", [errno.EPERM, errno.ENOSYS])
@pytest.mark.parametrize("when", ["before", "after", "under way", "in a worker"])
@pytest.mark.parametrize("kind", ["io_uring"], indirect=True)
def test_a_ring_that_is_forbidden_is_given_up(file: OpenFile, error: int, when: str) -> None:
    make("io_uring", file).close()
    if not in_a_fork(lambda: forbid_ring(error) is None):
        pytest.skip("no seccomp filters here")
    asked, out = alone([i % COUNT for i in range(1500)], 512), rows(1500, 512)

    def reads(queue: CompiledQueue, ticket: Any = None) -> bool:
        for _ in range(3):
            ticket = ticket or queue.start(file, asked, out, background=False)
            queue.wait(ticket)
            if not correct(out, asked):
                return False
            out[:], ticket = 0, None
        return not queue.has_ring

    def scenario() -> bool:
        if when == "before":
            forbid_ring(error, setup=False)
        queue, ticket = CompiledQueue(3, file), None
        if queue.has_ring is (when == "before"):
            return False
        if when == "under way":
            ticket = queue.start(file, asked, out, background=True)
        if when == "in a worker":
            worker = in_a_fork(lambda: forbid_ring(error) is None and reads(queue))
            return worker and not reads(queue) and queue.has_ring  # the parent keeps its own
        if when != "before":
            forbid_ring(error)
        return reads(queue, ticket)

    assert in_a_fork(scenario)


def test_structures_are_as_the_compiled_part_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    if native.library() is None:
        pytest.skip("no compiled part here")

    class Longer(ctypes.Structure):
        _fields_ = (*native.TokenJob._fields_, ("more", ctypes.c_int64))

    for at in range(len(native.STRUCTURES)):
        wrong = [*native.STRUCTURES]
        wrong[at] = Longer
        monkeypatch.setattr(native, "STRUCTURES", wrong)
        with pytest.raises(OSError, match="install hf_flash again"):
            native.load()


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("kind", ["io_uring", "threads"])
def test_what_the_page_cache_has_only_half_of_comes_whole(
    kind: str, background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads that compute copy what is there, once; the rest is read."""
    monkeypatch.setattr(native, "threads", lambda: 2)
    path, size, count = tmp_path / "file", 16384, 256
    content = np.random.default_rng(0).integers(0, 256, (count, size), dtype=np.uint8)
    path.write_bytes(content.tobytes())
    os.sync()
    with opened(path, False, kind) as file:
        queue = make(kind, file)
        try:
            for lacking in (0, 3, 100, 256):
                fd = os.open(path, os.O_RDONLY)
                os.pread(fd, count * size, 0)
                os.posix_fadvise(fd, (count - lacking) * size, lacking * size or 1, os.POSIX_FADV_DONTNEED)
                os.close(fd)
                out, places = rows(count, size), [*range(0, count, 2), *range(1, count, 2)]
                queue.wait(queue.start(file, chunks(places, [1] * count, places, size), out, background=background))
                assert (out == content).all()
        finally:
            queue.close()
