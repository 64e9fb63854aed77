"""Mixtures of experts: as stock, within any budget, whatever happens in between."""

from __future__ import annotations

import copy
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hf_flash
from hf_flash import BudgetError, ConfigError, FlashOffloadConfig, StoreError, UsageError
from hf_flash.compute import library as native
from hf_flash.runtime.experts import FlashExperts
from hf_flash.runtime.model import runtime_of
from tests.answering import answers, check_rounds_as_stock, logits
from tests.conftest import in_a_fork, interrupting, slow_but, torch_threads

TYPES = ("qwen3_moe", "gpt_oss", "nemotron_h", "mixtral")  # gate and up apart; turned, biases; no gate; other names


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    with torch_threads(1):
        yield


def load(folder: Path, budget: int | str | None = None, **arguments: Any) -> Any:
    kwargs = {name: arguments.pop(name) for name in ("dtype",) if name in arguments}
    config = FlashOffloadConfig(memory_budget=budget, **arguments)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **kwargs)


def least(folder: Path, **arguments: Any) -> int:
    with pytest.raises(BudgetError) as caught:
        load(folder, 1, **arguments)
    assert caught.value.minimum_bytes is not None
    return caught.value.minimum_bytes


# --- contract C3 and C5: any budget, any reader, with and without the compiled part


@pytest.mark.parametrize("model_type", slow_but(TYPES[:2], TYPES))
@pytest.mark.parametrize("reader", ["direct", "mmap"])
def test_answers_depend_on_neither_budget_nor_history(model_type: str, reader: str, mixture: Any) -> None:
    folder, stock, ids = mixture(model_type)
    floor, wanted = least(folder, reader=reader), answers(stock, ids)
    plenty = load(folder, "1GB", reader=reader)
    first = answers(plenty, ids)
    for one, other in zip(first, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert all(map(torch.equal, answers(plenty, ids), first)), "the second time, with experts in memory"
    slots = sum(runtime_of(plenty).plan.slot_bytes)
    for room in (0, 1, 2, 3):
        tight = load(folder, floor + room * slots, reader=reader)
        for turn in range(2):
            assert all(map(torch.equal, answers(tight, ids), first)), (room, turn)
        found = hf_flash.stats(tight)
        assert found.capacity == room
        assert found.dram_bytes <= found.budget_bytes == floor + room * slots


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "mixtral"])
def test_guesses_change_bytes_and_nothing_else(model_type: str, mixture: Any) -> None:
    """`lookahead=1`: the router is asked before attention runs, and may be wrong."""
    folder, _, ids = mixture(model_type)
    floor, wanted = least(folder, reader="direct"), answers(load(folder, "1GB", reader="direct"), ids)
    slots, guessed = sum(runtime_of(load(folder, "1GB")).plan.slot_bytes), 0
    for room in (0, 1, 2, 3):
        model = load(folder, floor + room * slots, reader="direct", lookahead=1)
        for turn in range(3):
            assert all(map(torch.equal, answers(model, ids), wanted)), (room, turn)
        count = hf_flash.stats(model).counters
        assert count.ahead_used <= count.ahead
        guessed += count.ahead_used
        for ffn in runtime_of(model).ffns:
            ffn.step.settle()
            assert ffn.window.resident + ffn.window.free == ffn.window.capacity == room
    assert guessed


@pytest.mark.parametrize("model_type", TYPES)
def test_torch_alone_computes_the_same(model_type: str, mixture: Any) -> None:
    folder, stock, ids = mixture(model_type)
    with native.switched_off():
        model = load(folder, least(folder) + 100_000, reader="direct")
        for one, other in zip(answers(model, ids), answers(stock, ids), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("model_type", slow_but(TYPES[:2], TYPES))
def test_in_another_dtype_than_the_file_it_is_as_stock(
    model_type: str, dtype: torch.dtype, mixture: Any, tmp_path: Path
) -> None:
    folder, _, ids = mixture(model_type)
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path)
    wide = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    check_rounds_as_stock(load(tmp_path, dtype=dtype), wide, ids)


def test_a_batch_does_not_change_a_sequence(mixture: Any) -> None:
    folder, _, ids = mixture("qwen3_moe")
    model = load(folder)
    torch.testing.assert_close(logits(model, ids)[1:], logits(model, ids[1:]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", [
    {"num_beams": 3}, {"cache_implementation": "static"}, {"do_sample": True, "seed": 3}, {"prompt_lookup_num_tokens": 3},
    {"num_return_sequences": 2, "num_beams": 2},
], ids=str)  # fmt: skip
def test_generating_gives_the_stock_tokens(how: dict[str, Any], mixture: Any) -> None:
    folder, stock, ids = mixture("qwen3_moe")
    seed = how.get("seed")
    how = {"max_new_tokens": 8, "do_sample": False} | {name: value for name, value in how.items() if name != "seed"}
    found = []
    for model in (load(folder, least(folder) + 200_000), stock):
        torch.manual_seed(seed or 0)
        found.append(model.generate(ids[:1], attention_mask=torch.ones_like(ids[:1]), **how).tolist())
    assert found[0] == found[1]


def test_experts_may_be_called_by_themselves(mixture: Any) -> None:
    """With ids of any integer type, ids of no expert, an expert twice, and no token."""
    folder, stock, _ = mixture("qwen3_moe")
    name = "model.layers.1.mlp.experts"
    ours, theirs = load(folder).get_submodule(name), stock.get_submodule(name)
    x, weights = torch.randn(3, 64), torch.rand(3, 2)
    index = torch.tensor([[0, 3], [2, 2], [1, 0]])
    with torch.no_grad():
        wanted = theirs(x, index, weights)
        for kind in (torch.int64, torch.int32, torch.uint8):
            torch.testing.assert_close(ours(x, index.to(kind), weights), wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            ours(x.repeat(9, 1), index.repeat(9, 1), weights.repeat(9, 1))[:3], wanted, rtol=1e-4, atol=1e-4
        )
        twice = torch.tensor([[2, 2]])
        torch.testing.assert_close(ours(x[:1], twice, weights[:1]), theirs(x[:1], twice, weights[:1]), rtol=1e-4, atol=1e-4)
        elsewhere = ours(x, torch.tensor([[0, 4], [2, 2], [-1, 0]]), weights)  # as experts of another process have them
        alone = theirs(x, index, weights * torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]))
        torch.testing.assert_close(elsewhere, alone, rtol=1e-4, atol=1e-4)
        assert ours(x[:0], index[:0], weights[:0]).shape == (0, 64)
        for wrong in ((x, index[:2], weights[:2]), (x, index, weights[:2]), (x, index[0], weights[0])):
            with pytest.raises(UsageError, match="experts are called with"):
                ours(*wrong)


def test_biases_that_do_not_fit_are_refused(mixture: Any) -> None:
    folder, _, ids = mixture("gpt_oss")
    model = load(folder)
    experts = model.get_submodule("model.layers.0.mlp.experts")
    experts.down_proj_bias = torch.nn.Parameter(experts.down_proj_bias.detach()[:2])
    with pytest.raises(UsageError, match="biases do not fit"):
        model(ids)


# --- what it reads, and what it says


def test_nothing_is_written_and_counters_say_what_was_read(
    mixture: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _, ids = mixture("qwen3_moe")
    monkeypatch.setenv("HF_FLASH_CACHE", str(tmp_path / "cache"))
    before = sorted((path.name, path.stat().st_mtime_ns) for path in folder.iterdir())
    model = load(folder, "1GB", reader="direct")
    assert not (tmp_path / "cache").exists()
    logits(model, ids)
    first = hf_flash.stats(model, reset=True)
    assert first.counters.hits == 0
    assert first.counters.read_bytes >= first.counters.missing_bytes > 0
    logits(model, ids)
    again = hf_flash.stats(model)
    assert again.hit_rate == 1
    assert again.counters.read_bytes == 0
    assert again.tokens == ids.numel()
    assert again.resident_experts == (again.experts,) * again.layers  # type: ignore[attr-defined]
    assert "expert hit rate" in str(again)
    assert again.to_dict()["experts_per_token"] == 2
    assert sorted((path.name, path.stat().st_mtime_ns) for path in folder.iterdir()) == before


def test_of_a_prompt_each_missing_expert_is_read_once(mixture: Any) -> None:
    folder, _, ids = mixture("qwen3_moe")
    model = load(folder, least(folder), reader="direct")
    logits(model, ids)
    count = hf_flash.stats(model).counters
    assert count.missing_bytes == count.selected * runtime_of(model).engine.reader.layers[0].expert_bytes


# --- faults


def test_after_an_interruption_answers_are_right(mixture: Any) -> None:
    folder, _, ids = mixture("qwen3_moe")
    model = load(folder, least(folder) + 100_000, reader="direct")
    wanted = logits(model, ids)
    for turn in range(40):
        try:
            with interrupting(0.0002 * turn):
                logits(model, ids)
        except KeyboardInterrupt:
            pass
        assert torch.equal(logits(model, ids), wanted), turn
    window = runtime_of(model).ffns[0].window
    assert window.resident + window.free == window.capacity


def test_a_forked_process_goes_on_with_reads_of_its_own(mixture: Any) -> None:
    folder, _, ids = mixture("qwen3_moe")
    model = load(folder, least(folder) + 100_000, reader="direct")
    wanted = logits(model, ids)
    assert in_a_fork(lambda: bool(torch.equal(logits(model, ids), wanted)))
    assert torch.equal(logits(model, ids), wanted)


def test_several_threads_use_one_model(mixture: Any) -> None:
    folder, _, ids = mixture("qwen3_moe")
    model = load(folder, least(folder) + 100_000, reader="direct")
    wanted, found = logits(model, ids), list[bool]()
    threads = [threading.Thread(target=lambda: found.append(torch.equal(logits(model, ids), wanted))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 4


def shards(folder: Path, target: Path, count: int) -> Path:
    """The same checkpoint, its tensors dealt out to files: an expert's parts lie in different ones."""
    target.mkdir()
    state = load_file(folder / "model.safetensors")
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    where = {tensor: names[number % count] for number, tensor in enumerate(sorted(state))}
    for name in names:
        save_file({tensor: state[tensor] for tensor in state if where[tensor] == name}, target / name, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    return target


@pytest.mark.parametrize("model_type", slow_but(TYPES[:2], TYPES))
def test_experts_may_lie_in_several_files(model_type: str, mixture: Any, tmp_path: Path) -> None:
    folder, stock, ids = mixture(model_type)
    model = load(shards(folder, tmp_path / "sharded", 5), reader="direct")
    torch.testing.assert_close(logits(model, ids), logits(stock, ids), rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits(load(tmp_path / "saved"), ids), logits(stock, ids), rtol=1e-4, atol=1e-4)


def change(folder: Path, target: Path, how: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    target.mkdir()
    state = load_file(folder / "model.safetensors")
    how(state)
    save_file(state, target / "model.safetensors", {"format": "pt"})
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    return target


EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"


def remove_layer(state: dict[str, torch.Tensor]) -> None:
    for name in [name for name in state if "layers.1.mlp.experts" in name]:
        del state[name]


@pytest.mark.parametrize(("how", "said"), [
    (lambda state: state.pop(EXPERT), "layers.1.mlp.experts.gate_up_proj"),
    (lambda state: state.update({EXPERT: state[EXPERT][:-1].contiguous()}), EXPERT),
    (lambda state: state.update({EXPERT: state[EXPERT].T.contiguous()}), "layers.1.mlp.experts.gate_up_proj"),
    (lambda state: state.update({EXPERT: state[EXPERT].half()}), "layers.1.mlp.experts"),
    (remove_layer, "layers.1.mlp.experts.gate_up_proj"),
], ids=["missing", "short", "turned", "dtype", "none"])  # fmt: skip
def test_experts_that_do_not_fit_are_refused_by_name(how: Any, said: str, mixture: Any, tmp_path: Path) -> None:
    folder, _, _ = mixture("qwen3_moe")
    with pytest.raises(hf_flash.HfFlashError) as caught:
        load(change(folder, tmp_path / "changed", how))
    assert said in str(caught.value)


def test_a_file_that_was_cut_or_changed_is_an_error_that_names_the_expert(mixture: Any, tmp_path: Path) -> None:
    folder, _, ids = mixture("qwen3_moe")
    for what in (lambda file: os.truncate(file, file.stat().st_size // 2), lambda file: os.utime(file, (1, 1))):
        copied = change(folder, tmp_path / f"copy{what.__code__.co_firstlineno}{id(what)}", lambda state: None)
        model = load(copied, least(copied), reader="direct")
        embedded = model.get_input_embeddings()(ids)
        what(copied / "model.safetensors")
        with pytest.raises(StoreError) as caught:
            model(inputs_embeds=embedded)
        assert "expert " in str(caught.value)
        assert "model.layers.0.mlp.experts" in str(caught.value)


def test_another_link_to_the_file_is_no_change(mixture: Any, tmp_path: Path) -> None:
    folder, _, ids = mixture("qwen3_moe")
    copied = change(folder, tmp_path / "copy", lambda state: None)
    model = load(copied, least(copied), reader="direct")
    wanted = logits(model, ids)
    os.link(copied / "model.safetensors", tmp_path / "link")
    assert torch.equal(logits(model, ids), wanted)


def test_a_budget_that_is_too_small_says_what_is_needed(mixture: Any) -> None:
    folder, _, _ = mixture("mixtral")
    with pytest.raises(BudgetError) as caught:
        load(folder, 1000)
    assert "slots" not in str(caught.value).splitlines()[0]
    assert load(folder, caught.value.minimum_bytes) is not None


def test_a_mixture_needs_no_predictor(mixture: Any) -> None:
    folder, *_ = mixture("mixtral")
    with pytest.raises(ConfigError, match="router"):
        load(folder, predictor="quantized")
    assert load(folder, predictor="none") is not None


# --- nothing is lost (contract C7)


def test_saved_it_is_the_checkpoint_as_it_was(mixture: Any, tmp_path: Path) -> None:
    folder, stock, ids = mixture("mixtral")
    model = load(folder)
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert isinstance(again.get_submodule("model.layers.0.mlp.experts"), FlashExperts)
    torch.testing.assert_close(logits(again, ids), logits(stock, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [1, 4])
def test_what_was_changed_in_memory_is_saved(count: int, mixture: Any, tmp_path: Path) -> None:
    folder, stock, ids = mixture("mixtral")
    source = folder if count == 1 else shards(folder, tmp_path / "sharded", count)
    changed = copy.deepcopy(stock)
    model = load(source)
    for one in (model, changed):
        for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.gate.weight"):
            one.get_parameter(name).data.mul_(0.5)
    model.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits(load(tmp_path / "saved"), ids), logits(changed, ids), rtol=1e-4, atol=1e-4)
    with pytest.raises(UsageError, match="another folder"):
        model.save_pretrained(source)


def test_the_state_dict_has_the_experts(mixture: Any, tmp_path: Path) -> None:
    folder, stock, _ = mixture("gpt_oss")
    model = load(folder)
    state, wanted = model.state_dict(), stock.state_dict()
    assert state.keys() == wanted.keys()
    assert all(state[name].shape == value.shape and torch.equal(state[name] + 0, value) for name, value in wanted.items())
    model.load_state_dict(wanted)
    name = "model.layers.0.mlp.experts.down_proj"
    with pytest.raises(UsageError, match="only read"):
        model.load_state_dict(wanted | {name: wanted[name] + 1})
    with pytest.raises(UsageError, match="only read"):
        model.get_submodule("model.layers.0.mlp.experts").down_proj = torch.nn.Parameter(wanted[name] + 1)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    assert torch.equal(torch.load(tmp_path / "state.pt")[name], wanted[name])


def test_a_copy_shares_what_is_on_flash(mixture: Any) -> None:
    folder, _, ids = mixture("gpt_oss")
    model = load(folder, least(folder) + 100_000)
    wanted, copied = logits(model, ids), copy.deepcopy(model)
    assert torch.equal(logits(copied, ids), wanted)
    assert runtime_of(copied).ffns[0].window is runtime_of(model).ffns[0].window
    del model
    assert torch.equal(logits(copied, ids), wanted)


def test_what_cannot_be_done_is_refused_by_name(mixture: Any) -> None:
    folder, _, ids = mixture("qwen3_moe")
    model = load(folder)
    with pytest.raises(UsageError, match="inference only"):
        model.train()(ids)
    model.eval()
    with pytest.raises(UsageError, match="no gradients"):
        model(inputs_embeds=model.get_input_embeddings()(ids).detach().requires_grad_()).logits.sum().backward()
    with pytest.raises(UsageError, match="dtype"):
        model.half()
    hf_flash.close(model)
    hf_flash.close(model)
    with pytest.raises(UsageError, match="closed"):
        model(ids)
