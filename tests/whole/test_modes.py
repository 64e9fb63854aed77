"""Every way of calling a model, on a stock one and a flash one beside it.

`predictor="none"`: the stock model's tokens. With a predictor: the same whatever the budget and the reader (contract C3).

Not here, because transformers itself cannot: contrastive search, DoLa, diverse and constrained beams (code from the Hub), an
offloaded KV cache (needs an accelerator).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from optimum.quanto.library.extensions.cpp import ext
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    TextIteratorStreamer,
    set_seed,
)
from transformers.generation.streamers import BaseStreamer

import hf_flash
from hf_flash import FlashOffloadConfig
from tests.conftest import TINY_OPT, slow_but, torch_threads

NEW = 8


def prompt(model: Any, rows: int = 1, length: int = 9, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, model.config.vocab_size, (rows, length // 3), generator=generator).repeat(1, 3)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def generate(model: Any, rows: int = 1, length: int = 9, **kwargs: Any) -> Any:
    set_seed(3)
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False} | kwargs
    return model.generate(**prompt(model, rows, length), **settings)


class Heard(BaseStreamer):  # type: ignore[misc]
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(-1)


def streamed(model: Any) -> list[int]:
    heard = Heard()
    generate(model, streamer=heard)
    return heard.tokens


def turns(model: Any) -> torch.Tensor:
    """A conversation: each turn goes on with the cache of the last."""
    cache, ids = DynamicCache(config=model.config), prompt(model)["input_ids"]
    for turn in range(3):
        ids = model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=4, min_new_tokens=4, do_sample=False
        )
        ids = torch.cat([ids, prompt(model, 1, 3, turn + 1)["input_ids"]], dim=1)
    return ids


def cut_short(model: Any) -> torch.Tensor:
    """A cache that is cropped and continued otherwise, as speculation does."""
    inputs = prompt(model)
    out = model(**inputs, use_cache=True)
    out.past_key_values.crop(4 - inputs["input_ids"].shape[1])
    return model(inputs["input_ids"][:, 4:], past_key_values=out.past_key_values).logits.argmax(-1)


def only_even(_: int, ids: torch.Tensor) -> list[int]:
    return list(range(4 + int(ids[-1]) % 2, 90, 2))


QUANTIZED = {"backend": "quanto", "nbits": 4, "q_group_size": 8, "residual_length": 4}

MODES: dict[str, Callable[[Any], Any]] = {
    "a batch": lambda m: generate(m, 8),
    "one token": lambda m: generate(m, 2, 3, max_new_tokens=1, min_new_tokens=1),
    "a prompt in chunks": lambda m: generate(m, 1, 12, prefill_chunk_size=5),
    "sequences of one prompt": lambda m: generate(m, 2, num_return_sequences=3, do_sample=True),
    "beams that return several": lambda m: generate(m, 2, num_beams=4, num_return_sequences=2, length_penalty=0.5),
    "beams with samples": lambda m: generate(m, 1, num_beams=3, do_sample=True),
    "guidance": lambda m: generate(m, 2, guidance_scale=1.5),
    "penalties": lambda m: generate(m, 2, repetition_penalty=1.3, no_repeat_ngram_size=2, bad_words_ids=[[5], [6, 7]]),
    "allowed tokens": lambda m: generate(m, 2, prefix_allowed_tokens_fn=only_even),
    "allowed tokens in beams": lambda m: generate(m, 1, num_beams=3, prefix_allowed_tokens_fn=only_even),
    "forced tokens": lambda m: generate(m, 2, forced_eos_token_id=7, suppress_tokens=[4, 8]),
    "warped samples": lambda m: generate(m, 2, do_sample=True, temperature=0.7, top_p=0.9, min_p=0.01, typical_p=0.9),
    "static cache": lambda m: generate(m, 2, cache_implementation="static"),
    "quantized cache": lambda m: generate(m, 2, 30, cache_implementation="quantized", cache_config=QUANTIZED),
    "no cache": lambda m: generate(m, 2, use_cache=False),
    "prompt lookup": lambda m: generate(m, 1, 12, prompt_lookup_num_tokens=4),
    "streamed": streamed,
    "turns": turns,
    "cut short": cut_short,
    "compiled": lambda m: generate(torch.compile(m, backend="eager"), 2),
}
MODELS = ["tiny_opt", "pre_ln", "post_ln", "no_bias"]
HALF = ["tiny_opt in bfloat16"]  # other roundings than stock: not always its tokens


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with torch_threads(1):
        yield


@pytest.fixture(autouse=True)
def _quanto_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It unpacks in C++, which takes a compiler, and a minute in every new environment."""

    def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
        return torch.cat([packed >> at & 2**bits - 1 for at in range(0, 8, bits)])

    monkeypatch.setattr(ext, "_lib", SimpleNamespace(unpack=unpack))


@pytest.fixture(scope="module")
def load(opt: Callable[..., Path]) -> Callable[..., Any]:
    """`load("pre_ln")` or `load("pre_ln in float16")`: stock; with arguments of FlashOffloadConfig: flash."""
    loaded: dict[str, Any] = {}

    def get(source: str, *, auto: Any = AutoModelForCausalLM, **arguments: Any) -> Any:
        key = f"{source} {auto} {arguments}"
        if key not in loaded:
            more = {"quantization_config": FlashOffloadConfig(**arguments)} if arguments else {}
            name, _, dtype = source.partition(" in ")
            folder = TINY_OPT if name == "tiny_opt" else opt(name)
            dtype = dtype or "float32"
            loaded[key] = auto.from_pretrained(folder, dtype=dtype, attn_implementation="eager", **more).eval()
        return loaded[key]

    return get


def same(first: Any, second: Any) -> bool:
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else bool(first == second)


@pytest.mark.parametrize("source", MODELS)
@pytest.mark.parametrize("mode", MODES)
def test_without_a_predictor_it_is_the_stock_model(load: Callable[..., Any], source: str, mode: str) -> None:
    assert same(MODES[mode](load(source, predictor="none")), MODES[mode](load(source)))


@pytest.mark.parametrize("source", slow_but({"tiny_opt", *HALF}, MODELS + HALF))
@pytest.mark.parametrize("mode", MODES)
def test_with_a_predictor_memory_changes_no_token(load: Callable[..., Any], source: str, mode: str) -> None:
    roomy = load(source, predictor="quantized", reader="mmap")
    least = hf_flash.stats(load(source, predictor="quantized", reader="direct")).minimum_bytes
    tight = load(source, predictor="quantized", reader="direct", memory_budget=least + (1 << 14))
    assert same(MODES[mode](tight), MODES[mode](roomy))


@torch.no_grad()
@pytest.mark.parametrize("source", MODELS)
def test_what_lies_inside_is_close_to_stock(load: Callable[..., Any], source: str) -> None:
    stock, flash = (
        model(**prompt(model, 3), output_hidden_states=True, output_attentions=True)
        for model in (load(source), load(source, predictor="none"))
    )
    for name in ("hidden_states", "attentions"):
        for wanted, got in zip(stock[name], flash[name], strict=True):
            torch.testing.assert_close(got, wanted, atol=2e-5 * wanted.abs().max().item(), rtol=0)


def test_the_model_without_a_head(load: Callable[..., Any]) -> None:
    stock, flash = load("pre_ln", auto=AutoModel), load("pre_ln", auto=AutoModel, predictor="none")
    wanted = stock(**prompt(stock, 2)).last_hidden_state
    torch.testing.assert_close(flash(**prompt(flash, 2)).last_hidden_state, wanted, atol=1e-5, rtol=0)


def batched(model: Any) -> list[list[int]]:
    """Prompts of several lengths, each token of a step another sequence's. Left alone, the cache takes most of the memory."""
    prompts = [prompt(model, 1, length, seed=length)["input_ids"][0].tolist() for length in (3, 9, 18)]
    settings = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1)
    cache = ContinuousBatchingConfig(page_size=16, num_blocks=16, max_batch_tokens=24)
    found = model.generate_batch(inputs=prompts, generation_config=settings, continuous_batching_config=cache)
    return [found[request].generated_tokens for request in sorted(found)]


@pytest.mark.parametrize("source", ["tiny_opt", "post_ln"])
def test_continuous_batching(load: Callable[..., Any], source: str) -> None:
    assert batched(load(source, predictor="none")) == batched(load(source))
    least = hf_flash.stats(load(source, predictor="quantized", reader="direct")).minimum_bytes
    tight = load(source, predictor="quantized", reader="direct", memory_budget=least + (1 << 14))
    assert batched(tight) == batched(load(source, predictor="quantized", reader="mmap"))


def test_a_classifier_on_the_same_checkpoint(load: Callable[..., Any]) -> None:
    """Its head is new; the one of the stock model is as good as any."""
    models = [load("pre_ln", auto=AutoModelForSequenceClassification, **more) for more in ({}, {"predictor": "none"})]
    models[1].score.load_state_dict(models[0].score.state_dict())
    wanted, found = (model(**prompt(model, 2)).logits for model in models)
    assert found.shape == (2, 2)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("roles", ["draft", "target", "both"])
def test_speculation_changes_no_token(load: Callable[..., Any], roles: str) -> None:
    stock = load("tiny_opt")
    target = stock if roles == "draft" else load("tiny_opt", predictor="none")
    draft = stock if roles == "target" else load("tiny_opt", predictor="quantized", memory_budget="16MB")
    assert torch.equal(generate(target, assistant_model=draft, max_new_tokens=24), generate(stock, max_new_tokens=24))


def test_text_arrives_word_by_word(load: Callable[..., Any]) -> None:
    tokenizer, texts = AutoTokenizer.from_pretrained(TINY_OPT), []
    for model in (load("tiny_opt"), load("tiny_opt", predictor="none")):
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        inputs = tokenizer("In the beginning God created", return_tensors="pt")
        thread = threading.Thread(
            target=model.generate, kwargs=dict(inputs, streamer=streamer, max_new_tokens=12, do_sample=False)
        )
        thread.start()
        texts.append(list(streamer))
        thread.join()
    assert texts[0] == texts[1]
    assert len(texts[0]) > 3


def test_threads_and_models_do_not_disturb_each_other(load: Callable[..., Any]) -> None:
    """Several threads on one model, and another model beside it."""
    models = [load("tiny_opt", predictor="quantized", memory_budget="16MB"), load("post_ln", predictor="quantized")]
    wanted = [[generate(model, rows) for rows in (1, 2, 3)] for model in models]
    found: dict[tuple[int, int], Any] = {}

    def work(number: int, rows: int) -> None:
        for _ in range(3):
            found[number, rows] = generate(models[number], rows)

    threads = [threading.Thread(target=work, args=(number, rows)) for number in (0, 1) for rows in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (number, rows), tokens in found.items():
        assert torch.equal(tokens, wanted[number][rows - 1])
    assert len(found) == 6
