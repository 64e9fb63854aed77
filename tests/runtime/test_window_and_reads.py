"""The resident window and the reads it causes, against a model in plain sets and dictionaries; and the arithmetic around them.

The layer under test is put together by hand, below transformers, on a real store with real readers; only the predictor is
scripted.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hf_flash import BudgetError, StoreReadError
from hf_flash.budget.plan import plan_memory
from hf_flash.compute.activation import RELU, Activation
from hf_flash.compute.arithmetic import arithmetic_for, block_rows
from hf_flash.compute.library import library, switched_off
from hf_flash.families.base import Shape
from hf_flash.machine.free_memory import available_memory
from hf_flash.predictors import low_bit as lowbit
from hf_flash.predictors.base import Predictor
from hf_flash.predictors.low_bit import quantize_rows
from hf_flash.predictors.quantized import QuantizedFormat, QuantizedPredictor
from hf_flash.reading.chunks import chunked, torn
from hf_flash.reading.layer_files import PAGE, direct_alignment
from hf_flash.reading.reader import open_reader
from hf_flash.runtime.engine import Engine
from hf_flash.runtime.sites import InlineFFN, LastProjection
from hf_flash.runtime.token_step import MOST_TOKENS
from hf_flash.runtime.window import ResidentWindow
from hf_flash.store.layout import FlashStore
from hf_flash.store.unit import TWO_MATRICES
from hf_flash.store.writer import place_layer, write_layer

D_FF = 160  # three blocks
STAGED = 128  # rows that are converted at a time when the dtypes differ
LAYER = 1


# --- what a window is, in plain Python -----------------------------------------------------------------------------


@dataclass
class PlainWindow:
    """Which neurons are in DRAM, from the rules in the docstrings of `window.py` and `ffn.py`."""

    capacity: int
    window: int
    clock: int = 0
    resident: set[int] = field(default_factory=set)
    last_use: dict[int, int] = field(default_factory=dict)
    score: Counter[int] = field(default_factory=Counter)

    def call(self, uses: list[set[int]], after: set[int], *, predicted: bool) -> list[list[int]]:
        """Take one call, the neurons of each of its tokens, and check what was in DRAM after it; the groups that it reads."""
        for n in self.score:
            self.score[n] *= 0.99 ** len(uses)
        for use in uses:
            self.clock += 1
            self.last_use |= dict.fromkeys(use, self.clock)
            self.score.update(dict.fromkeys(use, 1))
        needed = set().union(*uses)
        few = len(uses) == 1 or (predicted and len(uses) <= MOST_TOKENS)
        fits = len(needed) <= self.capacity and (few or len(needed - self.resident) < block_rows(D_FF, len(uses)))
        groups = (
            [self._fit(needed, after)] if fits else self._stream(needed, len(uses), one_by_one=predicted and len(uses) == 1)
        )
        assert self.resident == after
        return groups

    def _rank(self, n: int) -> tuple[bool, float]:
        """What is evicted first has the lowest."""
        recent = self.last_use[n] > self.clock - self.window
        return recent, self.last_use[n] if recent else self.score[n]

    def _fit(self, needed: set[int], after: set[int]) -> list[int]:
        missing, wanted = sorted(needed - self.resident), self.resident | needed
        evicted, idle = wanted - after, after - needed
        assert needed <= after <= wanted
        assert len(evicted) == max(0, len(wanted) - self.capacity)
        if evicted and idle:
            (recent, worst), (kept_recent, best) = max(map(self._rank, evicted)), min(map(self._rank, idle))
            assert (recent, worst) <= (kept_recent, best * (1 + 1e-9))
        self.resident = after
        return missing

    def _stream(self, needed: set[int], tokens: int, *, one_by_one: bool) -> list[list[int]]:
        step = block_rows(D_FF, tokens if one_by_one else 2)
        order, reads = sorted(needed), []
        for at in range(0, len(order), step) if one_by_one else range(0, D_FF, step):
            block = order[at : at + step] if one_by_one else [n for n in order if at <= n < at + step]
            away = [n for n in block if n not in self.resident]
            reads.append(away)
            if block and self.capacity:
                later = {n for n in self.resident if n > block[-1]}
                judged = (self.resident | set(block)) - later
                best = sorted(judged, key=lambda n: (*(-r for r in self._rank(n)), n not in self.resident, n))
                self.resident = set(best[: self.capacity - len(later)]) | later
        return reads


def runs(ids: list[int]) -> Iterator[tuple[int, int]]:
    """First and last of every stretch of neighbours."""
    start = 0
    for i, number in enumerate(ids):
        if i + 1 == len(ids) or ids[i + 1] != number + 1:
            yield ids[start], number
            start = i + 1


def asked_of_the_disk(groups: list[list[int]], offset: int, size: int, unit: int) -> tuple[int, int]:
    """Bytes, rounded outwards to `unit`, and the number of reads."""
    hulls = [
        -(-(offset + (last + 1) * size) // unit) * unit - (offset + first * size) // unit * unit
        for group in groups
        for first, last in runs(group)
    ]
    return sum(hulls), len(hulls)


# --- the real one --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    d_model: int
    stored: torch.dtype
    dtype: torch.dtype
    placed: bool = False  # whether neurons lie in another order than that of their ids

    @property
    def size(self) -> int:
        return 2 * self.d_model * self.stored.itemsize


FULL, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
LAYOUTS = [
    Layout(512, FULL, FULL),  # a page a bundle
    Layout(64, FULL, FULL),  # a sector a bundle
    Layout(36, FULL, FULL),  # neither
    Layout(27, BRAIN, BRAIN),  # odd
    Layout(64, HALF, FULL),  # converted on the way
    Layout(40, FULL, BRAIN),
    Layout(64, FULL, FULL, placed=True),
    Layout(27, BRAIN, BRAIN, placed=True),
    Layout(64, HALF, FULL, placed=True),
]


def make_store(folder: Path, layout: Layout) -> FlashStore:
    torch.manual_seed(layout.d_model)
    for index in range(2):
        up, down = torch.randn(D_FF, layout.d_model), torch.randn(layout.d_model, D_FF)
        names = f"layers.{index}.fc1.weight", f"layers.{index}.fc2.weight"
        origin = {"source": "test", "revision": "", "fingerprint": "0"}
        up, down = up.to(layout.stored), down.to(layout.stored)
        path, key = folder / f"flash-layer-{index:05d}.safetensors", names[0][:-7] + ".bundles"
        write_layer(path, index, 2, key, TWO_MATRICES, names, (up, down), origin)
    store = FlashStore.open_folder(folder)
    if layout.placed:
        random = np.random.default_rng(0)  # within the first block, as calibration does, and over the other two
        place = np.concatenate([random.permutation(64), 64 + random.permutation(D_FF - 64)])
        place_layer(store.layers[LAYER], place.astype(np.int32))
    return FlashStore.open_folder(folder)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[Layout, FlashStore]:
    return {layout: make_store(tmp_path_factory.mktemp("store"), layout) for layout in LAYOUTS}


class Scripted(Predictor):
    """A predictor that says what it was told to say."""

    nbytes = 0

    def __init__(self) -> None:
        self.next: torch.Tensor | None = None

    def select(self, x: torch.Tensor, allowed: torch.Tensor | None = None) -> torch.Tensor | None:
        assert self.next is None or self.next.shape == (x.shape[0], D_FF)
        return self.next


class Rig:
    """One layer of a store, ready to run."""

    def __init__(self, store: FlashStore, dtype: torch.dtype, reader: str, capacity: int, window: int) -> None:
        self.store, self.dtype = store.layers[LAYER], dtype
        self.unit = PAGE
        if reader == "direct":
            self.unit, reason = direct_alignment(store.layers[0].path)
            if not self.unit:
                pytest.skip(f"no direct reads here: {reason}")
        d_model = self.store.d_model
        relu = Activation("relu", torch.relu, RELU, zeros=True)
        with switched_off() if reader == "python" else nullcontext():  # a machine without io_uring and without a compiler
            arithmetic = arithmetic_for(D_FF, self.store.unit.as_dtype(dtype), relu)
            reader_there = open_reader(store, "mmap" if reader == "mmap" else "direct", 3, dtype, 0)
        reader_there.gap = 0  # counted reads go through no gaps
        self.engine = Engine(reader_there, arithmetic)
        self.window = ResidentWindow(D_FF, arithmetic.matrix(capacity), window)
        self.predictor = Scripted()
        bias = torch.nn.Parameter(torch.linspace(-1, 1, D_FF).to(dtype), requires_grad=False)
        self.ffn = InlineFFN(LAYER, D_FF, d_model, relu, bias, LastProjection(LAYER, d_model, None)).eval()
        self.ffn.attach(self.engine, self.window, self.predictor)
        self.bundles = torch.cat([self.store.part(role)[:] for role in self.store.unit.roles], dim=1)  # by neuron

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *args: object) -> None:
        self.engine.close()

    def call(self, mask: torch.Tensor | None, tokens: int) -> None:
        """Run a call and check its answer."""
        self.predictor.next = mask
        x = torch.randn(tokens, self.store.d_model, generator=torch.Generator().manual_seed(tokens)).to(self.dtype)
        out = self.ffn(x)
        weights = self.bundles.to(self.dtype).double()
        up, down = weights[:, : self.store.d_model], weights[:, self.store.d_model :]
        hidden = (x.double() @ up.T + self.ffn.bias.double()).relu()  # type: ignore[union-attr]
        if mask is not None:
            hidden = hidden * mask
        rounding = {FULL: 1e-4, BRAIN: 3e-2}[self.dtype]
        bound = rounding * ((x.double().abs() @ up.abs().T + 1) @ down.abs()).max() / D_FF**0.5
        torch.testing.assert_close(out.double(), hidden @ down, atol=float(bound), rtol=0.0)

    def resident(self) -> set[int]:
        """The neurons in DRAM, after checking that the window agrees with itself and with the store."""
        w = self.window
        ids = w.resident
        slots = w.slot_of[ids]
        assert len(set(slots.tolist())) == len(ids) == w.capacity - w.free
        assert w.pointer[slots].tolist() == ids.tolist()
        assert int((w.pointer >= 0).sum()) == len(ids)
        assert torch.equal(w.matrix[slots], self.bundles[ids].to(self.dtype))
        return set(ids.tolist())


def some_neurons(kind: str, share: float, tokens: int, seed: int) -> torch.Tensor | None:
    """Masks [tokens, d_ff] of several looks: scattered, in stretches, drifting from token to token, empty, or all."""
    random = np.random.default_rng(seed)
    if kind == "all":
        return None
    if kind == "scattered":
        return torch.from_numpy(random.random((tokens, D_FF)) < share)
    mask = torch.zeros(tokens, D_FF, dtype=torch.bool)
    start = random.integers(0, D_FF)
    for token in range(tokens):
        start = start + 1 if kind == "drifting" else random.integers(0, D_FF)
        if kind != "nobody":
            mask[token, (start + np.arange(int(share * D_FF))) % D_FF] = True
    return mask


KINDS = ("scattered", "stretch", "drifting", "all", "nobody")
a_call = st.tuples(st.sampled_from(KINDS), st.floats(0, 1), st.one_of(st.just(1), st.integers(1, 9)), st.integers(0, 1 << 16))
a_capacity = st.one_of(st.sampled_from([0, 1, D_FF - 1, D_FF]), st.integers(0, D_FF))


@pytest.mark.parametrize("reader", ["mmap", "direct", "python"])
@pytest.mark.parametrize(
    "layout",
    LAYOUTS,
    ids=lambda lay: f"{lay.d_model} {lay.stored} to {lay.dtype}{' placed' * lay.placed}".replace("torch.", ""),
)
@settings(max_examples=15, deadline=None)
@given(capacity=a_capacity, window=st.integers(1, 7), calls=st.lists(a_call, min_size=1, max_size=8))
def test_the_window_holds_what_its_rules_say_and_every_byte_is_counted(
    stores: dict[Layout, FlashStore],
    layout: Layout,
    reader: str,
    capacity: int,
    window: int,
    calls: list[tuple[str, float, int, int]],
) -> None:
    plain = PlainWindow(capacity, window)
    with Rig(stores[layout], layout.dtype, reader, capacity, window) as rig:
        missing = asked = reads = selected = total = 0
        for kind, share, tokens, seed in calls:
            mask = some_neurons(kind, share, tokens, seed)
            uses = [set(range(D_FF))] * tokens if mask is None else [set(row.nonzero()[:, 0].tolist()) for row in mask]
            rig.call(mask, tokens)

            groups = plain.call(uses, rig.resident(), predicted=mask is not None)
            if layout.stored != layout.dtype:
                groups = [group[at : at + STAGED] for group in groups for at in range(0, len(group), STAGED)]
            if rig.store.place is not None:
                groups = [sorted(rig.store.place[group].tolist()) for group in groups]
            nbytes, count = asked_of_the_disk(groups, rig.store.offset, layout.size, rig.unit)
            asked, reads, total = asked + nbytes, reads + count, total + tokens
            missing += sum(map(len, groups))
            selected += len(set().union(*uses))
        counters = rig.engine.counters
        assert (counters.calls, counters.tokens, counters.selected) == (len(calls), total, selected)
        assert counters.hits == selected - missing
        assert counters.missing_bytes == missing * layout.size
        assert (counters.read_bytes, counters.reads) == (asked, reads)
        if reader != "mmap" and layout.size % rig.unit == 0:
            assert counters.read_bytes == counters.missing_bytes


@pytest.mark.parametrize("reader", ["mmap", "direct"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda lay: f"{lay.stored} {lay.dtype}{' placed' * lay.placed}")
def test_reading_through_gaps_changes_reads_and_no_bit(stores: dict[Layout, FlashStore], layout: Layout, reader: str) -> None:
    found = []
    for gap in (0, 2):
        with Rig(stores[layout], layout.dtype, reader, 40, 5) as rig:
            rig.engine.reader.gap = gap
            for seed in range(3):
                rig.call(some_neurons("scattered", 0.3, 6, seed), 6)
            resident, answer = rig.resident(), rig.ffn(torch.ones(6, layout.d_model, dtype=layout.dtype))
            found.append((answer, resident, rig.engine.counters))
    (skipped, before, some), (through, after, more) = found
    assert torch.equal(skipped, through)
    assert before == after
    assert (some.hits, some.missing_bytes) == (more.hits, more.missing_bytes)
    assert some.reads > more.reads


@pytest.mark.parametrize("reader", ["mmap", "direct", "python"])
@pytest.mark.parametrize("when", ["started", "waited for"])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_block_that_cannot_be_read_leaves_the_layer_usable(
    stores: dict[Layout, FlashStore], reader: str, when: str, which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Rig(stores[LAYOUTS[1]], FULL, reader, 40, 5) as rig:
        source, calls = rig.engine.reader.source, itertools.count()
        real = source.start

        def failing(*args: Any, **kwargs: Any) -> Any:
            if next(calls) != which:
                return real(*args, **kwargs)
            if when == "started":
                raise OSError(5, "Input/output error")
            real(*args, **kwargs)
            return Mock(wait=Mock(side_effect=OSError(5, "Input/output error")))

        monkeypatch.setattr(source, "start", failing)
        with pytest.raises(StoreReadError, match="Input/output error"):
            rig.call(None, 6)
        rig.resident()
        rig.call(None, 6)
        rig.call(some_neurons("scattered", 0.3, 6, 0), 6)
        rig.resident()


@settings(max_examples=100, deadline=None)
@given(
    ids=st.sets(st.integers(0, 63), min_size=1), block=st.integers(0, D_FF // 64 - 1), gap=st.integers(0, 70),
    placed=st.booleans(),
)  # fmt: skip
def test_only_small_gaps_are_bridged_and_no_others(
    stores: dict[Layout, FlashStore], ids: set[int], block: int, gap: int, placed: bool
) -> None:
    layout = next(layout for layout in LAYOUTS if layout.placed == placed)
    with Rig(stores[layout], layout.dtype, "mmap", 0, 1) as rig:
        rig.engine.reader.gap = gap
        first = 64 * block
        wanted = np.sort(np.array(list(ids), dtype=np.int64)) + first
        found = rig.engine.reader.through_gaps(LAYER, wanted, first, first + 64, rig.engine.arithmetic.rows)
    place = rig.store.place if rig.store.place is not None else np.arange(D_FF)
    at, read = sorted(place[wanted].tolist()), sorted(place[found].tolist())
    inside = set(range(first, first + 64)) >= set(place[first : first + 64].tolist())
    expected = set(at)
    for left, right in itertools.pairwise(at):
        if inside and right - left - 1 <= gap:
            expected |= set(range(left, right))
    assert read == sorted(expected)
    assert found.tolist() == sorted(found.tolist())


def test_a_window_that_holds_everything_reads_everything_once(stores: dict[Layout, FlashStore]) -> None:
    with Rig(stores[LAYOUTS[1]], FULL, "mmap", D_FF, 5) as rig:
        for _ in range(6):
            rig.call(None, 1)
        assert rig.engine.counters.missing_bytes == rig.store.nbytes
        assert rig.engine.counters.hits == 5 * D_FF


def test_a_window_without_room_keeps_nothing(stores: dict[Layout, FlashStore]) -> None:
    with Rig(stores[LAYOUTS[1]], FULL, "mmap", 0, 5) as rig:
        for _ in range(3):
            rig.call(None, 1)
        assert rig.resident() == set()
        assert rig.engine.counters.missing_bytes == 3 * rig.store.nbytes


# --- a disk that does not deliver ----------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [0, 40, D_FF], ids=["nothing fits", "some fit", "all fit"])
@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[2], LAYOUTS[4]], ids=["aligned", "not aligned", "converted"])
def test_a_failed_read_is_an_error_and_leaves_the_window_usable(tmp_path: Path, layout: Layout, capacity: int) -> None:
    store = make_store(tmp_path, layout)
    path, whole = store.layers[LAYER].path, store.layers[LAYER].path.read_bytes()
    low, everything = torch.zeros(1, D_FF, dtype=torch.bool), torch.ones(1, D_FF, dtype=torch.bool)
    low[0, :30] = True
    with Rig(store, layout.dtype, "direct", capacity, 5) as rig:
        rig.call(low, 1)
        with open(path, "r+b") as file:
            file.truncate(len(whole) - D_FF // 2 * layout.size)
        for mask in (everything, everything):
            with pytest.raises(StoreReadError, match="reading neurons from flash failed") as caught:
                rig.call(mask, 1)
            for part in (str(path), "expected", f"bundles of {layout.size} bytes", "got", "to do"):
                assert part in str(caught.value)
            assert rig.resident() <= set(range(D_FF // 2))
        if capacity == 0:
            with pytest.raises(StoreReadError, match="changed since the model was loaded"):
                rig.call(low, 1)  # what is still there may be of another file
        else:
            rig.call(low, 1)
        with open(path, "r+b") as file:
            file.write(whole)
        for mask in (everything, low, everything):
            rig.call(mask, 1)
            assert len(rig.resident()) <= capacity


# --- reading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", ["mmap", "direct", "python"])
@pytest.mark.parametrize(
    "layout",
    [Layout(512, FULL, FULL), Layout(64, FULL, FULL), Layout(64, HALF, FULL), Layout(40, FULL, BRAIN), Layout(36, FULL, FULL)],
)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_rows_arrive_where_they_were_asked_for_exactly_converted(
    stores: dict[Layout, FlashStore], layout: Layout, reader: str, data: st.DataObject
) -> None:
    ids = sorted(data.draw(st.sets(st.integers(0, D_FF - 1))))
    gaps = data.draw(st.lists(st.sampled_from([1, 1, 1, 2, 5]), min_size=len(ids), max_size=len(ids)))
    rows = np.cumsum([0, *gaps])[: len(ids)]
    with Rig(stores[layout], layout.dtype, reader, 0, 1) as rig:
        out = torch.full((5 * D_FF, 2 * layout.d_model), 7.0, dtype=layout.dtype)
        rig.engine.reader.start(LAYER, np.array(ids, dtype=np.int64), out, rows).wait()
        wanted = torch.full_like(out, 7.0)
        wanted[rows] = rig.bundles[ids].to(layout.dtype)
        assert torch.equal(out, wanted)


MEBIBYTE = 1 << 20


@settings(max_examples=300, deadline=None)
@given(
    ids=st.sets(st.integers(0, 60)).map(sorted),
    shuffle=st.randoms(use_true_random=False),
    size=st.sampled_from([96, 4096, 100_000, 400_000, MEBIBYTE, MEBIBYTE + 8, 3 * MEBIBYTE]),
    offset=st.sampled_from([0, 4096, 8192]),
)
def test_chunks_cover_exactly_what_was_asked_for(ids: list[int], shuffle: Random, size: int, offset: int) -> None:
    rows = list(range(3, 3 + 2 * len(ids)))
    shuffle.shuffle(rows)
    rows = rows[: len(ids)]
    chunks = chunked(np.array(ids, dtype=np.int64), np.array(rows, dtype=np.int64), offset, size)
    placed = [(at, [row for part in parts for row in range(part.start, part.stop)]) for at, parts in chunks.pieces()]
    found = [(at + i * size, row) for at, into in placed for i, row in enumerate(into)]
    assert found == [(offset + i * size, row) for i, row in zip(ids, rows, strict=True)]
    ends = (chunks.offset + chunks.nbytes).tolist()
    assert all(0 < n <= max(MEBIBYTE, size) for n in chunks.nbytes.tolist())
    for end, start, nbytes in zip(ends, chunks.offset.tolist()[1:], chunks.nbytes.tolist(), strict=False):
        assert end <= start
        assert end < start or nbytes + size > MEBIBYTE  # no chunk could be longer


@pytest.mark.parametrize(("size", "pieces"), [(96, 1), (96, 2), (96, 3), (100, 3)])
def test_a_bundle_is_torn_into_equal_pieces_or_not_at_all(size: int, pieces: int) -> None:
    ids, rows = np.array([2, 3]), np.array([7, 0])
    if size % pieces:
        with pytest.raises(ValueError, match="100 bytes in 3 pieces"):
            torn(ids, rows, 4096, size, pieces)
        return
    chunks = torn(ids, rows, 4096, size, pieces)
    assert chunks.offset.tolist() == [4096 + 2 * size + at for at in range(0, 2 * size, size // pieces)]
    assert chunks.rows.tolist() == [row * pieces + part for row in (7, 0) for part in range(pieces)]
    assert chunks.nbytes.sum() == 2 * size


# --- the quantized predictor ---------------------------------------------------------------------------------------

FORMATS = [QuantizedFormat(4, 64), QuantizedFormat(4, 32), QuantizedFormat(4, 7), QuantizedFormat(8, 64)]


def dequantized(parts: dict[str, torch.Tensor], fmt: QuantizedFormat) -> torch.Tensor:
    """Back to numbers, from what the docstrings say about the codes."""
    if fmt.bits == 8:
        return parts["codes"].double() * parts["scales"].double()
    codes = parts["codes"].long()
    rows, half = codes.shape
    values = torch.empty(rows, 2 * half, dtype=torch.float64)
    values[:, 0::2], values[:, 1::2] = (codes % 16).double() - 8, (codes // 16).double() - 8
    width = 2 * half // parts["scales"].shape[1]
    scales, zeros = (parts[name].double().repeat_interleave(width, 1) for name in ("scales", "zeros"))
    return values * scales + zeros


@settings(max_examples=60, deadline=None)
@given(
    fmt=st.sampled_from(FORMATS),
    d_model=st.sampled_from([2, 36, 64, 96, 128]),
    size=st.sampled_from([1e-6, 0.02, 1.0, 3e3]),
    dtype=st.sampled_from([FULL, HALF, BRAIN]),
    seed=st.integers(0, 1 << 16),
)
def test_the_stored_error_is_the_norm_of_what_rounding_changed(
    fmt: QuantizedFormat, d_model: int, size: float, dtype: torch.dtype, seed: int
) -> None:
    up = (size * torch.randn(6, d_model, generator=torch.Generator().manual_seed(seed))).to(dtype)
    up[0], up[1] = 0.0, size  # constant rows have no range
    parts = quantize_rows(up, fmt.bits, fmt.group(up.shape[1]))
    for name, (kind, shape) in fmt.shapes("", 6, d_model).items():
        assert (parts[name.rpartition(".")[2]].dtype, tuple(parts[name.rpartition(".")[2]].shape)) == (kind, shape)
    wanted = (dequantized(parts, fmt) - up.double()).norm(dim=1)
    torch.testing.assert_close(parts["error"].double(), wanted, rtol=1e-3, atol=1e-6 * size * d_model**0.5)
    assert (wanted <= 0.3 * size * d_model**0.5 * (1 if fmt.bits == 4 else 0.2) + 1e-6).all()


WAYS = ["compiled", "packed", "plain"]


def make(fmt: QuantizedFormat, up: torch.Tensor, bias: torch.Tensor | None, way: str = "compiled") -> QuantizedPredictor:
    """A predictor with a margin of 1.5; as on a machine without the compiled part, or without torch's packed layout either."""
    parts = quantize_rows(up, fmt.bits, fmt.group(up.shape[1]))
    with pytest.MonkeyPatch.context() as patch, nullcontext() if way == "compiled" else switched_off():
        if way == "plain":
            patch.setattr(lowbit, "_works", lambda call: False)
        return QuantizedPredictor(parts, bias, fmt, parts["error"] * (1.5 / up.shape[1] ** 0.5))


@pytest.mark.parametrize("fmt", FORMATS[:2] + FORMATS[3:], ids=lambda fmt: fmt.variant)
@settings(max_examples=15, deadline=None)
@given(tokens=st.integers(1, 5), seed=st.integers(0, 1 << 16))
def test_the_fast_path_scores_as_the_plain_one_up_to_rounding(fmt: QuantizedFormat, tokens: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    up, x = torch.randn(96, 128, generator=random), torch.randn(tokens, 128, generator=random).bfloat16()
    bias = torch.randn(96, generator=random)
    parts = quantize_rows(up, fmt.bits, fmt.group(up.shape[1]))
    ways = {way: make(fmt, up, bias, way) for way in WAYS}
    if library() is None or not ways["packed"]._scores.matrix.packed:
        pytest.skip("no compiler, or torch has no packed layout on this machine")
    assert ways["compiled"]._scores.matrix.compiled
    assert not ways["packed"]._scores.matrix.compiled
    assert not ways["plain"]._scores.matrix.packed
    weights = dequantized(parts, fmt)
    exact = x.double() @ weights.T
    rounding = 2**-7 * (x.double().abs() @ weights.abs().T)
    group = fmt.group(up.shape[1])
    steps = x.double().abs().view(tokens, -1, group).amax(2) / (127 if fmt.bits == 4 else 32767)
    half_steps = steps / 2 @ weights.abs().view(len(up), -1, group).sum(2).T  # what x in multiples of a step may lose
    for way, most in zip(WAYS, (half_steps + 1e-3 * rounding, rounding, 1e-3 * rounding), strict=True):
        assert ((ways[way]._scores.matrix(x) - exact).abs() <= most).all()
    slack = 1.5 / 128**0.5 * x.double().norm(dim=1, keepdim=True) * parts["error"].double()
    clear = (exact + bias.double() + slack).abs() > rounding
    assert clear.float().mean() > 0.8
    wanted = exact + bias.double() + slack > 0
    for predictor in ways.values():
        assert torch.equal(predictor.select(x)[clear], wanted[clear])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: f"{fmt.variant}, {fmt.group_size}")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_a_number_selects_every_neuron_of_its_token_alone(
    way: str, fmt: QuantizedFormat, value: float
) -> None:
    torch.manual_seed(0)
    predictor = make(fmt, torch.randn(64, 64), torch.full((64,), -50.0), way)
    x = torch.randn(3, 64)
    x[1, 5] = value
    assert predictor.select(x).all(1).tolist() == [False, True, False]
    assert not predictor.select(x)[[0, 2]].any()


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: f"{fmt.variant}, {fmt.group_size}")
def test_a_predictor_holds_what_its_format_announces(fmt: QuantizedFormat) -> None:
    for way in WAYS:
        assert make(fmt, torch.randn(64, 64), None, way).nbytes == fmt.dram_bytes(Shape(64, (64,), 4, 4, 16))


# --- bytes ---------------------------------------------------------------------------------------------------------

a_size = st.integers(0, 1 << 36)


@given(
    budget=st.integers(1, 1 << 38),
    resident=a_size,
    predictor=a_size,
    scratch=a_size,
    layers=st.integers(1, 96),
    d_ff=st.integers(1, 1 << 16),
    bundle=st.integers(1, 1 << 17),
)
def test_a_plan_never_exceeds_its_budget_and_wastes_none(
    budget: int, resident: int, predictor: int, scratch: int, layers: int, d_ff: int, bundle: int
) -> None:
    parts = {"resident_bytes": resident, "predictor_bytes": predictor, "scratch_bytes": scratch}
    shape = {"widths": (d_ff,) * layers, "bundle_bytes": bundle}
    minimum = resident + predictor + scratch
    if budget < minimum:
        with pytest.raises(BudgetError, match=str(minimum)) as caught:
            plan_memory(budget, **parts, **shape)
        assert caught.value.minimum_bytes == minimum
        assume(minimum > 0)
        budget = minimum
    plan = plan_memory(budget, **parts, **shape)
    assert plan.minimum_bytes == minimum
    assert 0 <= plan.capacity <= d_ff
    assert minimum + plan.window_bytes <= budget
    assert plan.capacity == d_ff or minimum + plan.window_bytes + layers * bundle > budget
    assert plan.dense_bytes == resident + layers * d_ff * bundle


@given(free=st.integers(0, 1 << 34))
def test_an_unset_budget_stays_below_what_is_free(free: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_flash.budget.ceilings.available_memory", lambda: free)
        plan = plan_memory(None, resident_bytes=0, predictor_bytes=0, scratch_bytes=0, widths=(8, 8), bundle_bytes=64)
    assert plan.window_bytes <= plan.budget_bytes <= free


@pytest.mark.parametrize(("limits", "wanted"), [([], 10), ([7, 4], 4), ([20], 10), ([-5], 0)])
def test_the_tightest_limit_counts_and_is_never_negative(
    monkeypatch: pytest.MonkeyPatch, limits: list[int], wanted: int
) -> None:
    monkeypatch.setattr("hf_flash.machine.free_memory.psutil.virtual_memory", lambda: type("Memory", (), {"available": 10})())
    monkeypatch.setattr("hf_flash.machine.free_memory.memory_left", lambda: iter(limits))
    assert available_memory() == wanted
