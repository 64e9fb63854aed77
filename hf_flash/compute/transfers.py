"""`Transfers`: copies between this machine's memory and a device, beside what the device computes.

They run on a stream of their own, in the order in which they were asked for. Events hold them together with what the device
computes, so that this process waits for the device only where it has to. Three things decide their speed:

    pinned memory    a device reads it by itself; from any other the driver copies first, and this process waits
    contiguous       torch gathers strided memory on the host, outside of the order of the stream
    few              a copy takes some microseconds to start, whatever its size

torch.accelerator's devices with streams (CUDA, ROCm, XPU) work so. Where a device has none (the CPU as its own device, MPS),
copies are done when they are asked for, by the same calls.
"""

from __future__ import annotations

import logging
import mmap
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, Protocol

import numpy.typing as npt
import torch

from hf_flash.base.buffers import allocate_pages
from hf_flash.base.sizes import format_bytes
from hf_flash.machine.free_memory import available_memory

logger = logging.getLogger("hf_flash")
_PORTABLE: Final = 1  # for all devices: cudaHostRegisterPortable
_NEEDED: Final = ("Stream", "Event", "stream", "current_stream")  # of a device's module in torch
_WITHOUT_STREAMS: Final = ("cpu", "mps")


def upload(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """A small array as a tensor on a device, without waiting for what the device computes.

    From memory that is not pinned, CUDA takes a copy before it returns; others may read it later, and are waited for.
    """
    return torch.from_numpy(array).to(device, non_blocking=device.type == "cuda")


class Copied:
    """A copy on its way; or one that is done, where there are no streams.

    Args:
        event: recorded behind it.
    """

    def __init__(self, event: Any) -> None:
        self.event = event

    def wait(self) -> None:
        """Wait until it is done: then the memory that it came from may be written to."""
        if self.event is not None:
            self.event.synchronize()


class Transfers:
    """Copies to and from one device.

    Args:
        device: with its index, if it has one.

    Attributes:
        copied_bytes: asked for since it was made.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.copied_bytes = device, 0
        self._last: Any = None  # behind what the last caller told the device
        module: Any = torch.get_device_module(device.type) if device.type not in _WITHOUT_STREAMS else None
        self._module = module if all(hasattr(module, name) for name in _NEEDED) else None
        self._stream: Any = None if self._module is None else self._module.Stream(device)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """For a layer's call: what the device was told by the call before, perhaps on another stream, is over before it begins.

        Call with the engine's lock held. Buffers and slots are the same for all callers.
        """
        if self._last is not None and self._module is not None:
            self._module.current_stream(self.device).wait_event(self._last)
        try:
            yield
        finally:
            self._last = self.mark()

    def mark(self) -> Any:
        """What the device has been told to compute so far: for [`follow`]."""
        return None if self._module is None else self._recorded(self._module.current_stream(self.device))

    def follow(self, mark: Any) -> None:
        """Let the copies from here on wait for what was computed up to a mark: they may overwrite what that reads."""
        if mark is not None:
            self._stream.wait_event(mark)

    def copy(self, *parts: tuple[torch.Tensor, torch.Tensor]) -> Copied:
        """Begin to copy contiguous memory, of the same shape and dtype: sources and targets, one of each pair on the device."""
        self.copied_bytes += sum(source.nbytes for source, _ in parts)
        if self._module is None:
            for source, target in parts:
                target.copy_(source)
            return Copied(None)
        with self._module.stream(self._stream):
            for source, target in parts:
                target.copy_(source, non_blocking=True)
        return Copied(self._recorded(self._stream))

    def use(self, copied: Copied) -> None:
        """Let what the device computes from here on wait for a copy."""
        if copied.event is not None:
            assert self._module is not None
            self._module.current_stream(self.device).wait_event(copied.event)

    def synchronize(self) -> None:
        """Wait for all copies."""
        if self._stream is not None:
            self._stream.synchronize()

    def _recorded(self, stream: Any) -> Any:
        assert self._module is not None
        event = self._module.Event()
        event.record(stream)
        return event


def free_bytes(device: str) -> int:
    """The bytes that this process may still take on a device: what is free, and what torch holds there in reserve."""
    module = torch.get_device_module(torch.device(device).type)
    if not hasattr(module, "mem_get_info"):
        return available_memory()  # it has this machine's memory
    free, held = module.mem_get_info(device)[0], 0
    if hasattr(module, "memory_reserved"):
        held = module.memory_reserved(device) - module.memory_allocated(device)
    return int(free + held)


def shares_memory(device: str) -> bool:
    """Whether a device has this machine's memory instead of its own."""
    place = torch.device(device)
    if place.type == "cuda":
        return bool(getattr(torch.cuda.get_device_properties(place), "is_integrated", False))
    return place.type in ("cpu", "mps")


class Driver(Protocol):
    """What pins memory for a kind of device."""

    def register(self, address: int, nbytes: int, device: torch.device) -> int:
        """Pin memory that a device copies from; returns an error, or 0."""
        ...

    def unregister(self, address: int) -> None:
        """Memory that was pinned is as it was."""
        ...


class _Cuda:
    """CUDA's driver, and ROCm's under the same names."""

    def register(self, address: int, nbytes: int, device: torch.device) -> int:
        with torch.cuda.device(device):  # or the first GPU would get a context, too
            error = int(torch.cuda.cudart().cudaHostRegister(address, nbytes, _PORTABLE))  # type: ignore[no-untyped-call]
            if error:
                with suppress(RuntimeError):  # the runtime remembers its last error, and the next kernel would raise it
                    torch.zeros(1, dtype=torch.uint8, device=device)
        return error

    def unregister(self, address: int) -> None:
        torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]


DRIVERS: Final[dict[str, Driver]] = {"cuda": _Cuda()}
"""By type of device. Memory for others is not pinned: copies of it are done when they are asked for, or as the driver likes."""


class PinnedMemory:
    """Memory of this machine that a device copies from by itself.

    torch's own allocator of such memory rounds sizes up to powers of two, which a budget cannot afford: pages are registered
    with the driver instead. A forked process does not have them: it would turn the pages that the device knows into copies.

    Args:
        shape: of a uint8 tensor.
        transfers: that copy from it and to it. They are waited for before the memory goes.

    Attributes:
        tensor: uint8, page-aligned.
        is_pinned: not where the driver refuses, which is said, nor for devices without one in `DRIVERS`.
    """

    def __init__(self, shape: tuple[int, ...], transfers: Transfers) -> None:
        self.tensor, self.is_pinned = torch.empty(shape, dtype=torch.uint8, device="cpu"), False
        driver, nbytes = DRIVERS.get(transfers.device.type), self.tensor.nbytes
        if not nbytes:
            return
        pages = allocate_pages(nbytes)
        self.tensor = torch.frombuffer(pages, dtype=torch.uint8).view(shape)
        if driver is None:
            return
        if hasattr(mmap, "MADV_DONTFORK"):
            pages.madvise(mmap.MADV_DONTFORK)
        if error := driver.register(self.tensor.data_ptr(), nbytes, transfers.device):
            logger.warning(
                "hf_flash: the driver refuses to pin %s of memory (error %d): copies to %s will be slower",
                format_bytes(nbytes), error, transfers.device,
            )  # fmt: skip
            return
        self.is_pinned = True
        self._unpin = weakref.finalize(self, _unpin, driver, self.tensor.data_ptr(), transfers, os.getpid())
        self._unpin.atexit = False  # the driver may be gone by then

    def release(self) -> None:
        """Give it back. Nothing may be copied from it or to it any more."""
        if self.is_pinned:
            self.is_pinned = False
            self._unpin()
        self.tensor = self.tensor.new_empty((0, *self.tensor.shape[1:]))


def _unpin(driver: Driver, address: int, transfers: Transfers, process: int) -> None:
    if os.getpid() != process:
        return  # a forked process has neither this memory nor the device
    transfers.synchronize()
    driver.unregister(address)
