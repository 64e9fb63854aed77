"""The answer never depends on the cache (contract C3).

What is in DRAM, how much of it there is, how bytes arrive and what was asked before decide how long a call takes. The same
call gives the same bits; the same token in a call of another shape gives the same up to rounding, as in stock transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import hf_flash
from hf_flash import FlashOffloadConfig
from tests.conftest import slow_but, torch_threads


class Model(NamedTuple):
    """What the answer may depend on: weights, predictor, dtype."""

    shape: str
    stored: torch.dtype
    dtype: torch.dtype
    predictor: str = "quantized"
    bits: int = 4
    threads: int = 1


class Memory(NamedTuple):
    """What it may not depend on."""

    window: int
    budget: str
    reader: str
    lookahead: int = 0


class Call(NamedTuple):
    """Rows of random prompts, left-padded by 0, 1, 2 ... tokens, then `steps` decoded tokens a row."""

    seed: int
    rows: int
    length: int
    steps: int


FULL, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
MODELS = [
    Model("pre_ln", FULL, FULL),
    Model("pre_ln", FULL, BRAIN, bits=8),
    Model("post_ln", HALF, HALF),
    Model("no_bias", FULL, BRAIN),
    Model("odd", BRAIN, BRAIN),
    Model("odd", FULL, FULL, "none"),
]
REAL = [
    Model("tiny_opt", HALF, FULL, threads=2),
    Model("tiny_opt", HALF, HALF),
    Model("tiny_opt", HALF, BRAIN),
    Model("tiny_opt", HALF, FULL, "none"),
]
MEMORIES = [
    Memory(1, "minimum", "mmap"),
    Memory(50, "minimum", "direct"),
    Memory(1, "a few bundles", "direct", 1),
    Memory(5, "a few bundles", "mmap"),
    Memory(5, "half", "direct", 1),
    Memory(50, "half", "mmap", 1),
    Memory(1, "unlimited", "mmap"),
    Memory(50, "unlimited", "direct"),
]
REFERENCE = Memory(5, "unlimited", "mmap")
SHARES = {"minimum": 0.0, "a few bundles": 0.03, "half": 0.5}

a_call = st.builds(Call, st.integers(0, 5), st.integers(1, 3), st.integers(1, 12), st.integers(0, 4))
some_calls = st.lists(a_call, min_size=2, max_size=4)
few_examples = settings(
    max_examples=3,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # a model remembers its history, so that a failure does not shrink
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@dataclass
class Zoo:
    """Loaded models, and what the reference said to the calls so far."""

    folder: Callable[[Model], Path]
    loaded: dict[tuple[Model, Memory], Any] = field(default_factory=dict)
    answers: dict[tuple[Model, Call], torch.Tensor] = field(default_factory=dict)

    def load(self, model: Model, memory: Memory = REFERENCE) -> Any:
        """A model that other tests may have used before: one more history."""
        if (model, memory) not in self.loaded:
            self.loaded[model, memory] = self.load_fresh(model, memory)
        return self.loaded[model, memory]

    def load_fresh(self, model: Model, memory: Memory) -> Any:
        budget = None
        if memory.budget != "unlimited":
            free = hf_flash.stats(self.load(model, Memory(5, "unlimited", memory.reader)))
            budget = free.minimum_bytes + int(SHARES[memory.budget] * free.window_bytes)
        config = FlashOffloadConfig(
            predictor=model.predictor,
            predictor_bits=model.bits,
            window=memory.window,
            memory_budget=budget,
            reader=memory.reader,
            lookahead=memory.lookahead,
        )
        return AutoModelForCausalLM.from_pretrained(self.folder(model), dtype=model.dtype, quantization_config=config)

    def answer(self, model: Model, call: Call) -> torch.Tensor:
        if (model, call) not in self.answers:
            self.answers[model, call] = run(self.load(model), call)
        return self.answers[model, call]


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Two threads where a test says so. Elsewhere one: waiting for each other on a busy machine would cost minutes."""
    with torch_threads(2 if "threads=2" in request.node.name else 1):
        yield


@pytest.fixture(scope="module")
def zoo(opt: Callable[..., Path], tiny_opt: Path) -> Zoo:
    return Zoo(lambda model: tiny_opt if model.shape == "tiny_opt" else opt(model.shape, dtype=model.stored))


def prompt(model: Any, call: Call) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(call.seed)
    ids = torch.randint(3, model.config.vocab_size, (call.rows, call.length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(call.rows):
        padding = min(row, call.length - 1)
        mask[row, :padding], ids[row, :padding] = 0, model.config.pad_token_id
    return {"input_ids": ids, "attention_mask": mask}


class Request:
    """A call that is worked off one forward at a time."""

    def __init__(self, model: Any, call: Call) -> None:
        self.model, self.call, self.logits, self.cache = model, call, [], None
        self.inputs = prompt(model, call)

    @torch.no_grad()
    def step(self) -> None:
        out = self.model(**self.inputs, past_key_values=self.cache, use_cache=True)
        self.logits.append(out.logits * (self.inputs["attention_mask"][:, -out.logits.shape[1] :, None] == 1))
        self.cache = out.past_key_values
        mask = torch.nn.functional.pad(self.inputs["attention_mask"], (0, 1), value=1)
        self.inputs = {"input_ids": out.logits[:, -1:].argmax(-1), "attention_mask": mask}

    def answer(self) -> torch.Tensor:
        """[rows, tokens, vocabulary], zero where there is padding."""
        while len(self.logits) <= self.call.steps:
            self.step()
        return torch.cat(self.logits, dim=1)


def run(model: Any, call: Call) -> torch.Tensor:
    return Request(model, call).answer()


# --- the same call: the same bits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", slow_but(MEMORIES[::2], MEMORIES), ids=str)
@pytest.mark.parametrize("model", MODELS, ids=str)
@few_examples
@given(calls=some_calls)
def test_any_sequence_of_calls_has_the_same_bits_in_any_memory(
    zoo: Zoo, model: Model, memory: Memory, calls: list[Call]
) -> None:
    flash = zoo.load(model, memory)
    for call in calls:
        assert torch.equal(run(flash, call), zoo.answer(model, call)), call


@pytest.mark.parametrize("memory", [MEMORIES[i] for i in (0, 3, 4, 7)], ids=str)
@pytest.mark.parametrize("model", REAL, ids=str)
def test_a_trained_model_has_the_same_bits_in_any_memory(zoo: Zoo, model: Model, memory: Memory) -> None:
    flash = zoo.load(model, memory)
    for call in (Call(0, 1, 1, 2), Call(1, 1, 20, 3), Call(2, 3, 6, 1), Call(0, 1, 1, 2)):
        assert torch.equal(run(flash, call), zoo.answer(model, call)), call


@pytest.mark.parametrize("model", MODELS[:3], ids=str)
@few_examples
@given(data=st.data(), calls=some_calls)
def test_the_order_of_requests_changes_nothing(zoo: Zoo, model: Model, data: st.DataObject, calls: list[Call]) -> None:
    flash = zoo.load(model, Memory(5, "half", "direct"))
    wanted = {call: run(flash, call) for call in calls}
    for call in data.draw(st.permutations(calls)):
        assert torch.equal(run(flash, call), wanted[call]), call


@pytest.mark.parametrize("model", MODELS[:3], ids=str)
@few_examples
@given(data=st.data(), calls=some_calls)
def test_requests_that_take_turns_change_nothing(zoo: Zoo, model: Model, data: st.DataObject, calls: list[Call]) -> None:
    flash = zoo.load(model, Memory(5, "a few bundles", "mmap"))
    requests = [Request(flash, call) for call in calls]
    turns = [request for request in requests for _ in range(request.call.steps + 1)]
    for request in data.draw(st.permutations(turns)):
        request.step()
    for request in requests:
        assert torch.equal(request.answer(), zoo.answer(model, request.call)), request.call


@pytest.mark.parametrize("memory", MEMORIES[::3], ids=str)
@pytest.mark.parametrize("model", [MODELS[0], MODELS[4]], ids=str)
def test_a_history_leaves_no_trace(zoo: Zoo, model: Model, memory: Memory) -> None:
    call = Call(3, 2, 5, 2)
    fresh, used = zoo.load_fresh(model, memory), zoo.load_fresh(model, memory)
    for other in (Call(0, 1, 30, 0), Call(1, 3, 7, 3), Call(2, 1, 1, 20)):
        run(used, other)
    assert torch.equal(run(used, call), run(fresh, call))


def test_requests_of_several_threads_have_the_same_bits(zoo: Zoo) -> None:
    model, calls = MODELS[0], [Call(seed, 1 + seed % 2, 6, 3) for seed in range(6)]
    wanted = [zoo.answer(model, call) for call in calls]
    flash = zoo.load(model, Memory(5, "half", "direct"))
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda call: run(flash, call), calls))
    assert all(torch.equal(a, b) for a, b in zip(answers, wanted, strict=True))


@pytest.mark.parametrize("memory", MEMORIES, ids=str)
def test_beam_search_finds_the_same_tokens_in_any_memory(zoo: Zoo, memory: Memory) -> None:
    def search(flash: Any) -> torch.Tensor:
        inputs = prompt(flash, Call(4, 2, 6, 0))
        tokens: torch.Tensor = flash.generate(**inputs, num_beams=3, max_new_tokens=8, do_sample=False)
        return tokens

    assert torch.equal(search(zoo.load(MODELS[0], memory)), search(zoo.load(MODELS[0])))


def test_the_memories_of_this_file_really_differ(zoo: Zoo) -> None:
    read = {}
    for memory in MEMORIES:
        flash = zoo.load_fresh(MODELS[0], memory)
        for _ in range(2):
            run(flash, Call(0, 1, 4, 8))
        found = hf_flash.stats(flash)
        assert (found.window, found.reader) == (memory.window, memory.reader)
        assert found.dram_bytes <= found.budget_bytes
        read[memory.window, memory.budget] = found.counters.missing_bytes, found.capacity
    assert read[1, "minimum"][1] == 0 < read[5, "a few bundles"][1] < read[5, "half"][1] < read[1, "unlimited"][1]
    assert read[1, "minimum"][0] > read[50, "half"][0] > read[50, "unlimited"][0]


# --- the same token in a call of another shape: the same up to rounding -----------------------------------------------


def assert_differs_by_rounding(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Some eps of the largest logit: every layer rounds the residual stream twice, and sums take another order."""
    share = (64 if wanted.dtype == torch.float32 else 4) * torch.finfo(wanted.dtype).eps
    bound = share * wanted.abs().max().item()
    torch.testing.assert_close(got.float(), wanted.float(), rtol=0, atol=bound)


@pytest.mark.parametrize("model", [*MODELS, *REAL], ids=str)
@pytest.mark.parametrize("memory", [REFERENCE, MEMORIES[3]], ids=str)
def test_a_row_in_a_batch_is_the_row_alone_up_to_rounding(zoo: Zoo, model: Model, memory: Memory) -> None:
    flash = zoo.load(model, memory)
    batch = prompt(flash, Call(5, 4, 9, 0))["input_ids"]
    with torch.no_grad():
        together = flash(batch).logits
        for row in range(len(batch)):
            assert_differs_by_rounding(together[row], flash(batch[row : row + 1]).logits[0])


@pytest.mark.parametrize("model", [*MODELS, *REAL], ids=str)
@pytest.mark.parametrize("memory", [REFERENCE, MEMORIES[3]], ids=str)
def test_decoding_says_what_a_prefill_says_up_to_rounding(zoo: Zoo, model: Model, memory: Memory) -> None:
    flash = zoo.load(model, memory)
    ids, cache, steps = prompt(flash, Call(6, 1, 10, 0))["input_ids"], None, []
    with torch.no_grad():
        for at in range(ids.shape[1]):
            out = flash(ids[:, at : at + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
        assert_differs_by_rounding(torch.cat(steps, dim=1), flash(ids).logits)
