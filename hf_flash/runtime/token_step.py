"""One token through one layer in one call of the compiled part: decoding, as it mostly is.

[`FlashFFN`] does the same step by step for any call. Its Python takes ten times as long within a model as in a loop, because
attention has emptied the caches in between: half a millisecond a layer. So where a token's neurons fit into the window,
window, reads and products are one call (_native_step.h), which follows the rules of runtime/window.py and reading/chunks.py. It refuses every
other case before it changes anything.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch

from hf_flash.compute.kernels import TokenRoom
from hf_flash.compute.library import DTYPES, Step, Window, library, threads
from hf_flash.reading.chunks import longest_chunk
from hf_flash.reading.layer_files import StepFile
from hf_flash.runtime.window import GROWTH, RENEW, ResidentWindow
from hf_flash.store.layout import LayerStore


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
        own, ids = window.arrays, [part.ctypes.data for part in room.ids]
        self._step = Step(
            window=Window(*(part.ctypes.data for part in own), d_ff=store.d_ff, capacity=window.capacity,
                           window=window.window, growth=GROWTH, renew=RENEW),
            place=None if self._place is None else self._place.ctypes.data,
            ids=ids[0], rows=ids[1], there=ids[2], away=ids[3],
            pairs=room.pairs.ctypes.data, parts=room.parts.ctypes.data,
            offsets=room.offsets.ctypes.data, first=room.first.ctypes.data,
            most=room.neurons, reads=room.reads, offset=store.offset, bundle=store.bundle_bytes,
            longest=longest_chunk(store.bundle_bytes),
        )  # fmt: skip
        job = self._step.job
        job.matrix, job.d, job.dtype, job.relu = window.matrix.data_ptr(), store.d_model, DTYPES[window.matrix.dtype], True
        job.hidden, job.wide, job.active = room.hidden.data_ptr(), room.wide.ctypes.data, room.active.ctypes.data

    def run(
        self, x: torch.Tensor, selected: torch.Tensor, bias: torch.Tensor | None, file: StepFile | None
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
        out = torch.empty(1, x.shape[1], dtype=torch.float32, device="cpu")
        job.x, job.out, job.bias = x.data_ptr(), out.data_ptr(), None if bias is None else bias.data_ptr()
        job.threads, step.selected = threads(), selected.data_ptr()
        window.clock, window.free, window.gain = own.clock, own.free, own.gain
        step.reader, step.file, step.unit = file or (None, None, 1)
        done = self._library.hf_step(ctypes.byref(step))  # type: ignore[union-attr]
        own.clock, own.free, own.gain = window.clock, window.free, window.gain
        return out if done else None

    @property
    def did(self) -> Step:
        """What the last call did: neurons `used` and `missing`, `nbytes` in `chunks` read; seconds `managed`, `job.waited`."""
        return self._step
