"""The processes of a calibration."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hf_flash.base.folders import locked


@dataclass
class _Crew:
    """The processes at work: this one's number, how many there are in all and on this machine, and a barrier."""

    index: int
    count: int
    here: int
    wait: Callable[[], None]

    @classmethod
    def of_environment(cls) -> _Crew:
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls(0, 1, 1, lambda: None)
        from accelerate import PartialState

        state = PartialState(cpu=True)
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return cls(state.process_index, state.num_processes, here, state.wait_for_everyone)

    @contextmanager
    def alone(self, folder: Path) -> Iterator[None]:
        """Keep other calibrations out of the folder; the first process holds the lock for all."""
        if self.index:
            yield
            return
        with locked(folder):
            yield
