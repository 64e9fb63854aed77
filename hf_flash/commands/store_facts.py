"""The facts about a repacked checkpoint, or a mixture of experts, that `hf-flash inspect` shows, as values and as a table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from hf_flash.base.files import StoredFile, read_json
from hf_flash.base.sizes import format_bytes
from hf_flash.budget.divide import stored_report
from hf_flash.budget.routing import Routing, routing_in
from hf_flash.commands.calibration_table import describe_placement
from hf_flash.config_arguments import METHOD
from hf_flash.errors import StoreError
from hf_flash.packing.expert_folder import Mixture
from hf_flash.predictors.choice import check_predictors
from hf_flash.store.experts import ExpertLayer
from hf_flash.store.layout import FlashStore
from hf_flash.store.names import ALIGNMENT
from hf_flash.store.safetensors_files import nbytes_of

_SHOWN: Final = 4  # experts in the table


def facts(store: FlashStore) -> dict[str, Any]:
    """Plain values, for JSON. Raises `StoreFormatError`: a predictor or the calibration is not one."""
    check_predictors(store)
    first = store.layers[0]
    return {
        "source": store.metadata["source"],
        "revision": store.metadata["revision"],
        "layers": len(store.layers),
        "d_model": first.d_model,
        "d_ff": max(store.widths),
        "dtype": str(first.dtype).removeprefix("torch."),
        "bundle_bytes": first.bundle_bytes,
        "bundles_bytes": store.nbytes,
        "alignment": ALIGNMENT,
        "predictors": {variant: path.stat().st_size for variant, path in store.predictors.items()},
        "calibration": stored_report(store),
        "placed_layers": sum(layer.place is not None for layer in store.layers),
        "files": [path.name for path in store.files],
    }


def neuron_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """[`facts`] for people: names and values."""
    predictors = ", ".join(f"{name} ({format_bytes(size)})" for name, size in found["predictors"].items())
    return [
        ("source", f"{found['source']} {found['revision']}".rstrip()),
        ("FFN layers", f"{found['layers']}, d_model {found['d_model']}, d_ff {found['d_ff']}, {found['dtype']}"),
        ("bundles", f"{format_bytes(found['bundles_bytes'])}, {format_bytes(found['bundle_bytes'])} a neuron"),
        ("alignment", f"every layer on {found['alignment']} bytes"),
        ("predictors", predictors or "none"),
        ("calibration", _calibration(found["calibration"])),
        ("placement", _placement(found)),
        ("files", f"{len(found['files'])}, {found['files'][0]} ..."),
    ]


def _placement(found: dict[str, Any]) -> str:
    if not found["placed_layers"]:
        return "none: neurons lie in the order of their ids"
    placed = describe_placement(found["calibration"]) if found["calibration"] else "none"
    return placed if placed != "none" else f"{found['placed_layers']} of {found['layers']} layers"


def _calibration(report: dict[str, Any] | None) -> str:
    if report is None:
        return "none"
    ranks = [layer["lowrank"]["rank"] for layer in report["layers"]]
    reached = "reached" if report["reached"] else "not reached"
    return f"on {report['text']['tokens']} tokens; ranks {min(ranks)} to {max(ranks)}, targets {reached}"


# --- mixtures of experts -----------------------------------------------------------------------------------------------


def expert_facts(mixture: Mixture) -> dict[str, Any]:
    """Plain values, for JSON. Sizes in bytes, as they lie in the files."""
    layers, checkpoint = mixture.places.layers, mixture.checkpoint
    first, routing = layers[0], routing_in(mixture.folder, [layer.experts for layer in layers])
    return {
        **mixture.source,
        "model_type": mixture.model.config.model_type,
        "plain": METHOD not in str(read_json(mixture.folder / "config.json").get("quantization_config")),
        "layers": len(layers),
        "experts": max(layer.experts for layer in layers),
        "experts_per_token": mixture.used,
        "d_model": first.width,
        "neurons": max(layer.neurons for layer in layers),
        "expert_bytes": max(layer.expert_bytes for layer in layers),
        "experts_bytes": mixture.places.nbytes,
        "active_bytes": mixture.active_bytes,
        "other_bytes": sum(map(nbytes_of, checkpoint.specs.values())) - mixture.places.nbytes,
        "pieces": list(_pieces(first)),
        "alike": all(layer.pieces == first.pieces for layer in layers),
        "first_layer": first.name,
        "first_layer_experts": [list(_where(mixture, 0, expert)) for expert in range(first.experts)],
        "reads": max(len(mixture.places[0, expert].ranges) for expert in range(first.experts)),
        "files": [path.name for path in checkpoint.files],
        "routing": None if routing is None else _measured(routing),
    }


def _measured(routing: Routing) -> dict[str, Any]:
    half = [(len(layer.hits) - 1) // 2 for layer in routing.layers]
    return {"text": routing.name, "tokens": routing.counted, "reuse": routing.reuse, "half": routing.hit_rate(half)}


def _pieces(layer: ExpertLayer) -> Iterator[dict[str, Any]]:
    """What an expert of a layer is made of, with the names of expert 0: numbers, then the scales of those that have any."""
    scaled = [piece for piece in layer.pieces if piece.scales]
    forms = [
        *((piece.param, (piece.rows, piece.columns), piece.dtype, piece.turned) for piece in layer.pieces),
        *((f"{piece.param}, scales", piece.grid, piece.scales.dtype, False) for piece in scaled if piece.scales),
    ]
    for (part, shape, dtype, turned), tensor, nbytes in zip(forms, layer.tensors[0], layer.ranges, strict=True):
        yield {
            "tensor": tensor, "part_of": part, "shape": list(shape), "dtype": str(dtype).removeprefix("torch."),
            "bytes": nbytes, "turned": turned,
        }  # fmt: skip


def _where(mixture: Mixture, layer: int, expert: int) -> Iterator[dict[str, Any]]:
    """Where an expert lies: the file of each of its ranges, the byte where it begins there, and its bytes."""
    found = mixture.places.layers[layer]
    for nbytes, tensor, byte in zip(found.ranges, found.tensors[expert], found.begin[expert].tolist(), strict=True):
        path, offset = mixture.checkpoint.place(tensor)
        yield {"file": path.name, "begin": offset + byte, "bytes": nbytes}


def expert_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """[`expert_facts`] for people: names and values."""
    expert, active, every, other = (
        format_bytes(found[name]) for name in ("expert_bytes", "active_bytes", "experts_bytes", "other_bytes")
    )
    kind = "a plain checkpoint" if found["plain"] else "saved by hf_flash: a plain checkpoint that says so"
    return [
        ("source", f"{found['source']} {found['revision']}".rstrip()),
        ("kind", f"{found['model_type']}, a mixture of experts; {kind}"),
        ("layers", f"{found['layers']} with experts, d_model {found['d_model']}"),
        ("experts", f"{found['experts']} a layer, {found['neurons']} neurons each; a token uses {found['experts_per_token']}"),
        ("sizes", f"{expert} an expert, {active} a token, {every} all; the rest {other}"),
        ("pieces", f"{len(found['pieces'])} an expert" + ("" if found["alike"] else "; in other layers otherwise")),
        *(("", _piece(piece)) for piece in found["pieces"]),
        ("first layer", f"{found['first_layer']}; ranges that are read for an expert: {found['reads']} at most"),
        *((f"  expert {number}", _ranges(found["first_layer_experts"][number])) for number in range(found["experts"])[:_SHOWN]),
        ("files", f"{len(found['files'])}, {found['files'][0]}" + (" ..." if len(found["files"]) > 1 else "")),
        ("routing", _routing(found["routing"])),
    ]


def _routing(found: dict[str, Any] | None) -> str:
    if found is None:
        return "not measured: `hf-flash calibrate`"
    return (
        f"of a token's experts {found['half']:.1%} are in memory if it holds half of all, and the token before used "
        f"{found['reuse']:.1%}; {found['tokens']} tokens of {found['text']}"
    )


def _piece(piece: dict[str, Any]) -> str:
    rows, columns = piece["shape"]
    turned = ", a row for each input" if piece["turned"] else ""
    return f"{piece['tensor']}: {rows} x {columns} {piece['dtype']}{turned}, of {piece['part_of']}"


def _ranges(pieces: list[dict[str, Any]]) -> str:
    """Bytes of pieces, by file."""
    files = dict.fromkeys(piece["file"] for piece in pieces)
    parts = {name: [f"{p['begin']}+{p['bytes']}" for p in pieces if p["file"] == name] for name in files}
    return "; ".join(f"{name} at {', '.join(found)}" for name, found in parts.items())


def check_experts(mixture: Mixture, progress: Callable[[Any], Iterable[Path]]) -> list[str]:
    """What is wrong with a mixture's files: experts that do not lie in their tensors, and what cannot be read.

    Everything is read once. A plain checkpoint has no checksums: bytes that were changed are not found.

    Args:
        progress: is given the files, and yields them.
    """
    problems = [
        f"{layer.name}, expert {expert}: byte {byte} to {byte + nbytes} of {tensor}, which is shorter"
        for layer in mixture.places.layers
        for expert in range(layer.experts)
        for nbytes, tensor, byte in zip(layer.ranges, layer.tensors[expert], layer.begin[expert].tolist(), strict=True)
        if byte + nbytes > nbytes_of(mixture.checkpoint.specs[tensor])
    ]
    for path in progress(mixture.checkpoint.files):
        try:
            with StoredFile(path) as file:
                for _ in file.blocks(0):
                    pass
        except StoreError as error:
            problems.append(str(error))
    return problems
