"""The facts about a repacked checkpoint that `hf-flash inspect` shows, as plain values and as a table."""

from __future__ import annotations

from typing import Any

from hf_flash.base.sizes import format_bytes
from hf_flash.budget.divide import stored_report
from hf_flash.commands.calibration_table import describe_placement
from hf_flash.predictors.choice import check_predictors
from hf_flash.store.layout import FlashStore
from hf_flash.store.names import ALIGNMENT


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


def describe(found: dict[str, Any]) -> str:
    """[`facts`] as a table."""
    predictors = ", ".join(f"{name} ({format_bytes(size)})" for name, size in found["predictors"].items())
    rows = [
        ("source", f"{found['source']} {found['revision']}".rstrip()),
        ("FFN layers", f"{found['layers']}, d_model {found['d_model']}, d_ff {found['d_ff']}, {found['dtype']}"),
        ("bundles", f"{format_bytes(found['bundles_bytes'])}, {format_bytes(found['bundle_bytes'])} a neuron"),
        ("alignment", f"every layer on {found['alignment']} bytes"),
        ("predictors", predictors or "none"),
        ("calibration", _calibration(found["calibration"])),
        ("placement", _placement(found)),
        ("files", f"{len(found['files'])}, {found['files'][0]} ..."),
    ]
    return "\n".join(f"{name:<18}{value}" for name, value in rows)


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
