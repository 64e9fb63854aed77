"""The forward pass of a calibration: hidden states from disk, through a group of decoder layers, and back to disk.

On the way the FFN's inputs, and one bit per neuron that says whether it is active, are recorded. A group has as many layers as
there are processes; each process runs its share of the windows through all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch

from hf_flash.calibration.activity import pack_bits
from hf_flash.calibration.processes import Processes
from hf_flash.calibration.row_files import RowFile
from hf_flash.calibration.settings import Settings
from hf_flash.calibration.work_folder import WorkFolder
from hf_flash.compute.activation import Activation
from hf_flash.compute.arithmetic import Values
from hf_flash.errors import CalibrationError
from hf_flash.families import family_of
from hf_flash.families.decoder import decoder_layers
from hf_flash.runtime.model import find_runtime
from hf_flash.runtime.observing import observed
from hf_flash.runtime.transformers_model import first_layer_call, run_layer

BATCH_TOKENS: Final = 1024  # tokens that go through a layer at a time


@dataclass(frozen=True)
class _Recorder:
    """Writes the inputs of one layer's FFN, and which of its neurons are active."""

    inputs: RowFile
    bits: RowFile
    activation: Activation

    def record(self, row: int, x: torch.Tensor, found: Values) -> None:
        """Write a batch.

        Args:
            row: number of the batch's first token.
            x: the FFN's input, [tokens, d_model].
            found: the values of every neuron.

        Raises:
            CalibrationError: `x` contains NaN or infinite values.
        """
        if not torch.isfinite(x).all():
            raise CalibrationError(
                "the activations contain NaN or infinite values",
                where=f"{self.inputs.path.stem}: the FFN's input",
                hint="load a checkpoint of another dtype, or check this one with `hf-flash inspect --check`",
            )
        self.inputs.write(row, x.bfloat16())
        self.bits.write(row, pack_bits(self.activation.active(found.before)))


@torch.no_grad()
def run_forward(
    model: Any, group: range, settings: Settings, work: WorkFolder, processes: Processes, progress: Callable[[int], Any]
) -> None:
    """Run this process's share of the windows through the layers of `group`.

    Batches are cut by position alone, so that their arithmetic is the same in whichever process they run.

    Args:
        model: loaded with predictor "none", so that its layers compute every neuron.
        group: the layers to run.
        settings: what is calibrated, on which text.
        work: the folder for hidden states and recorded tables.
        processes: the processes that share the calibration.
        progress: called for each batch and layer with the tokens that all processes together have advanced.
    """
    layers, ffns = decoder_layers(model, family_of(model.config)), find_runtime(model).ffns
    windows, context = settings.windows, settings.context
    step = max(1, BATCH_TOKENS // context)  # windows in a batch
    stored = work.hidden(group.start, model.dtype) if group.start else None
    with ExitStack() as stack:
        opened = stack.enter_context
        recorders = [_Recorder(opened(work.open_inputs(n)), opened(work.open_bits(n)), ffns[n].activation) for n in group]
        hidden_out = opened(work.open_hidden(group.stop))
        for at in range(processes.index * step, len(windows), processes.count * step):
            batch, row = windows[at : at + step], at * context
            hidden, arguments = first_layer_call(model, layers[0], batch)
            if stored is not None:
                hidden = stored[row : row + batch.numel()].view(hidden.shape).clone()
            for n, recorder in zip(group, recorders, strict=True):
                with observed(ffns[n], partial(recorder.record, row)):
                    hidden = run_layer(layers[n], hidden, arguments)
                progress(batch.numel() * processes.count)
            if group.stop < len(layers):
                hidden_out.write(row, hidden.reshape(batch.numel(), -1))
