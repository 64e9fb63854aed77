"""Layers that compute on a device: as stock, within the budgets of device and host, whatever happens in between.

The device is the CPU in the way of a GPU (`cpu:0`). `./scripts/test` runs this file once more on the stand-in device of
`tests/standin_device`, whose memory this process cannot touch, and whose copies are late on purpose.
"""

from __future__ import annotations

import copy
import gc
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, pipeline

import hf_flash
from hf_flash import BudgetError, ConfigError, FlashOffloadConfig, StoreError, UsageError
from hf_flash.compute.transfers import Copied, Transfers
from hf_flash.reading.host_rows import HostRows
from hf_flash.runtime.device_experts import FEW, Ring, _Rows
from hf_flash.runtime.expert_tiers import ExpertTiers
from hf_flash.runtime.model import runtime_of
from tests.answering import answers, check_rounds_as_stock, logits
from tests.conftest import TINY_OPT, in_a_fork, interrupting, slow_but, torch_threads

DEVICE = os.environ.get("HF_FLASH_TEST_DEVICE", "cpu:0")
MIXTURES = ("qwen3_moe", "gpt_oss", "nemotron_h", "mixtral")


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    with torch_threads(1):
        yield


def load(folder: Path, budget: Any = None, **arguments: Any) -> Any:
    kwargs = {name: arguments.pop(name) for name in ("dtype",) if name in arguments}
    config = FlashOffloadConfig(memory_budget=budget, **arguments)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map=DEVICE, **kwargs).eval()


def least(folder: Path, **arguments: Any) -> int:
    with pytest.raises(BudgetError) as caught:
        load(folder, {DEVICE: 1}, **arguments)
    assert f"memory_budget of {DEVICE}" in str(caught.value)
    assert caught.value.minimum_bytes is not None
    return caught.value.minimum_bytes


def close_to(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


# --- contract C3 and C5: any budget of either memory, any reader


@pytest.mark.parametrize("model_type", slow_but(MIXTURES[:2], MIXTURES))
@pytest.mark.parametrize("reader", ["direct", "mmap"])
def test_answers_of_a_mixture_depend_on_no_tier(model_type: str, reader: str, mixture: Any) -> None:
    folder, stock, ids = mixture(model_type)
    plenty = load(folder, {DEVICE: "1GB"}, reader=reader)
    first = answers(plenty, ids)
    close_to(first, answers(stock, ids))
    plan = runtime_of(plenty).plan
    slots, buffers, floor = sum(plan.slot_bytes), plan.host.buffer_bytes, least(folder, reader=reader)
    for room, behind in ((0, 0), (0, 3), (1, 0), (1, 2), (2, 3), (3, 9)):
        budget = {DEVICE: floor + room * slots, "cpu": buffers + behind * slots}
        tight = load(folder, budget, reader=reader)
        for turn in range(2):
            assert all(map(torch.equal, answers(tight, ids), first)), (room, behind, turn)
        found = hf_flash.stats(tight)
        assert found.capacity == room
        assert found.dram_bytes <= found.budget_bytes == budget[DEVICE]
        assert found.host_bytes <= budget["cpu"]
        assert (found.counters.host_hits > 0) == (behind > 1)
        held = [(layer.on_device.memory, layer.on_device.host_memory.tensor) for layer in runtime_of(tight).ffns]
        assert sum(memory.nbytes for memory, _ in held) == found.window_bytes
        assert sum(here.nbytes for _, here in held) <= behind * slots


@pytest.mark.parametrize("shape", ["pre_ln", "post_ln", "odd"])
@pytest.mark.parametrize("predictor", ["none", "quantized"])
def test_answers_of_neurons_depend_on_no_tier(shape: str, predictor: str, opt: Callable[..., Path]) -> None:
    folder = opt(shape)
    ids = torch.arange(5, 29).view(2, 12)
    arguments: dict[str, Any] = {"predictor": predictor, "predictor_bits": 8}
    plenty = load(folder, {DEVICE: "1GB"}, **arguments)
    first = answers(plenty, ids)
    if predictor == "none":
        close_to(first, answers(AutoModelForCausalLM.from_pretrained(folder).eval(), ids))
    plan = runtime_of(plenty).plan
    row, layers, floor = plan.bundle_bytes, plan.layers, least(folder, **arguments)
    for room, behind, reader in ((0, 0, "mmap"), (0, 9, "direct"), (7, 0, "mmap"), (9, 20, "mmap"), (60, 5, "direct")):
        budget = {DEVICE: floor + room * layers * row, "cpu": plan.host.buffer_bytes + (1 << 22) + behind * layers * row}
        tight = load(folder, budget, reader=reader, **arguments)
        for turn in range(2):
            assert all(map(torch.equal, answers(tight, ids), first)), (room, behind, turn)
        found = hf_flash.stats(tight)
        assert found.dram_bytes <= found.budget_bytes == budget[DEVICE]
        assert found.host_bytes <= budget["cpu"]


@pytest.mark.parametrize("model_type", slow_but(MIXTURES[:2], MIXTURES))
def test_units_of_a_mixture_may_compute_here(model_type: str, mixture: Any) -> None:
    folder, stock, ids = mixture(model_type)
    plenty = load(folder, {DEVICE: "1GB", "cpu": "1GB"}, units_on="cpu")
    first = answers(plenty, ids)
    close_to(first, answers(stock, ids))
    plan = runtime_of(plenty).plan
    assert next(plenty.parameters()).device == torch.device(DEVICE) or DEVICE == "cpu:0"
    for room in (0, 1, 2):
        budget = plan.minimum_bytes + room * sum(plan.slot_bytes)
        tight = load(folder, budget, units_on="cpu")
        for _ in range(2):
            assert all(map(torch.equal, answers(tight, ids), first))
        found = hf_flash.stats(tight)
        assert found.dram_bytes <= found.budget_bytes == budget
        assert found.beside_device == DEVICE
        assert f"on {DEVICE}" in str(found)
    with pytest.raises(BudgetError, match="is no unit"):
        load(folder, {DEVICE: found.beside_bytes - 1, "cpu": "1GB"}, units_on="cpu")


@pytest.mark.parametrize("shape", ["pre_ln", "no_bias"])
def test_neurons_may_compute_here(shape: str, opt: Callable[..., Path]) -> None:
    folder, ids = opt(shape), torch.arange(5, 29).view(2, 12)
    stock = AutoModelForCausalLM.from_pretrained(folder).eval()
    for predictor in ("none", "quantized"):
        model = load(folder, {DEVICE: "1GB", "cpu": "1GB"}, units_on="cpu", predictor=predictor, predictor_bits=8)
        first = answers(model, ids)
        if predictor == "none":
            close_to(first, answers(stock, ids))
        floor = runtime_of(model).plan.minimum_bytes
        tight = load(folder, floor + 5000, units_on="cpu", predictor=predictor, predictor_bits=8)
        assert all(map(torch.equal, answers(tight, ids), first))
        layer = tight.model.decoder.layers[0]
        if layer.fc1.bias is not None:  # others may replace or change it
            layer.fc1.bias.data.add_(1.0)
            layer.fc2.bias = torch.nn.Parameter(layer.fc2.bias.detach() + 1.0)
            changed = logits(tight, ids)
            assert not torch.equal(changed, first[0])
            stock.model.decoder.layers[0].fc1.bias.data.add_(1.0)
            stock.model.decoder.layers[0].fc2.bias.data.add_(1.0)
            if predictor == "none":
                torch.testing.assert_close(changed, logits(stock, ids), rtol=1e-4, atol=1e-4)
            stock = AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_it_computes_in_any_dtype_as_stock(dtype: torch.dtype, mixture: Any, tmp_path: Path, opt: Callable[..., Path]) -> None:
    mixture_folder, _, ids = mixture("qwen3_moe")
    AutoModelForCausalLM.from_pretrained(mixture_folder, dtype=torch.bfloat16).save_pretrained(tmp_path)
    for folder, some in ((tmp_path, ids), (opt(), torch.arange(5, 17)[None])):
        wide = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        model = load(folder, dtype=dtype, predictor="none")
        assert model.dtype == logits(model, some).dtype == dtype
        check_rounds_as_stock(model, wide, some)


def test_those_beside_a_token_change_none_of_its_bits(mixture: Any) -> None:
    """Of calls of one shape: what other rows hold is not its business, whichever experts they bring along."""
    folder, _, ids = mixture("qwen3_moe")
    model = load(folder)
    x = model.get_input_embeddings()(ids.to(model.device))[0, :5]
    layer = runtime_of(model).ffns[0]
    index = torch.tensor([[0, 1]] * 5, device=model.device)
    weights = torch.rand(5, 2, device=model.device)
    with torch.no_grad():
        wanted = layer(x, index, weights)[0]
        for other in ([2, 3], [1, 0], [3, 0]):
            index[1:] = torch.tensor(other, device=model.device)
            assert torch.equal(layer(x, index, weights)[0], wanted)


@pytest.mark.parametrize("how", [
    {"num_beams": 3}, {"cache_implementation": "static"}, {"do_sample": True, "seed": 3}, {"prompt_lookup_num_tokens": 3},
], ids=str)  # fmt: skip
def test_generating_gives_the_stock_tokens(how: dict[str, Any], mixture: Any) -> None:
    folder, stock, ids = mixture("qwen3_moe")
    seed = how.get("seed")
    how = {"max_new_tokens": 8, "do_sample": False} | {name: value for name, value in how.items() if name != "seed"}
    found = []
    for model in (load(folder, least(folder) + 200_000), stock):
        torch.manual_seed(seed or 0)
        some = ids[:1].to(model.device)
        found.append(model.generate(some, attention_mask=torch.ones_like(some), **how).tolist())
    assert found[0] == found[1]


def test_a_table_of_embeddings_may_stay_on_flash(mixture: Any) -> None:
    folder, stock, ids = mixture("qwen3_moe")
    tight = load(folder, {DEVICE: least(folder)})
    assert runtime_of(tight).table is not None
    torch.testing.assert_close(logits(tight, ids), logits(stock, ids), rtol=1e-4, atol=1e-4)


# --- what moves, and what is counted


def test_what_left_the_device_comes_back_from_the_host(mixture: Any) -> None:
    folder, _, ids = mixture("qwen3_moe")
    plan = runtime_of(load(folder)).plan
    slots = sum(plan.slot_bytes)
    budget = {DEVICE: least(folder) + slots, "cpu": plan.host.buffer_bytes + 99 * slots}
    model = load(folder, budget)
    logits(model, ids)
    first = hf_flash.stats(model, reset=True).counters
    assert first.read_bytes > 0
    assert first.bus_bytes >= first.missing_bytes
    logits(model, ids)
    again = hf_flash.stats(model)
    assert again.counters.read_bytes == again.counters.missing_bytes == 0
    assert again.counters.host_hits > 0
    assert "weights in DRAM" in str(again)
    assert again.to_dict()["device"] == DEVICE


def test_neurons_that_the_host_keeps_are_not_read_again(opt: Callable[..., Path]) -> None:
    ids = torch.arange(5, 17)[None]
    floor = least(opt(), predictor="none")
    model = load(opt(), {DEVICE: floor, "cpu": "1GB"}, predictor="none")
    logits(model, ids)
    hf_flash.stats(model, reset=True)
    logits(model, ids)
    again = hf_flash.stats(model).counters
    assert again.read_bytes == 0
    assert again.host_hits > 0


def test_one_number_is_of_the_device_and_leaves_buffers_alone_here(mixture: Any) -> None:
    folder, _, _ = mixture("qwen3_moe")
    found = hf_flash.stats(load(folder, least(folder)))
    assert found.budget_bytes == least(folder)
    assert found.host_bytes == runtime_of(load(folder, {DEVICE: "1GB"})).plan.host.buffer_bytes


@given(
    on_device=st.integers(0, 6), on_host=st.integers(0, 6),
    calls=st.lists(st.lists(st.integers(0, 8), min_size=1, max_size=9, unique=True), min_size=1, max_size=12),
)  # fmt: skip
def test_the_most_recent_are_on_the_device_and_the_next_on_the_host(
    on_device: int, on_host: int, calls: list[list[int]]
) -> None:
    """The moves as device_experts.py makes them; experts of a call in the order of their last tokens."""
    tiers, order = ExpertTiers(9, on_device, on_host), list[int]()
    for call in calls:
        used, last = np.array(sorted(call)), np.array([call.index(expert) for expert in sorted(call)])
        room = tiers.make_room(used, last, len(call))
        leaving = [*room.leaving, *room.leaving_later]
        absent = [*((expert, True) for expert in room.kept), *((expert, False) for expert in room.passing)]
        waiting = [(expert, kept) for expert, kept in absent if tiers.waits(expert)]

        def to_host(expert: int) -> None:
            if tiers.belongs_on_host(expert) and not tiers.waits(expert):
                assert tiers.host.free, "no slot for what belongs on the host"
                tiers.host.put(expert, tiers.host.take())

        def leave(gone: list[int]) -> None:
            to_host(gone[0])
            tiers.device.drop(gone.pop(0))

        for expert, kept in [*waiting, *(some for some in absent if some not in waiting)]:
            if kept:
                if not tiers.device.free:
                    leave(leaving)
                tiers.device.put(expert, tiers.device.take())
            else:
                to_host(expert)
            if (expert, kept) in waiting and (kept or not tiers.belongs_on_host(expert)):
                tiers.host.drop(expert)
        while leaving:
            leave(leaving)
        order = [*reversed(call), *(expert for expert in order if expert not in call)]
        there = set(np.flatnonzero(tiers.device.slot_of >= 0).tolist())
        waits = set(np.flatnonzero(tiers.host.slot_of >= 0).tolist())
        assert there == set(order[:on_device])
        assert waits <= set(order[on_device : on_device + max(0, on_host - 1)])
        if on_device:
            assert not there & waits


@given(rows=st.integers(0, 7), calls=st.lists(st.sets(st.integers(0, 11), min_size=1, max_size=9), min_size=1, max_size=10))
def test_the_host_keeps_rows_that_were_asked_for_last(rows: int, calls: list[set[int]]) -> None:
    kept = HostRows(12, rows, 4, torch.float32)
    for call in calls:
        ids = np.array(sorted(call))
        taken = kept.take(ids)
        parts = [*taken.here.tolist(), *taken.coming.tolist(), *taken.passing.tolist()]
        assert sorted(parts) == list(range(len(ids)))
        assert torch.equal(kept.matrix[torch.from_numpy(taken.slots)][:, 0], torch.from_numpy(ids[taken.here]).float())
        kept.matrix[torch.from_numpy(taken.free)] = torch.from_numpy(ids[taken.coming]).float()[:, None]
        kept.commit(ids[taken.coming], taken.free)
        here = np.flatnonzero(kept.slot_of >= 0)
        assert len(here) <= rows
        assert set(ids[taken.coming].tolist()) <= set(here.tolist())
        assert not len(taken.passing) or len(here) == rows


@given(
    tokens=st.integers(1, 2 * FEW), k=st.integers(1, 4), seed=st.integers(0, 99), least_id=st.sampled_from([-1, 0]),
)  # fmt: skip
def test_every_pair_has_a_row_of_its_token(tokens: int, k: int, seed: int, least_id: int) -> None:
    index = np.random.default_rng(seed).integers(least_id, 6, (tokens, k))
    rows = _Rows(index, 5)  # 5 and -1 are no experts of this layer
    assert rows.used.tolist() == sorted({expert for expert in index.reshape(-1).tolist() if 0 <= expert < 5})
    for pair, expert in enumerate(index.reshape(-1).tolist()):
        row = int(rows.of_pair[pair])
        if not 0 <= expert < 5:
            assert row == len(rows.tokens)
            continue
        assert rows.tokens[row] == pair // k
        assert rows.bounds[expert].start <= row < rows.bounds[expert].stop
    for expert, last in zip(rows.used.tolist(), rows.last.tolist(), strict=True):
        assert last == max(token for token in range(tokens) if expert in index[token])


# --- faults


def both(mixture: Any, opt: Callable[..., Path]) -> list[tuple[Path, dict[str, Any], torch.Tensor]]:
    folder, _, ids = mixture("qwen3_moe")
    neurons = {"predictor": "quantized", "predictor_bits": 8}
    some = torch.arange(5, 17)[None]
    every = {"predictor": "none", "reader": "direct"}  # which begins to read the next layer before its call
    return [(folder, {"reader": "direct"}, ids), (opt(), neurons, some), (opt(), every, torch.arange(5, 45)[None])]


def test_after_an_interruption_answers_are_right(mixture: Any, opt: Callable[..., Path]) -> None:
    for folder, arguments, ids in both(mixture, opt):
        model = load(folder, {DEVICE: least(folder, **arguments) + 50_000, "cpu": "9MB"}, **arguments)
        wanted = logits(model, ids)
        for turn in range(30):
            try:
                with interrupting(0.0003 * turn):
                    logits(model, ids)
            except KeyboardInterrupt:
                pass
            assert torch.equal(logits(model, ids), wanted), (folder, turn)


@pytest.mark.parametrize("number", [1, 2, 5])
def test_an_interrupt_while_streams_are_changed_leaves_the_callers(
    number: int, mixture: Any, opt: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or all that comes later runs on the stream of copies, and nothing waits for what the caller's still computes."""
    place = torch.device(DEVICE)
    if place.type == "cpu":
        pytest.skip("this device has no streams")
    module = torch.get_device_module(place.type)
    for folder, arguments, ids in both(mixture, opt):
        model = load(folder, {DEVICE: least(folder, **arguments) + 50_000, "cpu": "9MB"}, **arguments)
        wanted, before, left = logits(model, ids), module.current_stream(place), [number]

        def interrupted(stream: Any, left: list[int] = left, change: Any = module.stream) -> Any:
            left[0] -= 1
            if left[0] == 0:
                module.set_stream(stream)
                raise KeyboardInterrupt
            return change(stream)

        with monkeypatch.context() as patched:
            patched.setattr(module, "stream", interrupted)
            with pytest.raises(KeyboardInterrupt):
                [logits(model, ids) for _ in range(number)]
        assert module.current_stream(place) == before
        assert torch.equal(logits(model, ids), wanted), folder


def forget_everything(model: Any) -> None:
    """Make the next call find nothing in memory, as after an interruption."""
    for ffn in runtime_of(model).ffns:
        if hasattr(ffn, "passing"):
            ffn.passing.interrupted = True
        else:
            ffn.window.consistent = False


def failing_at(number: int, wait: Callable[..., Any]) -> Callable[..., Any]:
    """As `wait`, but its call of this number is a failure of the disk."""
    left = [number]

    def failing(self: Any, *args: Any) -> Any:
        left[0] -= 1
        result = wait(self, *args)
        if left[0] == 0:
            raise OSError(5, "Input/output error")
        return result

    return failing


def test_a_read_that_fails_is_an_error_and_the_next_one_goes_on(
    mixture: Any, opt: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, arguments, ids in both(mixture, opt):
        model = load(folder, {DEVICE: least(folder, **arguments) + 50_000, "cpu": "9MB"}, **arguments)
        wanted = logits(model, ids)
        reader = runtime_of(model).engine.reader
        queue = reader._queue if hasattr(reader, "_queue") else reader.source._queue
        failed = 0
        for number in range(1, 8):
            forget_everything(model)
            with monkeypatch.context() as patch:
                patch.setattr(type(queue), "wait", failing_at(number, type(queue).wait))
                try:
                    logits(model, ids)
                except StoreError:
                    failed += 1
            assert torch.equal(logits(model, ids), wanted)
        assert failed


def test_calls_may_come_on_several_streams(mixture: Any, opt: Callable[..., Path]) -> None:
    if DEVICE == "cpu:0":
        pytest.skip("this device has no streams")
    for folder, arguments, ids in both(mixture, opt):
        model = load(folder, {DEVICE: least(folder, **arguments) + 50_000, "cpu": "9MB"}, **arguments)
        wanted, module = logits(model, ids), torch.get_device_module("standin")
        streams = [module.Stream(DEVICE), module.Stream(DEVICE)]
        inputs = [ids.to(DEVICE) for _ in streams]
        module.synchronize(DEVICE)
        found = []
        for number in range(4):
            with module.stream(streams[number % 2]), torch.no_grad():
                found.append(model(inputs[number % 2]).logits)
        module.synchronize(DEVICE)
        assert all(torch.equal(logits.cpu(), wanted) for logits in found)


def test_what_is_read_into_waits_for_the_copies_from_it() -> None:
    """Slots of the ring, and lanes: the disk may not write to them before the device has what was there."""

    class Watched(Copied):
        waited = 0

        def wait(self) -> None:
            self.waited += 1

    ring, copies = Ring(3, 8, Transfers(torch.device("cpu:0"))), [Watched(None) for _ in range(3)]
    for _ in range(2):
        taken = [ring.take(is_needed=True) for _ in range(3)]
        assert sorted(taken) == [0, 1, 2]  # type: ignore[type-var]
        assert ring.take(is_needed=True) is None
        for slot, copied in zip(taken, copies, strict=True):
            ring.give(slot, copied)  # type: ignore[arg-type]
    assert [copied.waited for copied in copies] == [1, 1, 1]
    assert ring.take(is_needed=False) == taken[0], "what was given first"
    assert ring.take(is_needed=False) == taken[1]
    assert ring.take(is_needed=False) is None, "the last was given just now"
    ring.forget()
    assert ring.take(is_needed=True) == 0


def test_lanes_wait_for_the_copies_from_them(opt: Callable[..., Path]) -> None:
    model = load(opt(), predictor="none")
    reader, waited = runtime_of(model).engine.reader, list[int]()
    for number, lane in enumerate(reader._lanes):
        lane.copied = SimpleNamespace(wait=lambda number=number: waited.append(number))
    logits(model, torch.arange(5, 9)[None])
    assert set(waited) >= {0}


def test_several_threads_use_one_model(mixture: Any, opt: Callable[..., Path]) -> None:
    for folder, arguments, ids in both(mixture, opt):
        model = load(folder, {DEVICE: least(folder, **arguments) + 50_000, "cpu": "9MB"}, **arguments)
        wanted, found = logits(model, ids), list[bool]()

        def run(model: Any = model, ids: Any = ids, wanted: Any = wanted, found: Any = found) -> None:
            found.append(torch.equal(logits(model, ids), wanted))

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [True] * 4


@pytest.mark.skipif(DEVICE != "cpu:0", reason="a forked process cannot use a device, as with CUDA")
def test_a_forked_process_goes_on_with_reads_of_its_own(mixture: Any, opt: Callable[..., Path]) -> None:
    for folder, arguments, ids in both(mixture, opt):
        model = load(folder, {DEVICE: least(folder, **arguments) + 50_000, "cpu": "9MB"}, **arguments)
        wanted = logits(model, ids)

        def right(model: Any = model, ids: Any = ids, wanted: Any = wanted) -> bool:
            return bool(torch.equal(logits(model, ids), wanted))

        assert in_a_fork(right)
        assert right()


# --- what people do with it


def test_it_is_saved_copied_and_closed(mixture: Any, opt: Callable[..., Path], tmp_path: Path) -> None:
    for number, (folder, arguments, ids) in enumerate(both(mixture, opt)):
        model = load(folder, **arguments)
        wanted = logits(model, ids)
        assert torch.equal(logits(copy.deepcopy(model), ids), wanted)
        model.save_pretrained(tmp_path / str(number))
        assert torch.equal(logits(load(tmp_path / str(number), **arguments), ids), wanted)
        norm = next(name for name in model.state_dict() if "norm" in name and name.endswith("weight"))
        model.get_parameter(norm).data.mul_(0.5)
        model.save_pretrained(tmp_path / f"changed{number}")
        changed = logits(load(tmp_path / f"changed{number}", **arguments), ids)
        assert torch.equal(changed, logits(model, ids))
        assert not torch.equal(changed, wanted)
        hf_flash.close(model)
        hf_flash.close(model)
        with pytest.raises(UsageError, match="closed"):
            logits(model, ids)
        assert hf_flash.stats(model).window_bytes == 0


@pytest.mark.parametrize("kind", ["experts", "neurons"])
def test_moving_it_is_refused_before_anything_moves(kind: str, mixture: Any, opt: Callable[..., Path]) -> None:
    folder, arguments, ids = both(mixture, opt)[kind == "neurons"]
    model = load(folder, **arguments)
    wanted = logits(model, ids)
    assert model.to(DEVICE) is model
    moves: list[Callable[[], Any]] = [lambda: model.to("mps"), lambda: model.to(device="cuda:0"), lambda: model.cuda()]
    if DEVICE != "cpu:0":
        moves += [model.cpu, lambda: model.to("cpu"), lambda: model.to("standin:0"), lambda: model.to("standin")]
        moves += [lambda: torch.nn.Module.to(model, "cpu")]
    for move in moves:
        with pytest.raises(UsageError, match=r"stays there[\s\S]*to do"):
            move()
        assert torch.equal(logits(model, ids), wanted)
    if DEVICE != "cpu:0":
        with pytest.raises(UsageError, match="stays there"):
            model.model.cpu()  # torch moves a part's parts one after the other
        assert torch.equal(logits(model.to(DEVICE), ids), wanted)


def test_a_table_that_is_changed_comes_into_the_devices_memory(mixture: Any) -> None:
    folder, _, ids = mixture("qwen3_moe")
    model = load(folder, {DEVICE: least(folder)})
    wanted = logits(model, ids)
    model.resize_token_embeddings(model.config.vocab_size + 3)
    assert model.get_input_embeddings().weight.device == model.get_output_embeddings().weight.device
    torch.testing.assert_close(logits(model, ids)[..., : wanted.shape[-1]], wanted)


def test_closing_gives_the_devices_memory_back(mixture: Any, opt: Callable[..., Path]) -> None:
    if DEVICE == "cpu:0":
        pytest.skip("nobody counts the memory of this device")
    for folder, arguments, ids in both(mixture, opt):
        before = torch.accelerator.memory_allocated(DEVICE)
        model = load(folder, **arguments)
        logits(model, ids)
        hf_flash.close(model)
        gc.collect()
        rest = sum(-(-t.nbytes // 512) * 512 for t in {id(t): t for t in [*model.parameters(), *model.buffers()]}.values())
        assert torch.accelerator.memory_allocated(DEVICE) - before <= rest
        del model
        gc.collect()
        assert torch.accelerator.memory_allocated(DEVICE) <= before


def test_out_of_memory_on_the_device_leaves_the_model_whole(mixture: Any, opt: Callable[..., Path]) -> None:
    if DEVICE == "cpu:0":
        pytest.skip("this device has no memory of its own")
    for folder, arguments, ids in both(mixture, opt):
        model = load(folder, {DEVICE: least(folder, **arguments) + 50_000, "cpu": "9MB"}, **arguments)
        wanted, failed = logits(model, ids), 0
        held = torch.accelerator.memory_allocated(DEVICE)
        for room in range(0, 40_000, 500):
            before = torch.standin.set_memory_limit(held + room)  # type: ignore[attr-defined]
            try:
                logits(model, ids)
            except torch.OutOfMemoryError:
                failed += 1
            finally:
                torch.standin.set_memory_limit(before)  # type: ignore[attr-defined]
            assert torch.equal(logits(model, ids), wanted), room
        assert failed


def test_a_pipeline_runs_there(mixture: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        TINY_OPT, quantization_config=FlashOffloadConfig(predictor="none"), device_map=DEVICE, dtype=torch.float32
    )
    wanted = AutoModelForCausalLM.from_pretrained(TINY_OPT, dtype=torch.float32)
    found = [
        pipeline("text-generation", model=one, tokenizer=str(TINY_OPT), **device)("In the", max_new_tokens=6, do_sample=False)
        for one, device in ((model, {}), (wanted, {"device": "cpu"}))
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("budget", [
    {"cpu": "9MB", "xpu:3": 1}, {"cuda:7": "1GB"}, {DEVICE: "x"}, {DEVICE: 0}, {}, {"disk": 5}, {True: 5}, {"": 5},
    f"{DEVICE}=1GB,cuda:9=4", f"{DEVICE}=", "=5",
], ids=str)  # fmt: skip
def test_a_budget_that_makes_no_sense_is_refused(budget: Any, mixture: Any) -> None:
    with pytest.raises(ConfigError, match="memory_budget"):
        load(mixture("qwen3_moe")[0], budget)


def test_budgets_may_be_text_and_the_hosts_may_be_too_small(mixture: Any, opt: Callable[..., Path]) -> None:
    for folder, arguments, _ in both(mixture, opt):
        found = hf_flash.stats(load(folder, f"{DEVICE}=1GB, cpu=9MB", **arguments))
        assert found.budget_bytes == 1_000_000_000
        with pytest.raises(BudgetError, match="this machine's part"):
            load(folder, {DEVICE: "1GB", "cpu": 100}, **arguments)


@pytest.mark.parametrize(
    "device_map",
    [
        {"": "disk"},
        {"model": DEVICE, "lm_head": "cpu"},
        {"": "xpu:0"},
        {},
        {"": None},
        *([{"": "standin:5"}] if DEVICE != "cpu:0" else []),
    ],
    ids=str,
)
def test_device_maps_that_make_no_sense_are_refused(device_map: Any, mixture: Any) -> None:
    with pytest.raises(ConfigError, match=r"device_map[\s\S]*to do"):
        AutoModelForCausalLM.from_pretrained(
            mixture("qwen3_moe")[0], quantization_config=FlashOffloadConfig(), device_map=device_map
        )
