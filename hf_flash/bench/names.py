"""What the rows of a bench report are called by people, what each of them is, and the setting of a run in one line.

A report in JSON keeps the short names of [`SYSTEMS`][hf_flash.bench.systems.SYSTEMS]. Pages, drawings and the tables of the
documentation call a row as this table does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from hf_flash.base.sizes import format_bytes

ROWS: Final = {  # short name: what people call it, what it is
    "stock-ram": ("stock transformers, all in RAM, no cap", "all weights in memory: what one would like to have"),
    "stock-cap": (
        "stock transformers under the cap (the kernel pages)",
        "transformers as it is; the kernel may drop weights from memory and read them again",
    ),
    "accelerate": ("accelerate, layers on disk", "every decoder layer is on disk and is read, whole, for every token"),
    "naive": ("accelerate, feed-forward on disk", "of every decoder layer the feed-forward part is on disk, and is read whole"),
    "none": ("hf_flash without a predictor", "what does not fit into memory is read for every token: exact"),
    "hybrid": (
        "the paper's steps: attention resident, FFN streamed",
        "hf_flash with everything of the paper switched off: attention stays in memory, the whole FFN is read for every token",
    ),
    "+predictor": ("+ predictor", "only neurons that the predictor names are read; each of their parts is a read of its own"),
    "+window": ("+ window", "and neurons that recent tokens used stay in memory"),
    "+bundling": ("+ bundling", "and all parts of a neuron lie together on disk: one read"),
    "flash": ("hf_flash", "hf_flash as it comes"),
    "flash-uncapped": ("hf_flash, no cap, all the memory it wants", "the same with room for everything; it reads what is new"),
}
_ON_A_DEVICE: Final = {"stock-ram": "stock transformers, all in the device's memory"}
_WITHOUT_A_CAP: Final = {"stock-cap": "stock transformers, no cap"}

PARTS: Final = {  # of the mean time of a token, as hf_flash counts it
    "io": "I/O: reading from disk",
    "manage": "management of the window",
    "predict": "predictor",
    "compute": "FFN: its products",
    "rest": "the rest: attention, head",
}
WHOLE: Final = "a whole token, not divided"


def row_name(row: Mapping[str, Any], *, on_device: bool = False) -> str:
    """What people call a row; a system that was made up for one run is called as there.

    Args:
        row: of a report.
        on_device: whether the systems compute on a device, in whose memory weights are then.
    """
    name: str = row["system"]
    if row.get("sweep"):
        share = re.fullmatch(r"([\d.]+)%", row["sweep"])
        budget = f"{share[1]} % of the weights" if share else f"{row['sweep']} of weights"
        predictor = row.get("arguments", {}).get("predictor")
        return f"hf_flash, {budget}" + (f", predictor {predictor}" if predictor else "")
    if on_device and name in _ON_A_DEVICE:
        return _ON_A_DEVICE[name]
    if row.get("cap_bytes", True) is None and name in _WITHOUT_A_CAP:
        return _WITHOUT_A_CAP[name]
    return ROWS[name][0] if name in ROWS else name


def row_names(report: Mapping[str, Any]) -> list[str]:
    """What people call the rows of a report, in their order."""
    return [row_name(row, on_device="device" in report["machine"]) for row in report["rows"]]


def setting(report: Mapping[str, Any]) -> str:
    """The share of the weights in memory, the cap, the prompt and the tokens; what a report says of itself comes first."""
    if "setting" in report:
        return str(report["setting"])
    dense, found = report["model"]["dense_bytes"], report["settings"]
    share = f"{min(1.0, found['memory_bytes'] / dense):.0%}".replace("%", " %")
    capped = any(row.get("cap_bytes") for row in report["rows"])
    memory = f"{share} of the weights in memory, " + (f"cap {format_bytes(found['cap_bytes'])}" if capped else "no cap")
    if all(row["sweep"] for row in report["rows"]):
        memory = "weights in memory, and cap, as each row says"
    which = "given tokens" if found.get("forced") else "tokens"
    batch = found.get("batch_size", 1)
    sequences = f", {batch} sequences at once" if batch > 1 else ""
    return f"{memory}; {found['tokens']} {which} after a prompt of {found['prompt_tokens']}{sequences}"
