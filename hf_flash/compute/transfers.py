"""`Transfers`: copies between this machine's memory and a device, concurrent with what the device computes.

Copies run on a stream of their own, in the order in which they were requested. Events synchronize them with what the device
computes, so that this process waits for the device only where it must. Copies are fast if they are:

    from pinned memory    the device reads it by itself; other memory is copied by the driver first, and this process waits
    contiguous            torch gathers strided memory on the host, outside of the order of the stream
    few                   a copy takes some microseconds to start, whatever its size

This holds for torch.accelerator's devices with streams (CUDA, ROCm, XPU). On devices without streams (MPS, or the CPU in place
of a device), the same calls copy at once.
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
_PORTABLE: Final = 1  # cudaHostRegisterPortable: pinned for all devices
_NEEDED: Final = (  # attributes of a device's module in torch
    "Stream", "Event", "stream", "current_stream", "set_stream", "current_device", "set_device",
)  # fmt: skip
_WITHOUT_STREAMS: Final = ("cpu", "mps")


def upload(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """A small array as a tensor on a device; on CUDA, without waiting for what the device computes.

    CUDA copies memory that is not pinned before the call returns. Other devices may read it later, so the copy is waited for.
    """
    return torch.from_numpy(array).to(device, non_blocking=device.type == "cuda")


class Copied:
    """A copy that is under way, or done if the device has no streams.

    Args:
        event: recorded after the copy; `None` without streams.
    """

    def __init__(self, event: Any) -> None:
        self.event = event

    def wait(self) -> None:
        """Wait until the copy is done. Afterwards its source may be overwritten."""
        if self.event is not None:
            self.event.synchronize()


class Transfers:
    """Copies to and from one device.

    Args:
        device: the device, with its index if it has one.

    Attributes:
        copied_bytes: bytes of all copies requested so far.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.copied_bytes = device, 0
        self._last: Any = None  # recorded after the last caller's work
        module: Any = torch.get_device_module(device.type) if device.type not in _WITHOUT_STREAMS else None
        self._module = module if all(hasattr(module, name) for name in _NEEDED) else None
        self._stream: Any = None if self._module is None else self._module.Stream(device)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Run a layer's call inside this context: its work begins after that of the previous call, even on another stream.

        Afterwards the caller's stream is the current one, wherever an interrupt came.

        Hold the engine's lock: all callers share buffers and slots.
        """
        if self._module is None:
            yield
            return
        device, stream = self._module.current_device(), self._module.current_stream(self.device)
        if self._last is not None:
            stream.wait_event(self._last)
        try:
            yield
        finally:
            if self._module.current_stream(self.device) != stream:  # an interrupt came while `copy` changed streams
                self._module.set_stream(stream)
                self._module.set_device(device)
            self._last = self._recorded(stream)

    def mark(self) -> Any:
        """A mark behind all work that the current stream has been given so far, for [`follow`]."""
        return None if self._module is None else self._recorded(self._module.current_stream(self.device))

    def follow(self, mark: Any) -> None:
        """Let later copies wait for the work before a mark, because they may overwrite what it reads."""
        if mark is not None:
            self._stream.wait_event(mark)

    def copy(self, *parts: tuple[torch.Tensor, torch.Tensor]) -> Copied:
        """Begin to copy (source, target) pairs of contiguous tensors of equal shape and dtype, one of each on the device."""
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
        """Let later work on the current stream wait for a copy."""
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
    """Bytes that this process may still take on a device: free memory, and memory that torch has reserved but does not use."""
    module = torch.get_device_module(torch.device(device).type)
    if not hasattr(module, "mem_get_info"):
        return available_memory()  # such a device uses this machine's memory
    free, held = module.mem_get_info(device)[0], 0
    if hasattr(module, "memory_reserved"):
        held = module.memory_reserved(device) - module.memory_allocated(device)
    return int(free + held)


def shares_memory(device: str) -> bool:
    """Whether a device uses this machine's memory instead of memory of its own."""
    place = torch.device(device)
    if place.type == "cuda":
        return bool(getattr(torch.cuda.get_device_properties(place), "is_integrated", False))
    return place.type in ("cpu", "mps")


class Driver(Protocol):
    """Pins memory for one type of device."""

    def register(self, address: int, nbytes: int, device: torch.device) -> int:
        """Pin memory for copies to and from a device. Returns 0, or the driver's error number."""
        ...

    def unregister(self, address: int) -> None:
        """Unpin memory that `register` pinned."""
        ...


class _Cuda:
    """The driver of CUDA, and of ROCm, which torch offers under the same names."""

    def register(self, address: int, nbytes: int, device: torch.device) -> int:
        with torch.cuda.device(device):  # otherwise the first GPU would get a context, too
            error = int(torch.cuda.cudart().cudaHostRegister(address, nbytes, _PORTABLE))  # type: ignore[no-untyped-call]
            if error:
                with suppress(RuntimeError):  # clears the runtime's last error, which the next kernel would raise
                    torch.zeros(1, dtype=torch.uint8, device=device)
        return error

    def unregister(self, address: int) -> None:
        torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]


DRIVERS: Final[dict[str, Driver]] = {"cuda": _Cuda()}
"""By device type. Memory for other types is not pinned: their drivers decide how it is copied."""


class PinnedMemory:
    """Memory of this machine that a device can copy from and to by itself.

    torch's own allocator of pinned memory rounds sizes up to powers of two, which a budget cannot afford. So pages are
    registered with the driver instead. A forked process does not get these pages: sharing them would turn the pages that the
    device knows into copies.

    Args:
        shape: the shape of `tensor`.
        transfers: the copies from and to this memory. They are waited for before it is unpinned.

    Attributes:
        tensor: uint8, page-aligned.
        is_pinned: false where the driver refuses, which is logged, and for devices without an entry in `DRIVERS`.
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
        """Give the memory back. Nothing may be copied from or to it any more."""
        if self.is_pinned:
            self.is_pinned = False
            self._unpin()
        self.tensor = self.tensor.new_empty((0, *self.tensor.shape[1:]))


def _unpin(driver: Driver, address: int, transfers: Transfers, process: int) -> None:
    if os.getpid() != process:
        return  # a forked process has neither this memory nor the device
    transfers.synchronize()
    driver.unregister(address)
