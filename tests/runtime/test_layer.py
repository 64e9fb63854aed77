"""The main path of one layer on bundles that lie in memory: any number of parts, any activation, input of any shape."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hf_flash.base.arrays import Ids
from hf_flash.compute.activation import Activation, activation_named
from hf_flash.compute.arithmetic import ARITHMETICS, Arithmetic
from hf_flash.errors import StoreReadError, UsageError
from hf_flash.predictors.base import NoPredictor, Predictor
from hf_flash.runtime.engine import Engine
from hf_flash.runtime.layer import FlashFFN
from hf_flash.runtime.prompts import MOST_PREDICTED
from hf_flash.runtime.sites import BlockFFN
from hf_flash.runtime.window import ResidentWindow
from hf_flash.store.unit import TWO_MATRICES, Part, UnitLayout, parse_parts
from tests.memory_reader import MemoryReader

GATED = (Part("gate", "row"), Part("up", "row"), Part("down", "column"))
D, D_FF = 16, 96


class Told(Predictor):
    """Names what it was told to, for every token."""

    nbytes = 0

    def __init__(self, ids: list[int]) -> None:
        self.mask = torch.zeros(D_FF, dtype=torch.bool)
        self.mask[ids] = True

    def select(self, x: torch.Tensor, allowed: torch.Tensor | None = None) -> torch.Tensor:
        return self.mask.expand(len(x), D_FF).contiguous()


def make(
    parts: Any = TWO_MATRICES, *, capacity: int = D_FF, predictor: Predictor | None = None,
    kind: type[Arithmetic] = Arithmetic,
    activation: Activation | None = None, dtype: torch.dtype = torch.float32,
) -> tuple[FlashFFN, MemoryReader, dict[str, torch.Tensor]]:  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    unit = UnitLayout.of(parts, D, dtype)
    matrices = {part.role: torch.randn(D_FF, D, generator=generator, dtype=torch.float32).to(dtype) for part in parts}
    reader = MemoryReader([torch.cat([matrices[role] for role in unit.roles], 1)], unit)
    activation = activation or activation_named("relu")
    engine = Engine(reader, kind(D_FF, unit, activation))  # type: ignore[arg-type]
    names: Any = {role: f"{role}_proj" for role in unit.roles}
    ffn = BlockFFN(0, D_FF, D, activation, names=names, biases=dict.fromkeys(unit.roles)).eval()
    window = ResidentWindow(D_FF, engine.arithmetic.matrix(capacity), 5)
    ffn.attach(engine, window, predictor or NoPredictor())
    return ffn, reader, matrices


def wanted(
    x: torch.Tensor, matrices: dict[Any, torch.Tensor], ids: list[int], activation: Activation | None = None
) -> torch.Tensor:
    own = {role: matrix[ids] for role, matrix in matrices.items()}
    hidden = (activation or activation_named("relu")).hidden(*(x @ own[role].T for role in ("gate", "up") if role in own))
    return hidden @ own["down"]


@pytest.mark.parametrize("parts", [TWO_MATRICES, GATED])
@pytest.mark.parametrize("shape", [(1, D), (7, D), (1, 1, D), (2, 5, D), (2, 1, 3, D), (D,)])
@pytest.mark.parametrize("capacity", [0, 10, D_FF])
def test_input_of_any_shape_gives_output_alike(parts: Any, shape: tuple[int, ...], capacity: int) -> None:
    ffn, _, matrices = make(parts, capacity=capacity)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    out = ffn(x)
    assert out.shape == x.shape
    torch.testing.assert_close(out, wanted(x, matrices, list(range(D_FF))), rtol=1e-4, atol=1e-4)
    assert ffn.engine is not None
    assert ffn.engine.counters.tokens == x.numel() // D


@pytest.mark.parametrize("kind", ARITHMETICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_token_reads_what_is_named_and_not_there(kind: type[Arithmetic], dtype: torch.dtype) -> None:
    first, second = [3, 4, 50], [4, 50, 51]
    ffn, reader, matrices = make(predictor=(told := Told(first)), capacity=4, kind=kind, dtype=dtype)
    x = torch.randn(1, D, generator=torch.Generator().manual_seed(1)).to(dtype)
    for ids in (first, second):
        told.mask[:] = False
        told.mask[ids] = True
        torch.testing.assert_close(ffn(x), wanted(x, matrices, ids), rtol=2e-2, atol=0.5 if dtype == torch.bfloat16 else 1e-4)
    assert reader.started == [(0, first), (0, [51])]
    assert ffn.engine is not None
    count = ffn.engine.counters
    assert (count.calls, count.selected, count.hits, count.missing_bytes) == (2, 6, 2, 4 * reader.unit.row_bytes)
    assert count.read_bytes == count.missing_bytes


LAYERS = [
    (TWO_MATRICES, activation_named("relu")), (TWO_MATRICES, Activation("silu", F.silu)),
    (TWO_MATRICES, Activation("relu2", lambda x: F.relu(x).square(), zeros=True)), (GATED, Activation("silu", F.silu)),
    (GATED, activation_named("relu")), (TWO_MATRICES, activation_named("relu2")),
    (GATED, activation_named("relu2")), (TWO_MATRICES, activation_named("relu6")),
    (GATED, activation_named("fatrelu", level=0.5)), (GATED, replace(activation_named("relu"), of_both=True)),
]  # fmt: skip


@pytest.mark.parametrize("kind", ARITHMETICS)
@pytest.mark.parametrize(("parts", "activation"), LAYERS, ids=lambda value: getattr(value, "name", None))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 3, 14, 40])
def test_every_kind_of_layer_computes_the_same_whatever_is_in_memory(
    kind: type[Arithmetic], parts: Any, activation: Activation, dtype: torch.dtype, tokens: int
) -> None:
    """With a predictor and without; rounded where the stock layer rounds."""
    x = torch.randn(tokens, D, generator=torch.Generator().manual_seed(1)).to(dtype)
    for ids in (list(range(D_FF)), list(range(1, D_FF, 3))):
        if tokens > MOST_PREDICTED and len(ids) < D_FF:
            continue  # a prompt uses all
        outs = []
        for capacity in (0, 10, 50, D_FF):
            predictor = None if len(ids) == D_FF else Told(ids)
            ffn, _, matrices = make(
                parts, activation=activation, capacity=capacity, kind=kind, dtype=dtype, predictor=predictor
            )
            outs += [ffn(x), ffn(x)]
        assert all(torch.equal(out, outs[0]) for out in outs)
        expected = wanted(x, matrices, ids, activation)
        precise = wanted(x.double(), {role: part.double() for role, part in matrices.items()}, ids, activation)
        scale = precise.abs().amax()
        rounding = 2 * (expected.double() - precise).abs().amax() + 1e-5 * scale  # what stock loses in this dtype
        assert (outs[0].double() - precise).abs().amax() <= rounding


@pytest.mark.parametrize("step", ["on_start", "on_wait"])
def test_a_read_that_fails_leaves_the_window_as_good_as_before(step: str) -> None:
    ffn, reader, matrices = make(predictor=(told := Told([1, 2])), capacity=3)
    x = torch.ones(1, D)
    ffn(x)
    told.mask[60] = True

    def fail(ids: Ids) -> None:
        raise StoreReadError("the disk is gone", where="here")

    setattr(reader, step, fail)
    with pytest.raises(StoreReadError, match="the disk is gone"):
        ffn(x)
    assert ffn.window.free == 1
    setattr(reader, step, lambda ids: None)
    torch.testing.assert_close(ffn(x), wanted(x, matrices, [1, 2, 60]), rtol=1e-4, atol=1e-4)
    assert reader.started[-1] == (0, [60])  # what was there is not read again


@pytest.mark.parametrize("step", ["on_start", "on_wait"])
@pytest.mark.parametrize("tokens", [1, 40])
def test_an_interruption_forgets_what_nobody_knows_to_be_whole(step: str, tokens: int) -> None:
    ffn, reader, matrices = make(capacity=20, predictor=None)
    x = torch.randn(tokens, D, generator=torch.Generator().manual_seed(1))

    def interrupt(ids: Ids) -> None:
        raise KeyboardInterrupt

    setattr(reader, step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        ffn(x)
    assert reader.forgotten > 0
    assert len(ffn.window.resident) == 0
    setattr(reader, step, lambda ids: None)
    torch.testing.assert_close(ffn(x), wanted(x, matrices, list(range(D_FF))), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("activation", "zeros"), [(Activation("silu", F.silu), False), (Activation("relu2", lambda x: F.relu(x).square()), False)]
)
@pytest.mark.parametrize("parts", [TWO_MATRICES, GATED])
def test_activations_that_the_compiled_part_does_not_know(activation: Activation, zeros: bool, parts: Any) -> None:
    for tokens in (1, 9):
        ffn, _, matrices = make(parts, activation=activation, capacity=30)
        x = torch.randn(tokens, D, generator=torch.Generator().manual_seed(1))
        expected = wanted(x, matrices, list(range(D_FF)), activation)
        torch.testing.assert_close(ffn(x), expected, rtol=1e-4, atol=1e-4)
        assert bool(activation.active(torch.tensor([-1.0])).all()) is not zeros


def test_another_width_is_refused_by_name() -> None:
    ffn, _, _ = make()
    with pytest.raises(UsageError, match="another width") as caught:
        ffn(torch.ones(2, D + 1))
    assert f"[..., {D}]" in str(caught.value)
    with pytest.raises(UsageError, match="by its feed-forward block"):
        ffn.up_proj(torch.ones(2, D))


def test_somebody_elses_choice_narrows_a_predictors() -> None:
    from hf_flash.predictors.base import narrowed

    allowed = torch.tensor([True, False, True])
    assert NoPredictor().select(torch.ones(2, D)) is None
    found = NoPredictor().select(torch.ones(2, D), allowed)
    assert found is not None
    assert found.tolist() == [[True, False, True]] * 2
    assert narrowed(torch.tensor([[True, True, False]]), allowed).tolist() == [[True, False, False]]


# --- what a unit is ---------------------------------------------------------------------------------------------------------


FUSED = (Part("gate", "first_rows"), Part("up", "last_rows"), Part("down", "column"))


@pytest.mark.parametrize("parts", [TWO_MATRICES, GATED, FUSED, (Part("up", "column"), Part("down", "row"))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_layout_says_where_parts_lie(parts: Any, dtype: torch.dtype) -> None:
    unit = UnitLayout.of(parts, D, dtype)
    assert unit.row_bytes == len(parts) * D * dtype.itemsize
    assert [unit.offset(role) for role in unit.roles] == [n * D * dtype.itemsize for n in range(len(parts))]
    assert parse_parts(unit.text) == tuple(parts)
    assert unit.as_dtype(torch.float32).row_bytes == len(parts) * D * 4
    rows = np.arange(unit.numbers)
    assert [rows[unit.columns(role)][0] for role in unit.roles] == [n * D for n in range(len(parts))]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "up:row",
        "up:row,down:diagonal",
        "up:row,up:row,down:column",
        "up:row,down:column,x:row",
        "up",
        "gate:first_rows,up:row,down:column",
        "gate:last_rows,up:first_rows,down:column",
    ],
)
def test_a_list_of_parts_that_cannot_be_is_none(text: str) -> None:
    assert parse_parts(text) is None
