"""`WindowReads`: reads into the window of one layer, on demand or ahead of time.

A read may fail, and its caller may be interrupted anywhere, by a signal for example. Slots that a failed read was to fill go
back to the window. After an interruption nobody knows which rows are whole, so the window forgets all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from time import perf_counter

import torch

from hf_flash.base.arrays import Ids
from hf_flash.errors import HfFlashError, StoreReadError
from hf_flash.reading.reader import Reading
from hf_flash.runtime.engine import Engine
from hf_flash.runtime.window import ResidentWindow


class WindowReads:
    """The reads of one layer. Copies of the layer share it, as they share the window. Hold the engine's lock to call it."""

    def __init__(self, engine: Engine, layer: int, window: ResidentWindow) -> None:
        self._engine, self._layer, self._window = engine, layer, window
        self._ahead: tuple[Ids, Ids, Reading] | None = None  # neurons that are read ahead, their slots, and the read

    def reserve(self, missing: Ids, used: Ids) -> Ids:
        """Reserve slots for `missing`, without evicting any of `used`."""
        self._window.make_room(len(missing), used)
        return self._window.reserve(len(missing))

    def start(self, ids: Ids, slots: Ids, *, background: bool = False) -> Reading:
        """Start to read bundles into slots of the window."""
        with self._given_back_on_failure(slots):
            return self._engine.reader.start(self._layer, ids, self._window.matrix, slots, background=background)

    def take_in(self, ids: Ids, slots: Ids, reading: Reading) -> float:
        """Wait for a read that [`start`] started, commit and count it; returns the seconds it took."""
        start = perf_counter()
        with self._given_back_on_failure(slots):
            read = reading.wait()
        self._window.commit(ids, slots)
        self._engine.counters.add_read(read)
        return perf_counter() - start

    # --- ahead of time

    @property
    def under_way(self) -> bool:
        """Whether something is being read ahead."""
        return self._ahead is not None

    def read_ahead(self, missing: Ids, used: Ids) -> None:
        """Start to read `missing` into the window, without evicting any of `used`; [`arrive`] takes them in."""
        if not len(missing):
            return
        with self.changing():
            slots = self.reserve(missing, used)
            with suppress(StoreReadError):  # the forward reads it again, and says what is wrong
                self._ahead = missing, slots, self.start(missing, slots, background=True)

    def arrive(self, selected: torch.Tensor | None) -> float:
        """Take in the neurons that were read ahead; returns the seconds spent waiting.

        Args:
            selected: bool [tokens, d_ff], the neurons that are really used; `None`: all.
        """
        if self._ahead is None:
            return 0.0
        start, (ids, slots, reading) = perf_counter(), self._ahead
        self._ahead = None
        try:
            waited = self.take_in(ids, slots, reading)
        except StoreReadError:  # the forward reads what it needs again, and says what is wrong
            return perf_counter() - start
        counters = self._engine.counters
        counters.ahead += len(ids)
        counters.ahead_used += len(ids) if selected is None else int(selected[:, torch.from_numpy(ids)].any(0).sum())
        return waited

    # --- interruptions

    @contextmanager
    def changing(self) -> Iterator[None]:
        """A context for code that changes the window. If it is interrupted, the window forgets everything.

        The clean-up may be interrupted as well; then the next call does it.
        """
        window = self._window
        if not window.consistent:
            self._forget()
        window.consistent = False
        try:
            yield
        except HfFlashError:  # only whole rows were committed
            window.consistent = True
            raise
        except BaseException:
            self._forget()
            raise
        window.consistent = True

    def _forget(self) -> None:
        self._engine.reader.forget()
        self._ahead = None
        self._window.forget()
        self._window.consistent = True

    @contextmanager
    def _given_back_on_failure(self, slots: Ids) -> Iterator[None]:
        try:
            yield
        except StoreReadError:
            self._window.give_back(slots)
            raise
