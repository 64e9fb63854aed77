"""Predictors: which neurons a token will use (paper: section 3.1, appendix B).

    none        every neuron: the stock model
    quantized   a low-bit copy of the deciding projection (predictors/quantized.py); works on any checkpoint at once
    lowrank     the paper's: two thin matrices, trained on text (predictors/lowrank.py); a tenth of the memory in large models

A predictor looks at one token at a time: its choice for a token never depends on the tokens beside it (contract C3). A NaN in
the input selects every neuron, so that the NaN reaches the output as in the stock model.

A *format* describes a predictor before it is loaded: its name in the store, its tensors, the memory that it will take.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

import torch

from hf_flash.base.files import StoredFile, exists
from hf_flash.base.heap import trim_heap
from hf_flash.errors import StoreFormatError, StoreMissingError
from hf_flash.families.base import Shape
from hf_flash.store.layer_file import LayerStore
from hf_flash.store.layout import FlashStore
from hf_flash.store.names import META
from hf_flash.store.safetensors_files import TensorSpec, read_header, read_tensor
from hf_flash.store.writer import predictor_metadata, write_safetensors

CPU: Final = torch.device("cpu")


class Predictor(ABC):
    """Names the neurons that each token uses.

    Attributes:
        nbytes: bytes of DRAM that it holds.
        bias: [d_ff], the bias of the deciding projection. The layer sets it before every call, since users may replace it.
    """

    nbytes: int
    bias: torch.Tensor | None = None

    @abstractmethod
    def select(self, x: torch.Tensor, allowed: torch.Tensor | None = None) -> torch.Tensor | None:
        """Which neurons each token uses.

        Args:
            x: [tokens, d_model] in the compute dtype.
            allowed: bool [tokens, d_ff] or [d_ff], a choice from outside that narrows this one; `None`: all.

        Returns:
            bool [tokens, d_ff], or `None`: every neuron for every token.
        """


def narrowed(selected: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
    """The neurons that are both selected and allowed, bool [tokens, d_ff]."""
    return selected if allowed is None else selected & allowed


class NoPredictor(Predictor):
    """Every neuron for every token."""

    nbytes = 0

    def select(self, x: torch.Tensor, allowed: torch.Tensor | None = None) -> torch.Tensor | None:
        return None if allowed is None else allowed.expand(len(x), allowed.shape[-1])


class PredictorFormat(Protocol):
    """Describes a predictor before it is loaded: its names, tensors and memory."""

    @property
    def kind(self) -> str:
        """Its name in `FlashOffloadConfig(predictor=...)`."""
        ...

    @property
    def arguments(self) -> Mapping[str, Any]:
        """The arguments of `FlashOffloadConfig` that select it again."""
        ...

    @property
    def assumed_margin(self) -> float | None:
        """The margin that it uses if none was measured; `None` if this kind has no margin."""
        ...

    @property
    def detail(self) -> str:
        """What distinguishes it from others of its kind, in words for users."""
        ...

    @property
    def variant(self) -> str:
        """Its name in file names and metadata."""
        ...

    def specs(self, layer: LayerStore) -> dict[str, TensorSpec]:
        """The tensors of one layer in its file."""
        ...

    def dram_bytes(self, shape: Shape) -> int:
        """Bytes of DRAM that the loaded predictors of all layers hold."""
        ...

    def load(self, store: FlashStore, layer: LayerStore, bias: torch.Tensor | None, device: torch.device = CPU) -> Predictor:
        """The predictor of one layer; `bias` [d_ff] is that of the deciding projection, `device` computes."""
        ...

    def made_up(self, d_ff: int, d_model: int) -> Predictor:
        """A predictor of this size with meaningless weights, to measure how long it takes."""
        ...


class CopyFormat(PredictorFormat, Protocol):
    """Describes a predictor that can be made from a layer's weights alone, if a store lacks it."""

    def shapes(self, prefix: str, d_ff: int, d_model: int) -> dict[str, TensorSpec]:
        """The tensors of one layer of this size, named `prefix.predictor.NAME`, in file order."""
        ...

    def tensors(self, layer: LayerStore) -> Iterator[torch.Tensor]:
        """The same tensors, made from the layer's bundles: one after another, each in any number of pieces."""
        ...


def write_copy(path: Path, store: FlashStore, fmt: CopyFormat, progress: Any = iter) -> None:
    """Make the predictors of all layers from the bundles on flash, one layer in memory at a time, and write them to `path`."""
    specs: dict[str, TensorSpec] = {}
    for layer in store.layers:
        specs |= fmt.specs(layer)

    def pieces() -> Iterator[torch.Tensor]:
        for layer in progress(store.layers):
            yield from fmt.tensors(layer)
            trim_heap()

    write_safetensors(path, specs, pieces(), predictor_metadata(fmt.variant, store.metadata))


def find_predictor(store: FlashStore, fmt: PredictorFormat) -> Path:
    """The file of a predictor in a store, after checking that it belongs to the store.

    Raises:
        StoreMissingError: the store has no such predictor.
        StoreFormatError: the file was made from other weights, or does not fit a layer.
    """
    path = store.predictors.get(fmt.variant)
    if path is None or not exists(path):
        raise StoreMissingError(
            "the store has no such predictor",
            where=store.layers[0].path.parent,
            expected=fmt.variant,
            got=", ".join(store.predictors) or "none at all",
            hint="repack or calibrate with this predictor, name a stored one, or load with predictor='none'",
        )
    tensors = belonging(store, path)
    for layer in store.layers:
        check_specs(path, tensors, fmt.specs(layer))
    return path


def belonging(store: FlashStore, path: Path) -> Mapping[str, tuple[TensorSpec, int]]:
    """The tensors of a file that was made from a store's weights; raises `StoreFormatError` if it was made from others."""
    tensors, meta = read_header(path)
    wanted, fingerprint = store.metadata, meta.get(META + "fingerprint")
    revision = meta.get(META + "revision", wanted["revision"])
    if (fingerprint, revision) != (wanted["fingerprint"], wanted["revision"]):
        raise StoreFormatError(
            "the predictor belongs to another checkpoint",
            where=path,
            expected=f"fingerprint {wanted['fingerprint']}, revision {wanted['revision']!r}",
            got=f"fingerprint {fingerprint}, revision {revision!r}",
            hint="repack or calibrate the model again",
        )
    return tensors


def check_specs(path: Path, tensors: Mapping[str, tuple[TensorSpec, int]], specs: Mapping[str, TensorSpec]) -> None:
    """Raise `StoreFormatError` if a file does not have the tensors `specs` that its layer needs."""
    for name, spec in specs.items():
        if name not in tensors or tensors[name][0] != spec:
            raise StoreFormatError(
                "the predictor does not fit its layer",
                where=f"{path}: {name}",
                expected=spec,
                got=tensors[name][0] if name in tensors else "no such tensor",
            )


def read_tensors(path: Path, prefix: str) -> dict[str, torch.Tensor]:
    """Read the tensors of a file whose names begin with `prefix.`; the keys are the rest of the names."""
    found = {name: at for name, at in read_header(path)[0].items() if name.startswith(prefix + ".")}
    with StoredFile(path) as file:
        return {name.removeprefix(prefix + "."): read_tensor(file, *at) for name, at in found.items()}


def made_up_tensor(spec: TensorSpec) -> torch.Tensor:
    """A tensor of this dtype and shape with meaningless numbers."""
    dtype, shape = spec
    if dtype.is_floating_point:
        return torch.full(shape, 0.01, dtype=dtype, device="cpu")
    return torch.randint(0, 127, shape, dtype=dtype, device="cpu")
