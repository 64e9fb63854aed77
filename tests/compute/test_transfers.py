"""Copies to a device: in which order streams are told to wait, and memory that is pinned for as long as it is used."""

from __future__ import annotations

import gc
import logging
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_flash.compute import transfers
from hf_flash.compute.transfers import PinnedMemory, Transfers, free_bytes, upload
from tests.conftest import in_a_fork

CPU = torch.device("cpu")


class Streams:
    """A device's module of torch that writes down what its streams are told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.events = 0
        self.current = "compute"
        outer = self

        class Stream:
            def __init__(self, name: Any) -> None:
                self.name = name if isinstance(name, str) else "copies"

            def wait_event(self, event: Any) -> None:
                outer.told.append((self.name, "waits for", event.number))

            def synchronize(self) -> None:
                outer.told.append((self.name, "is waited for"))

        class Event:
            def __init__(self) -> None:
                outer.events += 1
                self.number = outer.events

            def record(self, stream: Any) -> None:
                outer.told.append((stream.name, "records", self.number))

            def synchronize(self) -> None:
                outer.told.append(("host", "waits for", self.number))

        self.Stream, self.Event = Stream, Event

    def current_stream(self, device: Any = None) -> Any:
        return self.Stream(self.current)

    def set_stream(self, stream: Any) -> None:
        self.current = stream.name

    def current_device(self) -> int:
        return 0

    def set_device(self, device: int) -> None:
        pass

    @contextmanager
    def stream(self, stream: Any) -> Any:
        before, self.current = self.current, stream.name
        yield
        self.current = before


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    module = Streams()
    monkeypatch.setattr(transfers, "_WITHOUT_STREAMS", ())
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    return module


def test_copies_and_products_wait_for_one_another_by_events(streams: Streams) -> None:
    moving = Transfers(CPU)
    before = moving.mark()
    moving.follow(before)
    copied = moving.copy((torch.arange(4, dtype=torch.uint8), target := torch.zeros(4, dtype=torch.uint8)))
    moving.use(copied)
    copied.wait()
    moving.synchronize()
    assert streams.told == [
        ("compute", "records", 1), ("copies", "waits for", 1), ("copies", "records", 2), ("compute", "waits for", 2),
        ("host", "waits for", 2), ("copies", "is waited for"),
    ]  # fmt: skip
    assert target.tolist() == [0, 1, 2, 3]
    assert moving.copied_bytes == 4
    moving.follow(None)
    assert len(streams.told) == 6


def test_without_streams_a_copy_is_done_when_it_is_asked_for() -> None:
    moving = Transfers(torch.device("cpu:0"))
    target = torch.zeros(4)
    copied = moving.copy((torch.arange(4.0), target))
    assert target.tolist() == [0, 1, 2, 3]
    moving.follow(moving.mark())
    moving.use(copied)
    copied.wait()
    moving.synchronize()


class Driver:
    """Pins memory, or refuses to."""

    def __init__(self, error: int = 0) -> None:
        self.error, self.pinned, self.done = error, dict[int, int](), list[int]()

    def register(self, address: int, nbytes: int, device: torch.device) -> int:
        if not self.error:
            self.pinned[address] = nbytes
        return self.error

    def unregister(self, address: int) -> None:
        del self.pinned[address]
        self.done.append(address)


@pytest.mark.parametrize("how", ["released", "dropped"])
def test_memory_is_pinned_until_it_goes(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    driver, waited = Driver(), list[int]()
    monkeypatch.setitem(transfers.DRIVERS, "cpu", driver)
    moving: Any = SimpleNamespace(device=CPU, synchronize=lambda: waited.append(len(driver.pinned)))
    memory = PinnedMemory((3, 5000), moving)
    assert memory.is_pinned
    assert driver.pinned == {memory.tensor.data_ptr(): 15000}
    assert memory.tensor.data_ptr() % 4096 == 0
    memory.tensor.fill_(7)
    if how == "released":
        memory.release()
        memory.release()
        assert memory.tensor.shape == (0, 5000)
        assert not memory.is_pinned
    del memory
    gc.collect()
    assert not driver.pinned
    assert len(driver.done) == 1
    assert waited == [1], "copies are waited for before the memory goes"


def test_a_forked_process_unpins_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(transfers.DRIVERS, "cpu", driver := Driver())
    memory = PinnedMemory((2, 8), Transfers(CPU))

    def dropped() -> bool:
        memory._unpin()
        return not driver.done

    assert in_a_fork(dropped)
    memory.release()
    assert len(driver.done) == 1


def test_a_driver_that_refuses_is_named_and_the_memory_is_plain(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(transfers.DRIVERS, "cpu", Driver(error=2))
    with caplog.at_level(logging.WARNING, "hf_flash"):
        memory = PinnedMemory((2, 8), Transfers(CPU))
    assert not memory.is_pinned
    assert "error 2" in caplog.text
    memory.tensor.fill_(1)
    memory.release()


def test_no_memory_needs_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(transfers.DRIVERS, "cpu", driver := Driver())
    assert PinnedMemory((0, 8), Transfers(CPU)).tensor.shape == (0, 8)
    assert not driver.pinned


def test_small_arrays_go_to_the_device_and_its_memory_is_known() -> None:
    assert upload(torch.arange(3).numpy(), CPU).tolist() == [0, 1, 2]
    assert free_bytes("cpu:0") > 0
