"""One token through one layer in one call of the compiled part: decoding, as it mostly is.

[`FlashFFN`] does the same step by step for any call. Its Python takes ten times as long within a model as in a loop, because
attention has emptied the caches in between: half a millisecond a layer. So where a token's neurons fit into the window and
what is missing is read with io_uring, window, reads and products are one call (_native_step.h), which follows the rules of
window.py and sources.py. Whatever is otherwise it refuses, before it changes anything.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch

from .native import DTYPES, Job, TokenRoom, library, threads
from .sources import RingFile, longest_chunk
from .store import LayerStore
from .window import GROWTH, RENEW, ResidentWindow

_pointer, _long, _int, _double = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_double


class _Window(ctypes.Structure):
    _fields_ = (
        *((name, _pointer) for name in ("slot_of", "pointer", "last_used", "unused", "worth")),
        *((name, _long) for name in ("d_ff", "capacity", "window", "clock", "free")),
        *((name, _double) for name in ("gain", "growth", "renew")),
    )


class _Ring(ctypes.Structure):
    _fields_ = (
        *((name, _pointer) for name in ("entries", "completions", "tail", "head", "end")),
        *((name, ctypes.c_uint32) for name in ("room", "completion_room")), ("fd", _int),
    )  # fmt: skip


class _Step(ctypes.Structure):
    """The fields are explained in _native_step.h."""

    _fields_ = (
        ("job", Job), ("window", _Window), ("ring", _Ring),
        *((name, _pointer) for name in ("selected", "place", "ids", "rows", "there", "away", "pairs", "parts")),
        *((name, _long) for name in ("most", "reads", "offset", "bundle", "longest", "unit")),
        *((name, _int) for name in ("file", "failed")),
        *((name, _long) for name in ("used", "missing", "nbytes", "chunks")), ("managed", _double),
    )  # fmt: skip


class TokenStep:
    """The step of one layer. To be made only where there is a `library()`.

    Args:
        room: shared with other layers, which run at other times.
        window: the layer's. Its arrays are changed where they lie.
        store: where the layer's bundles are.
    """

    def __init__(self, room: TokenRoom, window: ResidentWindow, store: LayerStore) -> None:
        self._library, self._room, self._window = library(), room, window
        self._place = None if store.place is None else np.ascontiguousarray(store.place)
        self._known: tuple[int, ...] = ()  # of a ring, which is its owner's to keep
        own, ids = window.arrays, [part.ctypes.data for part in room.ids]
        self._step = _Step(
            window=_Window(*(part.ctypes.data for part in own), d_ff=store.d_ff, capacity=window.capacity,
                           window=window.window, growth=GROWTH, renew=RENEW),
            place=None if self._place is None else self._place.ctypes.data,
            ids=ids[0], rows=ids[1], there=ids[2], away=ids[3],
            pairs=room.pairs.ctypes.data, parts=room.parts.ctypes.data,
            most=room.neurons, reads=room.reads, offset=store.offset, bundle=store.bundle_bytes,
            longest=longest_chunk(store.bundle_bytes),
        )  # fmt: skip
        job = self._step.job
        job.matrix, job.d, job.dtype, job.relu = window.matrix.data_ptr(), store.d_model, DTYPES[window.matrix.dtype], True
        job.hidden, job.wide, job.active = room.hidden.data_ptr(), room.wide.ctypes.data, room.active.ctypes.data

    def run(
        self, x: torch.Tensor, selected: torch.Tensor, bias: torch.Tensor | None, file: RingFile | None
    ) -> torch.Tensor | None:
        """float32 [1, d_model]: the sum before bias and rounding. `None`: not for here, or a read failed.

        After a failed read the window holds what it held and some less; who reads again is told what is wrong.

        Args:
            x: [1, d_model] in the dtype of compute, contiguous.
            selected: bool [1, d_ff], contiguous: the neurons that are used. Their hidden values below zero become zero.
            bias: [d_ff] of the up projection.
            file: what is missing is read with it. `None`: nothing can be read.
        """
        step, job, window, own = self._step, self._step.job, self._step.window, self._window
        out = torch.empty(1, x.shape[1])
        job.x, job.out, job.bias = x.data_ptr(), out.data_ptr(), None if bias is None else bias.data_ptr()
        job.threads, step.selected = threads(), selected.data_ptr()
        window.clock, window.free, window.gain = own.clock, own.free, own.gain
        self._use(file)
        done = self._library.hf_step(ctypes.byref(step))  # type: ignore[union-attr]
        own.clock, own.free, own.gain = window.clock, window.free, window.gain
        return out if done else None

    @property
    def did(self) -> _Step:
        """What the last call did: neurons `used` and `missing`, `nbytes` in `chunks` read; seconds `managed`, `job.waited`."""
        return self._step

    def _use(self, file: RingFile | None) -> None:
        step = self._step
        if file is None:
            step.ring.fd = -1
            return
        if file.ring.memory != self._known:
            self._known = file.ring.memory
            step.ring = _Ring(*file.ring.memory, *file.ring.room)
        step.ring.fd, step.file, step.unit = file.ring.fd, file.fd, file.unit
