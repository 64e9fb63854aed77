"""`Processes`: the processes that share one calibration.

accelerate starts them and sets their number in the environment; without it there is one. A barrier keeps them in step. The
first process changes shared files; the others only write their own parts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hf_flash.base.folders import locked


@dataclass(frozen=True)
class Processes:
    """All processes of a calibration, as this one sees them.

    Attributes:
        index: the number of this process.
        count: processes in all.
        on_this_machine: processes that share this machine's memory.
        wait: returns when all processes have called it.
    """

    index: int
    count: int
    on_this_machine: int
    wait: Callable[[], None]

    @classmethod
    def of_environment(cls) -> Processes:
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls(0, 1, 1, lambda: None)
        from accelerate import PartialState

        state = PartialState(cpu=True)
        on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return cls(state.process_index, state.num_processes, on_this_machine, state.wait_for_everyone)

    @property
    def first(self) -> bool:
        """Whether this is the process that changes shared files."""
        return self.index == 0

    @contextmanager
    def alone(self, folder: Path) -> Iterator[None]:
        """Keep other calibrations out of the folder. The first process holds the lock for all."""
        if not self.first:
            yield
            return
        with locked(folder):
            yield
