"""What the layers of one model share, and how it survives a fork of the process.

Engine         shared by feed-forward layers of neurons
ExpertEngine   shared by layers of experts
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol, Self, cast

import torch

from hf_flash.base.heap import Heap
from hf_flash.compute import library as native
from hf_flash.compute.arithmetic import Arithmetic
from hf_flash.errors import UsageError
from hf_flash.reading.experts import ExpertReader
from hf_flash.reading.reader import BundleReader
from hf_flash.runtime.counters import Counters
from hf_flash.runtime.prompts import Sequences


class Reader(Protocol):
    """What every engine needs of its reader."""

    buffer_bytes: int

    @property
    def where(self) -> Path:
        """The folder that is read."""
        ...

    def settle(self) -> None: ...

    def close(self) -> None: ...


class SharedByLayers:
    """The counters, the lengths of sequences, and the lock around everything.

    Args:
        files: reads from flash.
        dtype: the compute dtype.
        wide: float32 scratch, contiguous, with room for at least one row: rows of matrices are widened into it.

    Attributes:
        device: where the model was loaded.
        on_device: what layers of experts share on a device; `None` if they compute on the CPU.
        runtime: returns the model's runtime, of which it holds a weak reference.
    """

    def __init__(self, files: Reader, dtype: torch.dtype, wide: torch.Tensor) -> None:
        self._files, self.dtype, self.wide = files, dtype, wide
        self.device, self.on_device = torch.device("cpu"), cast(Any, None)
        self.counters, self.heap, self.sequences = Counters(), Heap(), Sequences()
        self.lock = threading.RLock()
        self.closed = False
        self.runtime: Callable[[], Any] = lambda: None  # weak reference to the runtime, for `hf_flash.stats(model)`
        _engines[id(self)] = self

    def check_open(self) -> None:
        """Refuse to run on a closed store. Call with the lock held."""
        if self.closed:
            raise UsageError("the model's files are closed", where=self._files.where, hint="load the model again")

    def __deepcopy__(self, memo: Any) -> Self:
        return self

    def __copy__(self) -> Self:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UsageError("a loaded flash model cannot be pickled", hint="load it again in the other process")

    def close(self) -> None:
        """Close the files. Nothing can be computed afterwards."""
        with self.lock:
            if not self.closed:
                self.closed = True
                self._files.close()

    def settle(self) -> None:
        """Wait until all reads and copies are done."""
        if not self.closed:
            self._files.settle()
            if self.on_device is not None:
                self.on_device.transfers.synchronize()


class Engine(SharedByLayers):
    """What feed-forward layers of neurons share.

    Args:
        reader: reads bundles.
        arithmetic: computes, and has the buffers that all layers use.
        fills_next: whether a call that uses most of a layer begins to fill the next layer's window.
    """

    def __init__(self, reader: BundleReader, arithmetic: Arithmetic, *, fills_next: bool = True) -> None:
        super().__init__(reader, arithmetic.unit.dtype, arithmetic.wide)
        self.reader, self.arithmetic, self.fills_next = reader, arithmetic, fills_next
        self.turn: Callable[[], AbstractContextManager[None]] = nullcontext  # entered around a call; for devices, see Transfers
        self.early: Any = None  # a block that is read before its layer's call begins (stream.py)

    @property
    def scratch_bytes(self) -> int:
        """DRAM of the buffers that all layers share."""
        return self.arithmetic.nbytes + self.reader.buffer_bytes


class ExpertEngine(SharedByLayers):
    """What layers of experts share."""

    def __init__(self, reader: ExpertReader, dtype: torch.dtype, wide: torch.Tensor) -> None:
        super().__init__(reader, dtype, wide)
        self.reader = reader


# --- a fork of the process ----------------------------------------------------------------------------------------------

_engines: weakref.WeakValueDictionary[int, SharedByLayers] = weakref.WeakValueDictionary()
_forking = threading.local()


def _before_fork() -> None:
    """Wait for other threads' calls and for reads: a child would wait for them for ever, and not know which rows are whole."""
    found = (reference() for reference in _engines.valuerefs())
    _forking.held = []
    for engine in sorted((engine for engine in found if engine is not None), key=id):  # all threads lock in the same order
        engine.lock.acquire()
        _forking.held.append(engine)
        engine.settle()
    _forking.alone = native.release_threads()


def _after_fork() -> None:
    while _forking.held:
        _forking.held.pop().lock.release()


def _after_fork_in_child() -> None:
    _after_fork()
    if not _forking.alone and torch.get_num_threads() > 1:
        torch.set_num_threads(1)  # with more, the child would wait for threads that it does not have


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)
