"""`load`: the stand-in device, as `torch.standin`; device.cpp says how it works.

    standin.set_lazy(True)              copies with non_blocking to and from pinned memory are late: see device.cpp
    standin.late_copies()               of which so many are still to be done
    standin.set_checked(True)           what does not wait for another stream, but has to, is an error: see device.cpp
    standin.set_memory_limit(1 << 20)   of each of the two devices; beyond it is a `torch.OutOfMemoryError`
    standin.register_pinned(...)        memory that others allocated counts as pinned

Settings return what was set before. The rest has the names that torch.cuda has.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import torch
from torch.utils.backend_registration import rename_privateuse1_backend

NAME: Final = "standin"
SOURCE: Final = Path(__file__).with_name("device.cpp")

_library: ctypes.CDLL | None = None
_registered: dict[int, int] = {}  # lengths by address


def load(folder: Path) -> ModuleType:
    """Give torch the device, once for this process, and return its module.

    Args:
        folder: where it is built, if it has not been for this torch.
    """
    global _library
    module = sys.modules[__name__]
    if _library is None:
        _library = ctypes.CDLL(str(build(folder)))
        _library.standin_set_lazy.argtypes, _library.standin_set_lazy.restype = [ctypes.c_bool], ctypes.c_bool
        _library.standin_set_checked.argtypes, _library.standin_set_checked.restype = [ctypes.c_bool], ctypes.c_bool
        _library.standin_set_memory_limit.argtypes = [ctypes.c_size_t]
        _library.standin_register_pinned.argtypes = _library.standin_late_copies.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
        _library.standin_register_pinned.restype = ctypes.c_bool
        _library.standin_unregister_pinned.argtypes = [ctypes.c_size_t]
        _library.standin_set_memory_limit.restype = _library.standin_late_copies.restype = ctypes.c_size_t
        _library.standin_start()
        rename_privateuse1_backend(NAME)
        torch._register_device_module(NAME, module)  # type: ignore[no-untyped-call]
    return module


def build(folder: Path) -> Path:
    """Build the library unless it is there, and return its path. Several processes may do so at the same time."""
    key = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    library = folder / f"{NAME}-{key}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}")
        of_torch = Path(torch.__file__).parent
        subprocess.run(
            [
                *("g++", "-std=c++20", "-O1", "-fPIC", "-shared", "-w", str(SOURCE), "-o", str(unfinished)),
                *(f"-I{of_torch}/include", f"-I{of_torch}/include/torch/csrc/api/include", f"-L{of_torch}/lib"),
                *("-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{of_torch}/lib"),
                f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
            ],
            check=True,
        )
        os.replace(unfinished, library)
    return library


def _native() -> ctypes.CDLL:
    assert _library is not None, "the device is not loaded"
    return _library


# --- settings


def set_lazy(lazy: bool) -> bool:
    """Let copies be late from now on, or not; returns what was set before. Those that wait already keep waiting."""
    return bool(_native().standin_set_lazy(lazy))


def set_checked(checked: bool) -> bool:
    """Let races be errors from now on, or not; returns what was set before. What was done before is part of none."""
    return bool(_native().standin_set_checked(checked))


def late_copies() -> int:
    """Return how many copies are still to be done."""
    return int(_native().standin_late_copies(0, ctypes.c_size_t(-1).value))


def set_memory_limit(nbytes: int) -> int:
    """Set how many bytes may be allocated on each device; returns what was set before."""
    return int(_native().standin_set_memory_limit(nbytes))


def register_pinned(address: int, nbytes: int) -> None:
    """Let memory of the host count as pinned. No part of it may do so already."""
    if nbytes <= 0 or not _native().standin_register_pinned(address, nbytes):
        raise RuntimeError("standin: nothing to pin, or a part of it is pinned already")
    _registered[address] = nbytes


def unregister_pinned(address: int) -> None:
    """Take back [`register_pinned`]. No late copy may use the memory: it could be given back before that is done."""
    if address not in _registered:
        raise RuntimeError("standin: this memory has not been registered")
    if _native().standin_late_copies(address, _registered[address]):
        raise RuntimeError("standin: a late copy still uses this memory")
    _native().standin_unregister_pinned(address)
    del _registered[address]


# --- what torch and others call


class Stream(torch.Stream):
    """A new stream of a device: without an index, of the current one."""

    def __new__(cls, device: Any = None, priority: int = 0) -> Stream:
        return super().__new__(cls, device=NAME if device is None else device, priority=priority)


class Event(torch.Event):
    """An event, for streams of any of the devices. None of them measures time."""

    def __new__(cls, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> Event:
        return super().__new__(cls, device=NAME)


@contextmanager
def stream(stream: torch.Stream | None) -> Iterator[None]:
    """Use a stream, and its device, in a block. With None, nothing changes."""
    if stream is None:
        yield
        return
    device, before = current_device(), current_stream(stream.device)
    set_stream(stream)
    try:
        yield
    finally:
        set_stream(before)
        set_device(device)


current_device = torch.accelerator.current_device_index
set_device = torch.accelerator.set_device_index
current_stream = torch.accelerator.current_stream
set_stream = torch.accelerator.set_stream
synchronize = torch.accelerator.synchronize
mem_get_info = torch.accelerator.get_memory_info
memory_stats = torch.accelerator.memory_stats
memory_allocated = torch.accelerator.memory_allocated
max_memory_allocated = torch.accelerator.max_memory_allocated
memory_reserved = torch.accelerator.memory_reserved
reset_peak_memory_stats = torch.accelerator.reset_peak_memory_stats
empty_cache = torch.accelerator.empty_cache


def is_available() -> bool:
    """Return True."""
    return True


def device_count() -> int:
    """Return 2, as device.cpp has them."""
    return 2


def manual_seed_all(seed: int) -> None:
    """Do nothing: random numbers come from the CPU's generator, which torch.manual_seed seeds."""


def _is_in_bad_fork() -> bool:
    return False


def get_amp_supported_dtype() -> list[torch.dtype]:
    """Return what torch.autocast may convert to: it can only be disabled here."""
    return [torch.float16, torch.bfloat16]
