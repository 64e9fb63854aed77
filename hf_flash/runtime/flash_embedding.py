"""`FlashEmbedding`: the table of embeddings, left in the checkpoint, since a token needs only one row of it.

With today's large vocabularies the table takes a tenth of a mixture, and most of it is never looked up. It is in memory only if
the budget holds everything else as well, or if the head uses the same matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_flash.families.conversions import table_on_disk
from hf_flash.reading.table import TableReader
from hf_flash.runtime.engine import SharedByLayers
from hf_flash.runtime.flash_weights import OnFlash, StoredWeight, refuse_tracing, stand_in
from hf_flash.runtime.transformers_model import mark_as_initialized, tied_pairs
from hf_flash.store.checkpoint import Checkpoint

_ROWS = 4096  # compared at a time


@dataclass(frozen=True)
class Table(StoredWeight):
    """The parameter of an embedding, [vocabulary, d_model].

    Attributes:
        name: the parameter's name.
        tensor: its tensor's name in the checkpoint.
        checkpoint: the checkpoint whose file holds it.
        dtype: the compute dtype.
    """

    name: str
    tensor: str
    checkpoint: Checkpoint
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.checkpoint.specs[self.tensor][1]

    @property
    def layer_name(self) -> str:
        return "embedding"

    def _read(self, out: torch.Tensor) -> None:
        for rows, part in self._parts():
            out[rows] = part

    def _equals(self, other: torch.Tensor) -> bool:
        return all(torch.equal(other[rows].cpu().to(self.dtype), part) for rows, part in self._parts())

    def _parts(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Some rows at a time, in the compute dtype."""
        at = 0
        for part in self.checkpoint.rows(self.tensor).pieces(_ROWS):  # type: ignore[union-attr]  # it is no pickle
            yield slice(at, at + len(part)), part.to(self.dtype)
            at += len(part)


class FlashEmbedding(OnFlash, nn.Embedding):
    """In place of an `nn.Embedding`."""

    engine: SharedByLayers | None = None
    table: TableReader
    _dtype: torch.dtype

    def attach(self, engine: SharedByLayers, stored: Table) -> None:
        """Give the module its engine and table. Called once the rest of the model is loaded."""
        self.engine, self._dtype, self.flash_weights = engine, stored.dtype, {"weight": stored}
        self.table = TableReader(stored.checkpoint, stored.tensor)

    def into_memory(self) -> None:
        """Become an `nn.Embedding` with its weights in memory, outside of any budget: for code that changes them."""
        assert self.engine is not None
        weight = self.flash_weights["weight"].read().to(self.engine.device)
        self.flash_weights = {}
        self.__class__ = nn.Embedding  # type: ignore[assignment]
        self.weight = nn.Parameter(weight)

    def __deepcopy__(self, memo: Any) -> FlashEmbedding:
        return self  # shared: it is only read

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # numpy and system calls: not for tracing
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if tracer := stand_in(input):
            refuse_tracing(tracer)
        assert self.engine is not None
        ids, places = torch.unique(input.detach().cpu(), return_inverse=True)
        if len(ids) and not 0 <= int(ids[0]) <= int(ids[-1]) < self.num_embeddings:
            raise IndexError("index out of range in self")  # as torch says it
        with self.engine.lock:
            self.engine.check_open()
            return self.table.read(ids.long().numpy()).to(self._dtype)[places].to(input.device)


def table_of(model: Any) -> tuple[str, nn.Embedding] | None:
    """The name of a model's table of embeddings, and its module; `None` if it has none that is used only for lookups."""
    try:
        module = model.get_input_embeddings()
    except NotImplementedError:
        return None
    name = next((name for name, other in model.named_modules() if other is module), None)
    if type(module) is not nn.Embedding or name is None or module.max_norm is not None:
        return None
    own, tied = f"{name}.weight", tied_pairs(model)
    shared = any(param is module.weight and other != own for other, param in model.named_parameters(remove_duplicate=False))
    return None if shared or own in tied or own in tied.values() else (own, module)


def table_to_leave(model: Any, checkpoint: Checkpoint) -> tuple[str, str] | None:
    """The table of embeddings that may stay in the checkpoint: its parameter's and its tensor's name; `None`: there is none."""
    found = table_of(model)
    tensor = table_on_disk(model, found[0], checkpoint) if found else None
    return (found[0], tensor) if found and tensor else None


def put_table_on_flash(model: Any, name: str) -> FlashEmbedding:
    """Take the parameter of a table off a model, and make its module a [`FlashEmbedding`].

    Args:
        model: the model, with its weights on the meta device.
        name: the parameter's name.
    """
    module = model.get_submodule(name.removesuffix(".weight"))
    del module.weight
    module.__class__ = FlashEmbedding
    mark_as_initialized(module)
    found: FlashEmbedding = module
    return found
