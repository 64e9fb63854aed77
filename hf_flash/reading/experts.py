"""`ExpertReader`: reads experts into slots, directly from the files of a plain checkpoint.

An expert may lie anywhere in a file. A direct read needs whole pages, so the smallest range of pages around a piece is read,
and the slot has room for that: a piece has the same distance from a page boundary in the slot as in the file. Pieces that are
neighbours in the file are one range. Nothing is copied and nothing is repacked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from hf_flash.base.arrays import Bytes, Ids
from hf_flash.compute.coded import are_numbers
from hf_flash.errors import StoreFormatError, StoreReadError
from hf_flash.reading.compiled_queue import BOUNCE_BYTES
from hf_flash.reading.layer_files import PAGE, OpenFiles
from hf_flash.reading.open_file import FileChangedError
from hf_flash.reading.reader import READERS, ReadCount, chosen_alignment
from hf_flash.store.checkpoint import Checkpoint
from hf_flash.store.experts import ExpertLayer

_READ_BYTES: Final = 1 << 20  # the most in one read: a queue of these keeps the disk busy, one large read does not


class _Range(NamedTuple):
    """Bytes of a file that are read for an expert, and their offset `at` in the slot."""

    file: int
    offset: int
    at: int
    nbytes: int


class ReadPlan(NamedTuple):
    """The reads of every expert of a layer, for the compiled part.

    Attributes:
        orders: int64 [orders, 3] reads of one file: the file's number, the first read, how many.
        first_order: int64 [experts + 1] the orders of expert `e` are `first_order[e]` to before `first_order[e + 1]`.
        reads: int64 [reads, 3] offset in the file, offset in the slot, bytes.
    """

    orders: Ids
    first_order: Ids
    reads: Ids


class _Place(NamedTuple):
    """Where an expert lies in files and in a slot."""

    ranges: tuple[_Range, ...]
    at: tuple[int, ...]  # the offset in the slot where each range of the expert begins
    nbytes: int  # bytes of a slot


def _place(starts: Sequence[tuple[int, int, int]]) -> _Place:
    """The place of an expert, from its ranges: (file, offset, length)."""
    ranges: list[_Range] = []
    places, room = [0] * len(starts), 0
    for number in sorted(range(len(starts)), key=lambda number: starts[number][:2]):
        file, start, nbytes = starts[number]
        first, last = start // PAGE * PAGE, -(-(start + nbytes) // PAGE) * PAGE
        if ranges and ranges[-1].file == file and first <= ranges[-1].offset + ranges[-1].nbytes:
            before = ranges.pop()
            first = before.offset
            room -= before.nbytes
        at = room
        ranges.append(_Range(file, first, at, last - first))
        places[number] = at + start - first
        room += last - first
    return _Place(tuple(ranges), tuple(places), room)


class ExpertPlaces:
    """Where all experts of a model lie.

    Attributes:
        layers: the model's layers of experts.
        paths: the files that hold the experts.
        slot_bytes: for each layer, the bytes of a slot.
    """

    def __init__(self, layers: Sequence[ExpertLayer], checkpoint: Checkpoint) -> None:
        self.layers, numbers = layers, dict[Path, int]()
        self._places = [[self._of(layer, expert, checkpoint, numbers) for expert in range(layer.experts)] for layer in layers]
        self.paths = list(numbers)
        self.slot_bytes = tuple(max(place.nbytes for place in places) for places in self._places)

    @staticmethod
    def _of(layer: ExpertLayer, expert: int, checkpoint: Checkpoint, numbers: dict[Path, int]) -> _Place:
        starts = []
        for tensor, byte, nbytes in zip(layer.tensors[expert], layer.begin[expert].tolist(), layer.ranges, strict=True):
            path, offset = checkpoint.place(tensor)
            starts.append((numbers.setdefault(path, len(numbers)), offset + byte, nbytes))
        return _place(starts)

    @property
    def nbytes(self) -> int:
        """Bytes of all experts."""
        return sum(layer.experts * layer.expert_bytes for layer in self.layers)

    def __getitem__(self, at: tuple[int, int]) -> _Place:
        """The place of an expert, by (layer, expert)."""
        return self._places[at[0]][at[1]]

    def at(self, layer: int) -> npt.NDArray[np.int64]:
        """[experts, ranges] the offset in a slot where each range of each expert begins."""
        return np.array([place.at for place in self._places[layer]], np.int64)

    def describe(self, layer: int, expert: int) -> str:
        """The name of an expert and the files that hold it, for errors."""
        files = ", ".join(dict.fromkeys(str(self.paths[part.file]) for part in self[layer, expert].ranges))
        return f"{self.layers[layer].name}, expert {expert}, in {files}"


def reader_bytes(name: str, threads: int) -> int:
    """The most DRAM that a reader's own buffers take."""
    return (threads + 1) * BOUNCE_BYTES if READERS[name].may_be_direct else 0


class ExpertReader(OpenFiles):
    """Reads experts into slots.

    Args:
        places: where the experts lie.
        name: the name of a reader, as in `FlashOffloadConfig`.
        threads: how many threads read directly where io_uring cannot be used.
        spare_bytes: bytes of memory that nothing else claims, for the page cache.
    """

    def __init__(self, places: ExpertPlaces, name: str, threads: int, spare_bytes: int) -> None:
        align = chosen_alignment(places.paths[0], places.nbytes, name, spare_bytes)
        super().__init__(places.paths, align, threads, only_contents=True)
        self.places, self.layers = places, places.layers
        self._file_table = np.array([file.address for file in self.files], np.int64)
        self.buffer_bytes = self._queue.buffer_bytes if align else 0

    @property
    def where(self) -> Path:
        return self.places.paths[0].parent

    @property
    def file_table(self) -> int:
        """The address of a table of the files' addresses, for the compiled part."""
        return int(self._file_table.ctypes.data)

    @property
    def queue(self) -> int | None:
        """The reader of the compiled part, which can wait for tickets by itself; `None` without the compiled part."""
        return self._queue.reader

    def start(self, layer: int, expert: int, slots: Bytes, slot: int) -> ExpertReading:
        """Begin to read an expert into a slot.

        Args:
            slots: [slots, bytes], contiguous. It must stay alive as long as this reader.
        """
        place, memory = self.places[layer, expert], slots.reshape(-1)
        base = slot * slots.shape[1]
        if not 0 <= slot < len(slots) or place.nbytes > slots.shape[1]:  # the kernel would write beyond the slots
            raise IndexError(f"slot {slot} of {slots.shape}, for {place.nbytes} bytes")
        reading = ExpertReading(self, layer, expert)
        with reading.errors():
            for file, reads in self._orders(place):
                reading.tickets.append(self._queue.start_into(self.files[file], reads + np.array([0, base, 0]), memory))
                reading.count.nbytes += int(reads[:, 2].sum())
                reading.count.chunks += 1
        return reading

    def _orders(self, place: _Place) -> Iterator[tuple[int, Ids]]:
        """The reads of an expert, each array of one file: [reads, 3] offset in the file, offset in the slot, length."""
        for part in place.ranges:
            file = self.files[part.file]
            nbytes = min(part.nbytes, file.state.size - part.offset)  # the last page of a file may be cut off
            whole = nbytes // PAGE * PAGE if file.align else nbytes
            if whole:
                yield part.file, _split(part.offset, part.at, whole)
            if nbytes > whole:  # the cut-off page needs a read of its own
                yield part.file, np.array([[part.offset + whole, part.at + whole, nbytes - whole]])

    def read_plan(self, layer: int) -> ReadPlan:
        """The reads of every expert of a layer."""
        orders, first_order, reads = list[tuple[int, int, int]](), [0], list[Ids]()
        count = 0
        for expert in range(self.layers[layer].experts):
            for file, some in self._orders(self.places[layer, expert]):
                orders.append((file, count, len(some)))
                reads.append(some)
                count += len(some)
            first_order.append(len(orders))
        return ReadPlan(np.array(orders, np.int64), np.array(first_order, np.int64), np.concatenate(reads).astype(np.int64))

    def wait(self, ticket: Any) -> None:
        self._queue.wait(ticket)

    def check(self, error: int) -> None:
        """Raise `OSError` if `error`, the result of reads that the compiled part has waited for, is not 0."""
        if error:
            self._queue.check(error)


def _split(offset: int, at: int, nbytes: int) -> Ids:
    """Split a range into reads of at most `_READ_BYTES`: [reads, 3] offset in the file, offset in memory, length."""
    begin = np.arange(0, nbytes, _READ_BYTES)
    return np.stack([offset + begin, at + begin, np.minimum(_READ_BYTES, nbytes - begin)], axis=1)


class ExpertReading:
    """An expert that is being read.

    Attributes:
        tickets: the queue's tickets that have not been waited for.
        count: bytes and orders of the read.
        waited_s: seconds that were waited for it.
    """

    def __init__(self, reader: ExpertReader, layer: int, expert: int) -> None:
        self.reader, self.layer, self.expert = reader, layer, expert
        self.tickets: list[Any] = []
        self.count, self.waited_s = ReadCount(), 0.0

    def wait(self) -> None:
        """Wait until the slot is filled.

        Raises:
            StoreReadError: the disk failed, or the file has changed.
        """
        start = perf_counter()
        with self.errors():
            while self.tickets:
                self.reader.wait(self.tickets.pop())
        self.waited_s += perf_counter() - start

    def hand_over(self) -> tuple[int | None, int]:
        """Wait for all tickets but one. Returns the compiled part's reader and that ticket; 0 if there is none."""
        while len(self.tickets) > 1:
            with self.errors():
                self.reader.wait(self.tickets.pop())
        return self.reader.queue, self.tickets.pop()[0] if self.tickets else 0

    def waited(self, error: int, seconds: float) -> None:
        """Note the result of waiting for the ticket that was handed over. Raises as [`wait`] does."""
        self.waited_s += seconds
        with self.errors():
            self.reader.check(error)

    def check_scales(self, slot: Bytes) -> None:
        """Raise if not all scales of the expert in this slot are finite numbers."""
        layer, at = self.reader.layers[self.layer], self.reader.places[self.layer, self.expert].at
        for piece, place in zip(layer.pieces, layer.scale_places, strict=True):
            if piece.scales and not are_numbers(piece, slot[at[place] : at[place] + piece.scale_bytes]):
                raise self.damaged()

    def damaged(self) -> StoreFormatError:
        """The error for an expert with scales that are not finite numbers."""
        return StoreFormatError(
            "an expert has scales that are no numbers",
            where=self.reader.places.describe(self.layer, self.expert),
            expected="finite scales",
            hint="the checkpoint is damaged: download it again",
        )

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turn `OSError` into `StoreReadError`."""
        try:
            yield
        except OSError as error:
            changed = isinstance(error, FileChangedError)
            raise StoreReadError(
                "reading an expert failed",
                where=self.reader.places.describe(self.layer, self.expert),
                expected=f"{self.reader.layers[self.layer].expert_bytes} bytes of a file that nobody changes",
                got=error.strerror or str(error),
                hint="load the model again" if changed else "check the disk, and that the file is whole",
            ) from error
