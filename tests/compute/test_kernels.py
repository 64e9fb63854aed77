"""The compiled part against the same arithmetic in torch: every dtype, odd shapes, every number of threads."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_flash.compute import arithmetic as compute
from hf_flash.compute import kernels, library
from hf_flash.compute.activation import RELU, Activation, activation_named
from hf_flash.compute.arithmetic import Arithmetic, CompiledArithmetic, arithmetic_for
from hf_flash.compute.library import ABI
from hf_flash.predictors.low_bit import Int8Matrix, Scores, widen
from hf_flash.store.unit import TWO_MATRICES, Part, UnitLayout

ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
GATED = (Part("gate", "row"), *TWO_MATRICES)
KNOWN = (  # activations that the compiled part knows
    *(activation_named(name) for name in ("relu", "relu2", "relu6")), activation_named("fatrelu", level=2.0),
    replace(activation_named("relu"), of_both=True), replace(activation_named("fatrelu", level=0.3), of_both=True),
)  # fmt: skip
needs_library = pytest.mark.skipif(library.library() is None, reason="no compiled part here")


def test_the_compiled_part_is_built_where_tests_run() -> None:
    if sys.platform != "linux" or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("it is for Linux on x86-64 with AVX2")
    found = library.library()
    assert found is not None
    assert found.hf_abi() == ABI


def made(d_ff: int, d: int, dtype: torch.dtype, function: Any = torch.relu) -> Arithmetic:
    """The arithmetic that a model of this shape gets."""
    relu = function is torch.relu or isinstance(function, torch.nn.ReLU)
    unit = UnitLayout.of(TWO_MATRICES, d, dtype)
    return arithmetic_for(d_ff, unit, Activation("some", function, RELU if relu else None, zeros=relu))


def run(dtype: torch.dtype, n: int, d: int, seed: int, parts: int, activation: torch.nn.Module) -> tuple[torch.Tensor, ...]:
    """One token through the compiled part, some neurons first, and the same in float64."""
    random = torch.Generator().manual_seed(seed)
    matrix = torch.randn(n + 7, 2 * d, generator=random).to(dtype) * 0.2
    x, bias = torch.randn(1, d, generator=random).to(dtype), torch.randn(3 * n, generator=random).to(dtype)
    rows = torch.randperm(n + 7, generator=random)[:n].numpy()
    ids = np.sort(torch.randperm(3 * n, generator=random)[:n].numpy())
    arithmetic = made(max(64, 2 * n), d, dtype, activation)
    assert isinstance(arithmetic, CompiledArithmetic)
    token = arithmetic.one_token(x, {"up": bias}, matrix, rows, ids, one_block=True)
    if parts == 2:
        token.multiply_present(np.arange(0, n, 2), np.arange(1, n, 2))
    out = torch.ones(1, d)
    token.finish(out)
    up, down = matrix[rows, :d].double(), matrix[rows, d:].double()
    hidden = activation((x.double() @ up.T + bias.double()[ids]).to(dtype)).double()
    return out, 1 + hidden @ down, hidden.abs() @ down.abs()


@needs_library
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 60), d=st.integers(1, 140), seed=st.integers(0, 999), parts=st.integers(1, 2), relu=st.booleans())
def test_one_token_is_computed_as_in_float64_up_to_rounding(
    dtype: torch.dtype, n: int, d: int, seed: int, parts: int, relu: bool
) -> None:
    activation = torch.nn.ReLU() if relu else torch.nn.GELU()
    out, exact, size = run(dtype, n, d, seed, parts, activation)
    # a hidden value may be rounded to its neighbour, where sums in another order differ
    assert ((out - exact).abs() <= ROUNDING[dtype] * (size + 1)).all()


@needs_library
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
def test_threads_and_order_change_no_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = run(dtype, 100, 96, 5, 1, torch.nn.ReLU())[0]
    for count in (1, 2, 3):
        monkeypatch.setattr(library, "threads", lambda count=count: count)
        for parts in (1, 2):
            assert torch.equal(run(dtype, 100, 96, 5, parts, torch.nn.ReLU())[0], wanted)


@needs_library
@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(list(ROUNDING)), d=st.integers(1, 200), d_ff=st.integers(1, 70), tokens=st.integers(1, 40),
    share=st.floats(0, 1), bias=st.booleans(), threads=st.integers(1, 3), blocks=st.integers(1, 3),
    at_a_time=st.integers(1, 50), seed=st.integers(0, 999), activation=st.sampled_from(KNOWN),
    parts=st.sampled_from([TWO_MATRICES, GATED]),
)  # fmt: skip
@example(
    torch.bfloat16, 150, 700, 300, 0.1, True, 2, 2, 1000, 0, KNOWN[0], TWO_MATRICES
)  # groups of tokens, shares of neurons,
@example(torch.bfloat16, 150, 700, 300, 0.1, True, 2, 2, 1000, 0, KNOWN[0], GATED)  # tiles of columns
def test_several_tokens_get_the_bits_that_each_gets_alone(
    dtype: torch.dtype,
    d: int,
    d_ff: int,
    tokens: int,
    share: float,
    bias: bool,
    threads: int,
    blocks: int,
    at_a_time: int,
    seed: int,
    activation: Activation,
    parts: tuple[Part, ...],
) -> None:
    random = torch.Generator().manual_seed(seed)
    matrix = torch.randn(d_ff + 3, len(parts) * d, generator=random).to(dtype)
    x = torch.randn(tokens, d, generator=random).to(dtype)
    roles = ("gate", "up") if len(parts) > 2 else ("up",)
    b: Any = {role: torch.randn(d_ff, generator=random).to(dtype) if bias else None for role in roles}
    rows = torch.randperm(d_ff + 3, generator=random)[:d_ff].numpy()
    used = torch.rand(tokens, d_ff, generator=random) < share
    alone = torch.zeros(tokens, d)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "threads", lambda: threads)
        patch.setattr(kernels, "_TOKENS", at_a_time)
        unit = UnitLayout.of(parts, d, dtype)
        kernel = kernels.TokenKernel(d_ff, unit, activation)
        for token in range(tokens):
            ids = used[token].nonzero()[:, 0].numpy()
            kernel.set(x[token : token + 1], b, matrix, rows[ids], ids)
            kernel.up()
            kernel.down(alone[token : token + 1])
        for avx512, together in ((True, torch.zeros(tokens, d)), (False, torch.zeros(tokens, d))):
            several = kernels.TokensKernel(unit, tokens, d_ff, avx512=avx512)
            for part in np.array_split(np.flatnonzero(used.any(0).numpy()), blocks):
                places = kernels.addresses(matrix, rows[part])
                assert several.down(several.hidden(x, used, b, places, part, activation), places, together) is None
            assert torch.equal(together, alone)


@needs_library
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("activation", KNOWN, ids=lambda activation: f"{activation.name}{'+' * activation.of_both}")
@given(
    parts=st.sampled_from([TWO_MATRICES, GATED]), n=st.integers(1, 40), d=st.integers(1, 30), bias=st.booleans(),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_activations_that_it_knows_are_torchs(
    dtype: torch.dtype, activation: Activation, parts: tuple[Part, ...], n: int, d: int, bias: bool, seed: int
) -> None:
    """With whole numbers, whose sums are exact in any order."""
    random = torch.Generator().manual_seed(seed)
    of_role: Any = {part.role: torch.randint(-1, 2, (n, d), generator=random).to(dtype) for part in parts}
    biases: Any = {role: torch.randint(-2, 3, (n,), generator=random).to(dtype) if bias else None for role in of_role}
    x, ids = torch.randint(-1, 2, (3, d), generator=random).to(dtype), np.arange(n)
    unit = UnitLayout.of(parts, d, dtype)
    matrix = torch.cat([of_role[role] for role in unit.roles], dim=1)
    products = [torch.nn.functional.linear(x, of_role[role], biases[role]) for role in unit.roles[:-1]]
    wanted = activation.hidden(*products).float() @ of_role["down"].float()
    arithmetic = arithmetic_for(64, unit, activation)
    assert isinstance(arithmetic, CompiledArithmetic)
    assert arithmetic.step_kernel is not None
    for token in range(3):
        out = torch.zeros(1, d)
        arithmetic.one_token(x[token : token + 1], biases, matrix, ids, ids, one_block=True).finish(out)
        assert torch.equal(out[0], wanted[token])
    for selected in (torch.ones(3, n, dtype=torch.bool), None):
        out = torch.zeros(3, d)
        arithmetic.several_tokens(x, selected, n, biases).add(matrix, ids, ids, out)
        assert torch.equal(out, wanted)


@dataclass(frozen=True)
class LooseLayout:
    """Rows of units with room before, between and behind their parts."""

    roles: tuple[str, ...]
    gaps: tuple[int, int, int]
    width: int
    dtype: torch.dtype
    deciding = "up"

    @property
    def numbers(self) -> int:
        return sum(self.gaps) + 2 * self.width

    @property
    def row_bytes(self) -> int:
        return self.numbers * self.dtype.itemsize

    def start(self, role: str) -> int:
        at = self.roles.index(role)
        return sum(self.gaps[: at + 1]) + at * self.width

    def offset(self, role: str) -> int:
        return self.start(role) * self.dtype.itemsize

    def rows_of(self, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        matrix = torch.full((len(up), self.numbers), float("nan"), dtype=self.dtype)
        for role, part in (("up", up), ("down", down)):
            matrix[:, self.start(role) : self.start(role) + self.width] = part
        return matrix


@needs_library
@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(list(ROUNDING)), d=st.integers(1, 200), d_ff=st.integers(1, 40), tokens=st.integers(1, 9),
    roles=st.permutations(["up", "down"]).map(tuple), gaps=st.tuples(*3 * [st.integers(0, 40)]), threads=st.integers(1, 2),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_where_the_parts_lie_in_a_row_changes_no_bit(
    dtype: torch.dtype,
    d: int,
    d_ff: int,
    tokens: int,
    roles: tuple[str, ...],
    gaps: tuple[int, int, int],
    threads: int,
    seed: int,
) -> None:
    random = torch.Generator().manual_seed(seed)
    up, down = (torch.randn(d_ff, d, generator=random).to(dtype) for _ in range(2))
    x, used = torch.randn(tokens, d, generator=random).to(dtype), torch.rand(tokens, d_ff, generator=random) < 0.7
    rows, found = np.arange(d_ff), []
    loose, relu = LooseLayout(roles, gaps, d, dtype), activation_named("relu")
    assert kernels.supports(loose) is (roles == ("up", "down"))  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "threads", lambda: threads)
        tight: Any = UnitLayout.of(TWO_MATRICES, d, dtype)
        for layout, matrix in ((tight, torch.cat([up, down], dim=1)), (loose, loose.rows_of(up, down))):
            kernel, alone = kernels.TokenKernel(d_ff, layout, relu), torch.zeros(1, d)
            kernel.set(x[:1], {"up": None}, matrix, rows, rows)
            kernel.up()
            kernel.down(alone)
            together = torch.zeros(tokens, d)
            several, places = kernels.TokensKernel(layout, tokens, d_ff), kernels.addresses(matrix, rows)
            several.down(several.hidden(x, used, {"up": None}, places, rows, relu), places, together)
            found.append(torch.cat([alone, together]))
    assert found[0].isfinite().all()
    assert torch.equal(*found)


def test_it_says_which_units_it_knows() -> None:
    for dtype in ROUNDING:
        assert kernels.supports(UnitLayout.of(TWO_MATRICES, 64, dtype))
        assert kernels.supports(UnitLayout.of(GATED, 64, dtype))
        assert not kernels.supports(UnitLayout.of(GATED[1:] + GATED[:1], 64, dtype))
        assert not kernels.supports(UnitLayout.of(TWO_MATRICES[::-1], 64, dtype))


@needs_library
def test_it_can_be_switched_off_for_what_is_made_meanwhile() -> None:
    matrix, rows, out = torch.ones(4, 64), np.arange(4), torch.zeros(1, 32)
    before = made(64, 32, torch.float32)
    with library.switched_off():
        assert library.library() is None
        with library.switched_off():
            assert library.try_ring() != 0
        assert library.library() is None
        copied = torch.zeros_like(matrix)
        before.copy_rows(matrix, rows, copied, rows)
        assert torch.equal(copied, matrix)
        codes = torch.ones(9, 32, dtype=torch.int8)
        assert Int8Matrix(codes, torch.ones(9, 1).bfloat16()).compiled is None
        for arithmetic in (before, made(64, 32, torch.float32)):
            assert isinstance(arithmetic, CompiledArithmetic) is (arithmetic is before)
            arithmetic.one_token(torch.ones(1, 32), {"up": None}, matrix, rows, rows, one_block=True).finish(out)
    assert library.library() is library.loaded() is not None
    assert out.tolist() == [[2 * 4 * 32.0] * 32]


@needs_library
def test_it_is_on_again_when_the_last_thread_has_left() -> None:
    entered, leave = Event(), Event()

    def stay_inside() -> bool:
        with library.switched_off():
            entered.set()
            return leave.wait(60) and library.library() is None

    with ThreadPoolExecutor(1) as pool:
        inside = pool.submit(stay_inside)
        assert entered.wait(60)
        with library.switched_off():
            pass
        assert library.library() is None
        leave.set()
        assert inside.result()
    assert library.library() is not None


@needs_library
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@settings(max_examples=40, deadline=None)
@given(n=st.integers(0, 200), width=st.sampled_from([1, 7, 64, 2000]), seed=st.integers(0, 999), threads=st.integers(1, 3))
def test_rows_are_copied_whole_and_nothing_else(dtype: torch.dtype, n: int, width: int, seed: int, threads: int) -> None:
    random = torch.Generator().manual_seed(seed)
    source, target = (torch.randn(rows, width, generator=random).to(dtype) for rows in (n + 1, n + 9))
    those, places = (torch.randperm(len(part), generator=random)[:n].numpy() for part in (source, target))
    wanted = target.clone()
    wanted[places] = source[those]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "threads", lambda: threads)
        patch.setattr(kernels, "_WORTH_COPYING", 1)
        kernels.copy_rows(source, those, target, places)
    assert torch.equal(target, wanted)


@needs_library
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@given(
    n=st.integers(1, 99), rows=st.integers(0, 20), first=st.integers(0, 30), wide=st.integers(1, 30), seed=st.integers(0, 99)
)
def test_some_columns_are_copied_and_no_others(dtype: torch.dtype, n: int, rows: int, first: int, wide: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    source, target = (torch.randn(n + 20, 64, generator=random).to(dtype) for _ in range(2))
    those, places = (torch.randperm(n + 20, generator=random)[:rows].numpy() for _ in range(2))
    for way in (Arithmetic, CompiledArithmetic):
        columns, copied, wanted = slice(first, first + wide), target.clone(), target.clone()
        wanted[places, columns] = source[those, columns]
        way(128, UnitLayout.of(TWO_MATRICES, 32, dtype), activation_named("relu")).copy_rows(
            source, those, copied, places, columns
        )
        assert torch.equal(copied, wanted)


@needs_library
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@given(tokens=st.integers(1, 70), n=st.integers(1, 70), share=st.sampled_from([0.0, 0.05, 0.5, 1.0]), seed=st.integers(0, 99))
def test_uses_are_counted_as_torch_counts_them(dtype: torch.dtype, tokens: int, n: int, share: float, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    before = torch.randn(tokens, n, generator=random).abs().neg().to(dtype)
    before[torch.rand(tokens, n, generator=random) < share] *= -1
    before[0, 0] = 0.0
    unit, relu = UnitLayout.of(TWO_MATRICES, 32, dtype), activation_named("relu")
    found, wanted = (way(128, unit, relu).count_uses(before) for way in (CompiledArithmetic, Arithmetic))
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.dtype == theirs.dtype == np.int64
        assert (mine == theirs).all()


@needs_library
def test_what_is_not_a_number_stays_so() -> None:
    matrix, bias = torch.ones(4, 64), torch.zeros(4)
    x = torch.ones(1, 32)
    x[0, 3] = float("nan")
    out = torch.zeros(1, 32)
    rows = np.arange(4)
    made(64, 32, torch.float32).one_token(x, {"up": bias}, matrix, rows, rows, one_block=True).finish(out)
    assert out.isnan().all()


def test_block_sizes_follow_from_the_shape_alone() -> None:
    assert compute.block_rows(64, 1) == 64


@needs_library
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 90), columns=st.integers(1, 100) | st.integers(500, 520), tokens=st.integers(1, 9),
    threads=st.integers(1, 3), seed=st.integers(0, 999),
)  # fmt: skip
def test_a_token_is_multiplied_alike_whoever_is_beside_it(
    rows: int, columns: int, tokens: int, threads: int, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (rows, columns), generator=random, dtype=torch.int8)
    scales, plus = torch.rand(rows, generator=random).bfloat16(), torch.randn(rows, generator=random)
    x = torch.randn(tokens, columns, generator=random).bfloat16()
    found = multiplied_alike(x, codes, scales, None, plus, threads)
    exact = x.double() @ (codes.double() * scales.double()[:, None]).T + plus
    size = x.double().abs() @ (codes.double().abs() * scales.double()[:, None]).T
    assert ((found - exact).abs() <= 1e-4 * (size + x.double().abs().amax(1, keepdim=True) * 127 + 1)).all()


@needs_library
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 90), groups=st.integers(1, 5), group=st.sampled_from([32, 64, 96]), tokens=st.integers(1, 9),
    threads=st.integers(1, 3), seed=st.integers(0, 999),
)  # fmt: skip
def test_so_it_is_in_4_bits(rows: int, groups: int, group: int, tokens: int, threads: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (rows, groups * group // 2), generator=random, dtype=torch.uint8)
    scales, zeros = (torch.randn(rows, groups, generator=random).bfloat16() for _ in range(2))
    x, plus = torch.randn(tokens, groups * group, generator=random).bfloat16(), torch.randn(rows, generator=random)
    found, weights = multiplied_alike(x, codes, scales, zeros, plus, threads), widen(codes, scales, zeros).double()
    steps = x.double().abs().view(tokens, groups, group).amax(2) / 127  # of x
    rounding = steps / 2 @ weights.abs().view(rows, groups, group).sum(2).T
    size = x.double().abs() @ weights.abs().T + plus.abs()
    assert ((found - (x.double() @ weights.T + plus)).abs() <= rounding + 1e-4 * (size + 1)).all()


def multiplied_alike(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, plus: torch.Tensor, threads: int
) -> torch.Tensor:
    """What a quantized matrix makes of tokens: the same bits alone and beside others, with VNNI and without."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "threads", lambda: threads)
        product, without = (kernels.Product(codes, scales, zeros, vnni=vnni) for vnni in (True, False))
        found = product(x, plus)
        assert torch.equal(without(x, plus), found)
        for token in range(len(x)):
            assert torch.equal(product(x[token : token + 1], plus)[0], found[token])
    return found


@needs_library
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 90), rank=st.integers(1, 40), tokens=st.integers(1, 3), seed=st.integers(0, 999),
    bias=st.sampled_from([None, *ROUNDING]), repeated=st.booleans(), threads=st.integers(1, 3),
)  # fmt: skip
def test_neurons_are_called_as_their_scores_say(
    rows: int, rank: int, tokens: int, seed: int, bias: torch.dtype | None, repeated: bool, threads: int
) -> None:
    random = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> Int8Matrix:
        codes = torch.randint(-127, 128, (rows, columns), generator=random, dtype=torch.int8)
        return Int8Matrix(codes, torch.rand(rows, 1, generator=random).bfloat16())

    given_bias = None if bias is None else torch.randn(rows, generator=random).to(bias)
    x, shift = torch.randn(tokens, 70, generator=random).bfloat16(), 50 * torch.randn(rows, generator=random)
    scale = torch.rand(tokens, generator=random) if repeated else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "threads", lambda: threads)
        patch.setattr(kernels, "_SHARED", 1)
        for scores in (
            Scores(matrix(rows, 70), shift, given_bias),
            Scores(matrix(rows, rank), shift, given_bias, first=matrix(rank, 70)),
        ):
            score, called = scores(x, scale), scores.called_active(x, scale)
            clear = score.abs() > 1e-4 * score.abs().max()  # the compiled sum may be rounded once less
            assert called.dtype == torch.bool
            assert torch.equal(called[clear], (score > 0)[clear])
            for token in range(tokens):
                alone = scores.called_active(x[token : token + 1], None if scale is None else scale[token : token + 1])
                assert torch.equal(alone[0], called[token])


@needs_library
def test_what_is_not_a_number_is_called_active() -> None:
    codes = torch.randint(-127, 128, (70, 33), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    scores = Scores(Int8Matrix(codes, torch.ones(70, 1).bfloat16()), torch.full((70,), -1e9))
    x = torch.zeros(3, 33).bfloat16()
    x[0, 5], x[1, 5] = float("nan"), float("inf")
    assert scores.called_active(x).sum(1).tolist() == [70, 70, 0]
