"""What tokens need and what windows leave to be read: against the window itself, and as arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_flash.budget import demand
from hf_flash.budget.plan import MemoryPlan, plan_memory
from hf_flash.calibration.activity import FAR, LONGEST_MEASURED, AggregatedUse
from hf_flash.runtime.window import ResidentWindow

Mask = npt.NDArray[np.bool_]

D_FF = 400


def drifting(tokens: int, random: np.random.Generator, share: float = 0.08) -> Mask:
    """A walk over neurons that are all alike."""
    center = np.cumsum(random.normal(0, 3, tokens))[:, None]
    near = np.abs((np.arange(D_FF) - center + D_FF / 2) % D_FF - D_FF / 2) < share * D_FF
    return np.asarray(near & (random.random((tokens, D_FF)) < 0.5))


def favourites(tokens: int, random: np.random.Generator) -> Mask:
    """Some neurons are used often, many rarely, each on its own."""
    rate = np.minimum(0.9, 0.6 * np.arange(1, D_FF + 1) ** -0.8)
    return random.random((tokens, D_FF)) < rate


def report(used: Mask, context: int = 256) -> dict[str, Any]:
    """A layer as calibration reports it."""
    use = AggregatedUse()
    for at in range(0, len(used), context):
        use.add(torch.from_numpy(used[at : at + context]))
    return {"active": float(used.sum(1).mean()), "use": use.to_dict()}


def read_by_the_window(used: Mask, capacity: int) -> float:
    """Neurons a token reads with the real window, after it has filled."""
    window, missed = ResidentWindow(used.shape[1], torch.empty(capacity, 2), 5), []
    for mask in used:
        ids = np.flatnonzero(mask)
        window.note_use(None, 1, ids)
        missing = window.missing(ids)
        missed.append(len(missing))
        window.make_room(len(missing), ids)
        window.commit(missing, window.reserve(len(missing)))
    return float(np.mean(missed[len(missed) // 3 :]))


@pytest.mark.parametrize("kind", [drifting, favourites])
def test_misses_are_those_of_the_window(kind: Callable[..., Mask]) -> None:
    used = kind(3072, np.random.default_rng(0))
    need = demand.measured([report(used)], "int8", "quantized", (D_FF,), predicted=1.0)
    assert need.selected == pytest.approx(used.sum(1).mean(), rel=0.05)
    for share in (0.25, 0.4, 0.6):
        said, real = need.misses([int(share * D_FF)])[0], read_by_the_window(used, int(share * D_FF))
        assert said == pytest.approx(real, rel=0.3, abs=0.1), share


@pytest.mark.parametrize("kind", [drifting, favourites])
def test_a_calibration_of_16_tokens_does_not_promise_too_few_reads(kind: Callable[..., Mask]) -> None:
    used = kind(3072, np.random.default_rng(1))
    layer = report(used)
    for name in ("far", "far_tokens"):
        del layer["use"][name]
    need = demand.measured([layer], "int8", "quantized", (D_FF,), predicted=1.0)
    for share in (0.3, 0.6):
        assert need.misses([int(share * D_FF)])[0] > 0.85 * read_by_the_window(used, int(share * D_FF))


def test_layers_that_differ_read_less_when_windows_hold_equally_many_tokens() -> None:
    random = np.random.default_rng(2)
    layers = [drifting(1536, random, share) for share in (0.02, 0.05, 0.2)]
    need = demand.measured([report(used) for used in layers], "int8", "quantized", (D_FF,) * len(layers), predicted=1.0)
    rooms = need.divide(3 * 150)
    assert list(rooms) == sorted(rooms)
    assert sum(rooms) <= 3 * 150

    def read(capacities: tuple[int, ...]) -> float:
        return sum(read_by_the_window(used, room) for used, room in zip(layers, capacities, strict=True))

    assert read(rooms) < 0.8 * read((150, 150, 150))


# --- arithmetic ----------------------------------------------------------------------------------------------------------

shares = st.floats(1e-4, 1.0)


@given(
    use=st.lists(st.floats(0, 300), min_size=1, max_size=LONGEST_MEASURED),
    far=st.lists(st.floats(0, 300), max_size=len(FAR)),
    d_ff=st.integers(1, 200),
)
@settings(deadline=None)
def test_curves_are_concave_and_bounded_whatever_was_stored(use: list[float], far: list[float], d_ff: int) -> None:
    curve = demand.curve([*range(1, len(use) + 1), *(k for k in FAR[: len(far)])], [*use, *far], d_ff)
    assert len(curve) == demand.LONGEST + 1
    assert curve[0] == 0.0
    steps = np.diff(curve)
    assert (steps >= 0).all()
    assert (np.diff(steps) <= 1e-6).all()
    assert curve[-1] <= d_ff


def test_beyond_what_is_known_the_unused_are_used_at_the_same_rate() -> None:
    known = [1000 * (1 - 0.99**k) for k in range(1, 17)]
    np.testing.assert_allclose(demand.curve(range(1, 17), known, 1000), 1000 * (1 - 0.99 ** np.arange(4097)), rtol=1e-6)


@settings(deadline=None, max_examples=60)
@given(
    actives=st.lists(st.floats(0, 1), min_size=1, max_size=5),
    d_ff=st.integers(1, 300),
    room=st.floats(0, 1.2),
    predicted=st.floats(0.5, 30),
)
def test_room_is_divided_to_the_last_but_never_beyond_a_layer(
    actives: list[float], d_ff: int, room: float, predicted: float
) -> None:
    layers = [{"active": a * d_ff, "use": {"mean": [d_ff * (1 - (1 - a) ** k) for k in range(1, 17)]}} for a in actives]
    need, total = (
        demand.measured(layers, "int8", "quantized", (d_ff,) * len(layers), predicted),
        int(room * len(actives) * d_ff),
    )
    rooms = need.divide(total)
    assert all(0 <= each <= d_ff for each in rooms)
    assert sum(rooms) <= total
    assert sum(rooms) >= min(total, d_ff * len(actives)) - 2 * len(actives)
    if room >= 1:
        assert set(rooms) == {d_ff}
    missed, all_of_it = need.misses(rooms), need.misses([0] * len(actives))
    assert all(0 <= few <= many + 1e-6 for few, many in zip(missed, all_of_it, strict=True))


@given(layers=st.integers(1, 48), d_ff=st.integers(16, 20_000), active=shares, fresh=shares, room=st.floats(0, 1.2))
@settings(deadline=None, max_examples=60)
def test_layers_that_are_alike_get_the_same(layers: int, d_ff: int, active: float, fresh: float, room: float) -> None:
    need, total = demand.supposed((d_ff,) * layers, "quantized", active, fresh, None), int(room * layers * d_ff)
    assert need.divide(total) == (min(d_ff, total // layers),) * layers
    assert need.selected == pytest.approx(min(1.0, 1.5 * active) * d_ff, rel=0.01)


def test_fresh_is_what_the_fifth_token_adds() -> None:
    need = demand.supposed((10_000,), "quantized", 0.02, 0.3, 1.0)
    (misses,) = need.misses([round(float(need.use[0, 4]))])
    assert misses == pytest.approx(0.3 * 200, rel=0.02)


def test_windows_fill_while_tokens_are_few() -> None:
    need = demand.supposed((10_000,), "quantized", 0.01, None, 1.0)
    (long,), (start,), (first,) = (need.misses([5000], seen) for seen in (None, (16, 47), (1, 1)))
    assert long < start < first == pytest.approx(need.use[0, 2] - need.use[0, 1])


def test_without_a_predictor_what_does_not_fit_is_read() -> None:
    need = demand.everything((128,))
    assert [need.misses([capacity])[0] for capacity in (0, 28, 128)] == pytest.approx([128, 100, 0])


def test_what_a_predictor_names_is_counted_where_it_was_measured() -> None:
    layer = {"active": 10.0, "use": {"mean": [10.0, 18.0]}, "lowrank": {"selected": 3.0, "use": {"mean": [30.0, 31.0]}}}
    need = demand.measured([layer], "lowrank", "lowrank", (100,))
    assert need.use[0, 1:3].tolist() == [30.0, 31.0]
    other = demand.measured([layer], "int8", "quantized", (100,))  # no figure for it: as assumed
    assert other.use[0, 1] == pytest.approx(15.0)
    assert demand.measured([layer], "lowrank", "lowrank", (100,), predicted=2.0).use[0, 1] == pytest.approx(20.0)


# --- a budget ------------------------------------------------------------------------------------------------------------


def budget(size: int, layers: list[float]) -> MemoryPlan:
    """Windows alone, a byte a neuron."""
    need = demand.measured(
        [{"active": a, "use": {"mean": [a * k**0.5 for k in range(1, 17)]}} for a in layers],
        "int8",
        "quantized",
        (1000,) * len(layers),
        1.0,
    )
    nothing = {"resident_bytes": 0, "predictor_bytes": 0, "scratch_bytes": 0}
    return plan_memory(size, **nothing, widths=(1000,) * len(layers), bundle_bytes=1, demand=need)


@given(size=st.integers(1, 4000), layers=st.lists(st.floats(0, 400), min_size=3, max_size=3))
@settings(deadline=None, max_examples=40)
def test_uneven_windows_stay_within_the_budget(size: int, layers: list[float]) -> None:
    plan = budget(size, layers)
    assert plan.window_bytes == sum(plan.capacities) <= plan.budget_bytes
    assert plan.capacity == sum(plan.capacities) // 3


def test_a_budget_says_when_it_is_too_small_to_be_of_use() -> None:
    short, layers = budget(50, [20.0, 80.0]), [20.0, 80.0]
    said = short.shortage(5)
    assert said is not None
    assert "room for 25 neurons a layer, and a token uses 50 (measured)" in said
    assert f"{sum(int(np.ceil(a * 5**0.5)) for a in layers)} B would hold what 5 tokens use" in said
    enough = budget(sum(int(np.ceil(a * 5**0.5)) for a in layers), layers)
    assert enough.shortage(5) is None
    assert all(room >= a * 5**0.5 - 1 for room, a in zip(enough.capacities, layers, strict=True))
    assert "windows, 111 of 1000 neurons a layer (44 to 179)" in enough.describe()
