#!/usr/bin/env python3
"""Where neurons should lie on flash: orders compared by what decoding has to read, on a small model and real text.

    scripts/placement.py MODEL LEARN.txt HELD_OUT.txt [--tokens 4096] [--learn-tokens 32768] [--disk FOLDER]

Orders are made from the first tokens of one text and judged on the last of the other. For some sizes of the window, over all
layers whose tokens fit into it: neurons a read, and effective GB/s for bundles of 10 and 32 KiB if a read takes 7 us and
2.5 GB/s.
`gap g` reads through up to g neurons that nobody asked for where that saves a read; GB/s count wanted bytes alone.

    ids      as repacked
    hot      the most used first
    linked   neurons that are used together, linked greedily (hf_flash/calibration/placement.py): all of the layer
    missed   the same, with neurons that a window of this size misses together
    blocks   linked within blocks alone: what `hf-flash calibrate` does

`--disk` also measures: bundles of both sizes in a file there, and the reads of the last size of the window with direct I/O.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from window_rules import active_neurons

from hf_flash.calibration.placement import chain
from hf_flash.compute.arithmetic import block_rows
from hf_flash.reading.reader import open_reader
from hf_flash.runtime.window import ResidentWindow
from hf_flash.store.layout import FlashStore
from hf_flash.store.unit import TWO_MATRICES
from hf_flash.store.writer import place_layer, write_layer

CAPACITIES = (0.15, 0.3, 0.5)
GAPS = (0, 1, 2, 4)
SIZES = (10 << 10, 32 << 10)
READ_S, BYTES_PER_S = 7e-6, 2.5e9
WARM = 256  # tokens before counting begins


def missing(active: np.ndarray, capacity: int) -> list[np.ndarray]:
    """What each token has to read, with the window that models have."""
    window = ResidentWindow(active.shape[1], torch.empty(capacity, 0), 5)
    found = []
    for use in active:
        ids = np.flatnonzero(use)
        window.note_use(None, 1, ids)
        found.append(window.missing(ids))
        window.make_room(len(found[-1]), ids)
        window.commit(found[-1], window.reserve(len(found[-1])))
    return found[WARM:]


def linked(active: np.ndarray, block: int, *, relative: bool = True) -> np.ndarray:
    """The neuron of each row, linked within blocks."""
    used = np.sqrt(np.maximum(1, active.sum(0))) if relative else np.ones(active.shape[1])
    orders = []
    for start in range(0, active.shape[1], block):
        part = active[:, start : start + block].astype(np.float32)
        scale = used[start : start + block]
        orders.append(start + chain(part.T @ part / scale[:, None] / scale))
    return np.concatenate(orders)


def orders(learn: np.ndarray, capacity: int) -> Iterator[tuple[str, np.ndarray]]:
    """Name, and the neuron of each row."""
    d_ff = learn.shape[1]
    yield "ids", np.arange(d_ff)
    yield "hot", np.argsort(-learn.sum(0), kind="stable")
    yield "linked", linked(learn, d_ff)
    lacking = np.zeros_like(learn[WARM:])
    for row, ids in zip(lacking, missing(learn, capacity), strict=True):
        row[ids] = True
    yield "missed", linked(lacking, d_ff, relative=False)
    yield "blocks", linked(learn, block_rows(d_ff, tokens=2))


def count(tokens: list[np.ndarray], order: np.ndarray, gap: int) -> np.ndarray:
    """Neurons asked for, reads, and neurons read in vain."""
    place = np.argsort(order)
    steps = [np.diff(np.sort(place[ids])) - 1 for ids in tokens if len(ids)]
    reads = sum(1 + int((step > gap).sum()) for step in steps)
    return np.array([sum(map(len, tokens)), reads, sum(int(step[step <= gap].sum()) for step in steps)])


def measure(folder: Path, size: int, tokens: list[list[np.ndarray]], places: list[np.ndarray], rounds: int = 3) -> list[float]:
    """GB/s of a token's reads, layer by layer, in the order of ids and placed: medians of rounds that take turns."""
    with tempfile.TemporaryDirectory(dir=folder) as top:
        d_ff, d_model, stores = len(places[0]), size // 4, []
        for name in ("ids", "placed"):
            into = Path(top) / name
            into.mkdir()
            up = torch.randn(d_ff, d_model).to(torch.bfloat16)
            origin = {"source": "random", "revision": "", "fingerprint": "random"}
            for n in range(len(places)):
                path, names = into / f"flash-layer-{n:05d}.safetensors", (f"{n}.up", f"{n}.down")
                write_layer(path, n, len(places), f"{n}.fc1.bundles", TWO_MATRICES, names, (up, up.T), origin)
            if name == "placed":
                for layer, place in zip(FlashStore.open_folder(into).layers, places, strict=True):
                    place_layer(layer, place.astype(np.int32))
            stores.append(FlashStore.open_folder(into))
        readers = [open_reader(store, "direct", 16, torch.bfloat16, 0) for store in stores]
        out = torch.zeros(d_ff, 2 * d_model, dtype=torch.bfloat16)
        found: list[list[float]] = [[], []]
        for turn in range(2 * rounds):
            start, neurons = perf_counter(), 0
            for n, layer in enumerate(tokens):
                for ids in layer:
                    readers[turn % 2].start(n, ids, out, np.arange(len(ids))).wait()
                    neurons += len(ids)
            found[turn % 2].append(neurons * size / (perf_counter() - start) / 1e9)
        for reader in readers:
            reader.close()
    return [float(np.median(values)) for values in found]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("learn")
    parser.add_argument("held_out")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--learn-tokens", type=int, default=32768)
    parser.add_argument("--disk", type=Path)
    args = parser.parse_args()
    learn = active_neurons(args.model, args.learn, args.learn_tokens)
    held_out = active_neurons(args.model, args.held_out, args.tokens, last=True)
    print("window  order    gap  missing   reads  neurons/read  in vain  " + "  ".join(f"{s >> 10} KiB GB/s" for s in SIZES))
    for share in CAPACITIES:
        capacity, sums = int(share * learn[0].shape[1]), {}
        tokens, places = [], []
        for known, unknown in zip(learn, held_out, strict=True):
            if max(known.sum(1).max(), unknown.sum(1).max()) > capacity:
                continue
            tokens.append(missing(unknown, capacity))
            for name, order in orders(known, capacity):
                for gap in GAPS:
                    sums[name, gap] = sums.get((name, gap), 0) + count(tokens[-1], order, gap)
            places.append(np.argsort(order))  # the last: as calibrate does
        for (name, gap), (neurons, reads, vain) in sums.items():
            rate = [neurons * s / (reads * READ_S + (neurons + vain) * s / BYTES_PER_S) / 1e9 for s in SIZES]
            each = np.array([neurons, reads]) / len(tokens[0])
            print(f"{share:6.0%}  {name:8}{gap:4}{each[0]:9.1f}{each[1]:8.1f}{neurons / reads:14.3f}{vain / neurons:9.2f}"
                  + "".join(f"{r:13.2f}" for r in rate))  # fmt: skip
    for size in SIZES if args.disk else ():
        before, after = measure(args.disk, size, [layer[:512] for layer in tokens], places)
        print(f"measured, {size >> 10} KiB: {before:.2f} GB/s by ids, {after:.2f} in blocks")


if __name__ == "__main__":
    main()
