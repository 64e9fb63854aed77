"""A calibration report for people. It works on the plain values of the report and imports nothing heavy."""

from __future__ import annotations

from typing import Any, Final

from rich.console import Group
from rich.text import Text

from hf_flash.base.sizes import format_bytes
from hf_flash.base.tables import Figures, Paragraph


def describe(report: dict[str, Any]) -> Group:
    """A calibration report as a table, one layer a row, to be printed by rich."""
    if "counted" in report:
        return describe_routing(report)
    headings = ("layer", "active", "rank", "recall", "extra", "chosen", "size", "reads", "placed")
    rows = []
    for index, layer in enumerate(report["layers"]):
        low, reads = layer["lowrank"], layer["reads"]
        rows.append(
            (
                f"{index}", f"{layer['active']:.1f}", f"{low['rank']}", f"{low['recall']:.1%}", f"{low['extra']:.1%}",
                f"{low['selected']:.2f}", format_bytes(low["nbytes"]), f"{reads['before']:.1f}", f"{reads['after']:.1f}",
            )
        )  # fmt: skip
    reached = "in every layer" if report["reached"] else "NOT in every layer"
    return Group(
        Figures(headings, rows),
        Paragraph(_HEADINGS),
        Text(),
        Paragraph(f"Measured on {report['text']['held_out']} held-out tokens; targets reached {reached}."),
        Paragraph(f"The folder's predictor is now: {report['default']}."),
        Paragraph(f"Neurons placed: {describe_placement(report)}."),
    )


_HEADINGS: Final = (
    "active: neurons of a token; recall: of these, chosen by the low-rank predictor; extra: of the others, chosen; chosen: "
    "neurons for one that is active; reads: for a token, and once neurons that are active together are neighbours."
)
_SLOTS: Final = (10, 25, 50, 75)  # percent of a layer's experts


def describe_routing(report: dict[str, Any]) -> Group:
    """What a mixture's routers did as a table, one layer a row, to be printed by rich."""
    rows = []
    for index, layer in enumerate(report["layers"]):
        experts = len(layer["hits"]) - 1
        hits = (layer["hits"][experts * share // 100] for share in _SLOTS)
        rows.append((f"{index}", f"{experts}", f"{layer['reuse']:.1%}", *(f"{hit:.1%}" for hit in hits)))
    return Group(
        Figures(("layer", "experts", "reuse", *(f"{share} %" for share in _SLOTS)), rows),
        Paragraph(
            "reuse: of a token's experts, those that the token before used, too; the other columns: those found in memory if "
            "it holds so many percent of a layer's experts."
        ),
        Text(),
        Paragraph(f"Counted on {report['counted']} of {report['tokens']} tokens; `hf-flash plan` goes by it."),
    )


def describe_placement(report: dict[str, Any]) -> str:
    """What placing neurons did to reading, in a line."""
    layers = [layer["reads"] for layer in report["layers"] if "reads" in layer]
    placed = [reads["worth"] and report["placement"] for reads in layers]
    if not any(placed):
        return "none"
    missing, before = (sum(reads[name] for reads in layers) for name in ("missing", "before"))
    after = sum(reads["after" if done else "before"] for reads, done in zip(layers, placed, strict=True))
    return (
        f"{sum(placed)} of {len(layers)} layers; {after:.1f} reads a token instead of {before:.1f}, "
        f"{missing / after:.3f} neurons a read instead of {missing / before:.3f}"
    )
