#!/usr/bin/env python3
"""How to divide room for neurons among the layers, and whether reads are predicted: a small model on real text.

    scripts/window_room.py MODEL TEXT [--tokens 4096]

The first half of the text stands for a calibration, on the second the real `ResidentWindow` is run. For some amounts of room,
as a share of all neurons, prints the neurons a token reads, all layers together, and in brackets what
`hf_flash.budget.demand` says:

    even     equally many neurons for each layer
    tokens   room for equally many tokens, as hf_flash divides it
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from window_rules import active_neurons

from hf_flash.budget.demand import measured
from hf_flash.calibration.activity import AggregatedUse
from hf_flash.runtime.window import ResidentWindow

ROOM = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
CONTEXT = 256


def layer_report(active: np.ndarray) -> dict[str, object]:
    """What calibration would store of a layer."""
    use = AggregatedUse()
    for at in range(0, len(active), CONTEXT):
        use.add(torch.from_numpy(active[at : at + CONTEXT]))
    return {"active": float(active.sum(1).mean()), "use": use.to_dict()}


def read(active: np.ndarray, capacity: int) -> float:
    """Neurons a token reads once the window has filled."""
    window, missed = ResidentWindow(active.shape[1], torch.empty(capacity, 2), 5), []
    for mask in active:
        ids = np.flatnonzero(mask)
        window.note_use(None, 1, ids)
        missed.append(len(window.missing(ids)))
        keep = np.flatnonzero(window.worth_keeping(ids))
        window.evict(np.setdiff1d(window.resident, keep))
        new = window.missing(keep)
        window.commit(new, window.reserve(len(new)))
    return float(np.mean(missed[len(missed) // 4 :]))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--tokens", type=int, default=4096)
    args = parser.parse_args()
    layers = active_neurons(args.model, args.text, args.tokens)
    half, d_ff = args.tokens // 2, layers[0].shape[1]
    need = measured([layer_report(active[:half]) for active in layers], "", "quantized", (d_ff,) * len(layers), predicted=1.0)
    print(f"{need.selected * len(layers):.0f} neurons a token; room, read by a token (predicted)")
    for share in ROOM:
        total = int(share * d_ff * len(layers))
        cells = []
        for name, rooms in (("even", (total // len(layers),) * len(layers)), ("tokens", need.divide(total))):
            found = sum(read(active[half:], room) for active, room in zip(layers, rooms, strict=True))
            cells.append(f"{name} {found:6.1f} ({sum(need.misses(rooms)):.1f})")
        print(f"{share:6.0%}  {'   '.join(cells)}   {rooms}", flush=True)


if __name__ == "__main__":
    main()
