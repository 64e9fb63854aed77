"""A few tokens through one layer in one call of the compiled part: decoding, small batches, drafts.

[`FlashFFN`] does the same step by step for any call. Its Python takes ten times as long within a model as in a loop, because
attention has emptied the caches in between: half a millisecond a layer. So where the neurons of a few tokens fit into the
window, a single call (compute/step.c) updates the window, reads and multiplies, by the rules of runtime/window.py and
reading/chunks.py. It refuses every other case before it changes anything.
"""

from __future__ import annotations

import ctypes
from typing import Final

import numpy as np
import torch

from hf_flash.compute import library as native
from hf_flash.compute.activation import Activation
from hf_flash.compute.arithmetic import Arithmetic
from hf_flash.compute.kernels import Biases, TokenRoom, activation_function, address_of, row_layout
from hf_flash.compute.library import DTYPES, Step, TokenJob, TokensJob, Window
from hf_flash.reading.chunks import longest_chunk
from hf_flash.reading.layer_files import StepFile
from hf_flash.runtime.counters import Counters
from hf_flash.runtime.window import GROWTH, RESCALE_BEYOND, ResidentWindow
from hf_flash.store.layer_file import LayerStore
from hf_flash.store.unit import UnitLayout

MOST_TOKENS: Final = TokenRoom.tokens
MOST_NEURONS: Final = 1 << 16  # `row_of` of native.h counts a call's neurons in 16 bits
_GROWTH: Final = tuple(GROWTH**tokens for tokens in range(MOST_TOKENS + 1))  # worked out as the window does


def token_step(arithmetic: Arithmetic, window: ResidentWindow, store: LayerStore) -> TokenStep | None:
    """The [`TokenStep`] of a layer; `None` if the arithmetic cannot do one in the compiled part."""
    if arithmetic.step_kernel is None:
        return None
    return TokenStep(arithmetic.step_kernel.room, arithmetic.unit, arithmetic.activation, window, store)


class TokenStep:
    """Takes a few tokens through one layer. It needs a `library()`, and a unit layout that kernels.py `supports`.

    Args:
        room: scratch memory, shared with other layers, which run at other times.
        unit: the layout of units in the window.
        activation: one that the compiled part knows.
        window: the layer's window. The compiled part changes its arrays in place.
        store: the layer's units on flash.
    """

    def __init__(
        self, room: TokenRoom, unit: UnitLayout, activation: Activation, window: ResidentWindow, store: LayerStore
    ) -> None:
        self._library, self._room, self._window = native.loaded(), room, window
        self._place_of = None if store.place is None else np.ascontiguousarray(store.place)
        layout, function, dtype, several = row_layout(unit), activation_function(activation), DTYPES[unit.dtype], room.several
        one_token = TokenJob(
            layout=layout, matrix=window.matrix.data_ptr(), dtype=dtype, activation=function,
            hidden=room.hidden.data_ptr(), x_f32=room.x_f32.ctypes.data, active=room.active.ctypes.data,
        )  # fmt: skip
        tokens = TokensJob(
            layout=layout, hidden=room.hidden_of_several.data_ptr(), d_ff=store.d_ff, dtype=dtype, activation=function,
            values=several.values, row_of=several.row_of, count=several.count,
        )  # fmt: skip
        self._step = Step(
            job=one_token, several=tokens, window=self._window_arrays(store.d_ff),
            place_of=None if self._place_of is None else self._place_of.ctypes.data,
            used_by_any=room.used_by_any.ctypes.data, places=room.places.ctypes.data,
            ids=room.ids.ctypes.data, rows=room.rows.ctypes.data,
            resident_at=room.resident_at.ctypes.data, missing_at=room.missing_at.ctypes.data,
            incoming=room.incoming.ctypes.data, pieces=room.pieces.ctypes.data,
            offsets=room.offsets.ctypes.data, first=room.first.ctypes.data,
            max_used=min(room.neurons, MOST_NEURONS), max_missing=room.reads, file_offset=store.offset,
            max_run=longest_chunk(store.bundle_bytes),
        )  # fmt: skip

    def _window_arrays(self, d_ff: int) -> Window:
        slot_of, neuron_in, last_used, free_slots, score = (part.ctypes.data for part in self._window.arrays)
        return Window(
            slot_of, neuron_in, last_used, free_slots, score,
            d_ff=d_ff, capacity=self._window.capacity, kept_tokens=self._window.window,
            rescale_beyond=RESCALE_BEYOND,
        )  # fmt: skip

    def run(self, x: torch.Tensor, selected: torch.Tensor, biases: Biases, file: StepFile | None) -> torch.Tensor | None:
        """Compute a call: the sum before bias and rounding, float32 [tokens, width].

        `None`: the call is not one for this step, or a read failed. After a failed read the window holds less than before, and
        reading again step by step reports what is wrong.

        Args:
            x: [tokens, width] in the compute dtype, contiguous; at most `MOST_TOKENS` tokens.
            selected: bool [tokens, d_ff], contiguous: the neurons that each token uses.
            biases: the layer's biases.
            file: missing neurons are read with it. `None`: it cannot read them, for example where numbers are converted.
        """
        step, window, resident, tokens = self._step, self._step.window, self._window, len(x)
        job = step.job if tokens == 1 else step.several
        out = torch.empty(tokens, x.shape[1], dtype=torch.float32, device="cpu")
        job.x, job.out = x.data_ptr(), out.data_ptr()
        job.gate_bias, job.bias = address_of(biases.get("gate")), address_of(biases["up"])
        job.threads, step.selected, step.tokens = native.threads(), selected.data_ptr(), tokens
        window.clock, window.free, window.use_score = resident.clock, resident.free, resident.use_score
        window.growth = _GROWTH[tokens]
        step.reader, step.file, step.block_bytes = file or (None, None, 1)
        done = self._library.hf_step(ctypes.byref(step))  # type: ignore[union-attr]
        resident.clock, resident.free, resident.use_score = window.clock, window.free, window.use_score
        return out if done else None

    @property
    def used(self) -> int:
        """Neurons that the last call used."""
        return int(self._step.used)

    @property
    def missing(self) -> int:
        """How many of them were not in the window."""
        return int(self._step.missing)

    def count(self, counters: Counters, seconds: float) -> None:
        """Add the last call's reads and times to the counters.

        Args:
            seconds: how long the call took.
        """
        step, waited_s = self._step, self._step.waited_s
        counters.read_bytes += step.read_bytes
        counters.reads += step.chunks
        counters.manage_s += step.managed_s
        counters.io_s += waited_s
        counters.compute_s += seconds - step.managed_s - waited_s
