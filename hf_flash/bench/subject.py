"""What a benchmark is of: a repacked checkpoint, or a mixture of experts that is read as it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_flash.base.files import read_json
from hf_flash.config_arguments import METHOD
from hf_flash.packing.expert_folder import Mixture, open_mixture
from hf_flash.store.layout import FlashStore


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
        folder: what hf_flash loads. plain: what the others load, if there is something.
        dense_bytes: all weights of the plain model, in the dtype they are stored in.
        about: for the report.
    """

    folder: Path
    plain: Path | None
    is_mixture: bool
    dense_bytes: int
    about: dict[str, Any]


def find_subject(folder: Path, plain: Path | None) -> Subject:
    """What there is to measure.

    Raises:
        StoreError: the folder is neither.
    """
    found = open_mixture(folder)
    return _repacked(folder, plain) if found is None else _mixture(found, plain)


def _repacked(folder: Path, plain: Path | None) -> Subject:
    store = FlashStore.open_folder(folder)
    extras = {path.resolve() for path in store.files} - {layer.path.resolve() for layer in store.layers}
    dense = sum(path.stat().st_size for path in folder.glob("*.safetensors") if path.resolve() not in extras)
    first = store.layers[0]
    about = {
        "folder": folder.name, "source": store.metadata["source"], "dense_bytes": dense, "ffn_bytes": store.nbytes,
        "layers": len(store.layers), "d_ff": max(store.widths), "d_model": first.d_model,
        "dtype": str(first.dtype).removeprefix("torch."),
    }  # fmt: skip
    return Subject(folder, plain, False, dense, about)


def _mixture(found: Mixture, plain: Path | None) -> Subject:
    folder, layers = found.folder, found.places.layers
    dense = sum(path.stat().st_size for path in found.checkpoint.files)
    about = {
        "folder": folder.name, "source": found.source["source"], "dense_bytes": dense, "ffn_bytes": found.places.nbytes,
        "layers": len(layers), "d_ff": max(layer.neurons for layer in layers), "d_model": layers[0].width,
        "dtype": str(layers[0].pieces[0].dtype).removeprefix("torch."), "experts": max(layer.experts for layer in layers),
        "experts_per_token": found.used, "expert_bytes": max(layer.expert_bytes for layer in layers),
    }  # fmt: skip
    if plain is None and METHOD not in str(read_json(folder / "config.json").get("quantization_config")):
        plain = folder  # stock loads it, too
    return Subject(folder, plain, True, dense, about)
