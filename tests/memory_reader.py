"""A reader whose bundles lie in memory: for tests of what runs on top of reading, and of what reading may do to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from hf_flash.base.arrays import Ids
from hf_flash.reading.reader import ReadCount
from hf_flash.store.layer_file import LayerStore
from hf_flash.store.unit import UnitLayout


@dataclass
class MemoryReader:
    """Stands for a `BundleReader`: `bundles` [layer][d_ff, unit.numbers], in the dtype of compute.

    Attributes:
        on_start, on_wait: called at each read with the ids that are asked for; what they raise happens to the caller.
        started: ids of every read that was started, with its layer.
        forgotten: how often the reader was told to forget what is under way.
    """

    bundles: list[torch.Tensor]
    unit: UnitLayout
    on_start: Callable[[Ids], None] = lambda ids: None
    on_wait: Callable[[Ids], None] = lambda ids: None
    started: list[tuple[int, list[int]]] = field(default_factory=list)
    forgotten: int = 0
    name: str = "memory"
    reads_with: str = "memory"
    converts: bool = False
    buffer_bytes: int = 0

    def __post_init__(self) -> None:
        names = tuple(self.unit.roles)
        self.layers = tuple(
            LayerStore(index, Path("memory") / str(index), 0, f"{index}.bundles", len(rows), self.unit, names, "")
            for index, rows in enumerate(self.bundles)
        )

    def start(self, layer: int, ids: Ids, out: torch.Tensor, rows: Ids, *, background: bool = False) -> MemoryRead:
        self.on_start(ids)
        self.started.append((layer, ids.tolist()))
        return MemoryRead(self, layer, ids, out, rows)

    def through_gaps(self, layer: int, ids: Ids, first: int, last: int, buffer: torch.Tensor) -> Ids:
        return ids

    def step_file(self, layer: int) -> None:
        return None

    def settle(self) -> None: ...

    def forget(self) -> None:
        self.forgotten += 1

    def close(self) -> None: ...


@dataclass
class MemoryRead:
    """A read under way: the rows are filled when it is waited for."""

    reader: MemoryReader
    layer: int
    ids: Ids
    out: torch.Tensor
    rows: Ids

    def wait(self) -> ReadCount:
        self.reader.on_wait(self.ids)
        self.out[torch.from_numpy(self.rows)] = self.reader.bundles[self.layer][torch.from_numpy(self.ids)]
        return ReadCount(len(self.ids) * self.reader.unit.row_bytes, len(self.ids))
