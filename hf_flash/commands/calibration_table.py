"""A calibration report as text. It works on the plain values of the report and imports nothing heavy."""

from __future__ import annotations

from typing import Any, Final

from hf_flash.base.sizes import format_bytes


def describe(report: dict[str, Any]) -> str:
    """A calibration report as a table, one layer a row."""
    if "counted" in report:
        return describe_routing(report)
    rows = ["layer   active   rank   recall    extra  untrained  predicted/active       bytes   missing  reads, placed"]
    for index, layer in enumerate(report["layers"]):
        low, reads = layer["lowrank"], layer["reads"]
        rows.append(
            f"{index:5d} {layer['active']:8.1f} {low['rank']:6d} {low['recall']:8.2%} {low['extra']:8.2%} "
            f"{low['extra_untrained']:10.2%} {low['selected']:17.2f} {format_bytes(low['nbytes']):>11s} "
            f"{reads['missing']:9.1f} {reads['before']:6.1f} {reads['after']:7.1f}"
        )
    reached = "in every layer" if report["reached"] else "NOT in every layer"
    rows.append(f"\nmeasured on {report['text']['held_out']} held-out tokens; targets reached {reached}")
    rows.append(f"the folder's predictor is now: {report['default']}")
    rows.append(f"neurons placed: {describe_placement(report)}")
    return "\n".join(rows)


_SLOTS: Final = (10, 25, 50, 75)  # percent of a layer's experts


def describe_routing(report: dict[str, Any]) -> str:
    """What a mixture's routers did as a table, one layer a row."""
    rows = [f"layer  experts    reuse {''.join(f'{share:8d} %' for share in _SLOTS)}"]
    for index, layer in enumerate(report["layers"]):
        experts = len(layer["hits"]) - 1
        hits = (layer["hits"][experts * share // 100] for share in _SLOTS)
        rows.append(f"{index:5d} {experts:8d} {layer['reuse']:8.1%} {''.join(f'{hit:10.1%}' for hit in hits)}")
    rows.append("\nreuse: of a token's experts, those that the token before used, too")
    rows.append("the columns: those found in memory if it holds so many percent of a layer's experts")
    rows.append(f"counted on {report['counted']} of {report['tokens']} tokens; `hf-flash plan` goes by it")
    return "\n".join(rows)


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
