"""`WorkFolder`: the files of a calibration that is under way, and where to resume it after it was killed.

They are in `.calibration` in the model's folder until the end:

    job.json        the settings of the calibration; files of other settings are deleted
    hidden-N.bin    hidden states that go into layer N, [tokens, d_model] in the compute dtype
    hidden-N.done   marks hidden-N.bin as complete
    x-N.bin         inputs of layer N's FFN, bfloat16 [tokens, d_model]
    bits-N.bin      which of its neurons are active, one bit each, [tokens, d_ff / 8]
    layer-N.safetensors   the result of layer N: what was measured and trained

A result file is written whole or not at all, so a layer with a result is finished.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, Final

import torch

from hf_flash.base.files import read_json, write_json, writing
from hf_flash.base.folders import check_room, clear_away
from hf_flash.calibration.activity import Activations
from hf_flash.calibration.row_files import RowFile, map_rows
from hf_flash.calibration.settings import Settings
from hf_flash.errors import StoreError
from hf_flash.store.layer_file import LayerStore

_NAME: Final = ".calibration"


class WorkFolder:
    """The files of one calibration. Creating this object touches no files.

    Args:
        settings: the calibration's settings.
    """

    def __init__(self, settings: Settings) -> None:
        self.path = settings.folder / _NAME
        self._settings = settings
        self._layers, self._tokens = settings.store.layers, settings.tokens

    # --- the folder as a whole

    def prepare(self) -> None:
        """Make the folder, and delete one that was made for other settings. For the first process only."""
        wanted = self._settings.to_dict()
        with writing(self.path):
            if not _is_working_folder(self.path) or _read_job(self.path / "job.json") != wanted:
                clear_away(self.path)
            self.path.mkdir(exist_ok=True)
        write_json(self.path / "job.json", wanted)

    def check_room(self, processes: int) -> None:
        """Raise `DiskSpaceError` if the disk has no room for the work of so many processes."""
        d_model, widest = self._layers[0].d_model, max(layer.d_ff for layer in self._layers)
        recorded = torch.bfloat16.itemsize * d_model + (widest + 7) // 8
        with writing(self.path):
            check_room(self.path, self._tokens * (2 * 4 * d_model + processes * recorded))

    def remove(self) -> None:
        shutil.rmtree(self.path)

    # --- how far the work is

    def result(self, layer: int) -> Path:
        """The result file of a layer."""
        return self.path / f"layer-{layer:05d}.safetensors"

    def finished(self) -> set[int]:
        """Layers that have a result."""
        return {layer.index for layer in self._layers if self.result(layer.index).exists()}

    def next_layer(self) -> int:
        """The layer to resume with: the last one with complete hidden states and all layers before it finished."""
        finished = self.finished()
        whole = [0] + [n for n in range(1, len(self._layers)) if self._mark(n).exists()]
        return max(n for n in whole if finished >= set(range(n)))

    def mark_hidden_whole(self, layer: int) -> None:
        """Record that all processes have written the hidden states that go into a layer."""
        self._mark(layer).touch()

    def clear(self, group: range) -> None:
        """Remove the recorded tables of finished layers. Their results stay."""
        for layer in group:
            self._mark(layer).unlink(missing_ok=True)
            for table in ("x", "bits", "hidden"):
                self._table(table, layer).unlink(missing_ok=True)

    # --- the tables, one row a token

    def open_inputs(self, layer: int) -> RowFile:
        """Open the table of the inputs of a layer's FFN, to write."""
        return RowFile(self._table("x", layer))

    def open_bits(self, layer: int) -> RowFile:
        """Open the table of a layer's active neurons, to write."""
        return RowFile(self._table("bits", layer))

    def open_hidden(self, layer: int) -> RowFile:
        """Open the table of the hidden states that go into a layer, to write."""
        return RowFile(self._table("hidden", layer))

    def hidden(self, layer: int, dtype: torch.dtype) -> torch.Tensor:
        """The hidden states that go into a layer, [tokens, d_model], mapped."""
        return map_rows(self._table("hidden", layer), dtype, (self._tokens, self._layers[0].d_model))

    def activations(self, layer: LayerStore) -> Activations:
        """The recorded activations of a layer, mapped."""
        x = map_rows(self._table("x", layer.index), torch.bfloat16, (self._tokens, layer.d_model))
        bits = map_rows(self._table("bits", layer.index), torch.uint8, (self._tokens, (layer.d_ff + 7) // 8))
        return Activations(x, bits, layer.d_ff, self._settings.held_out)

    def _table(self, name: str, layer: int) -> Path:
        return self.path / f"{name}-{layer:05d}.bin"

    def _mark(self, layer: int) -> Path:
        return self._table("hidden", layer).with_suffix(".done")


def _is_working_folder(path: Path) -> bool:
    """Whether a path is a folder that holds only regular files, so that writing into it changes nothing elsewhere."""
    return not path.is_symlink() and path.is_dir() and all(entry.is_file(follow_symlinks=False) for entry in os.scandir(path))


def _read_job(path: Path) -> dict[str, Any] | None:
    """The settings that a work folder was made for; `None` if they cannot be read."""
    try:
        return read_json(path)
    except StoreError:
        return None
