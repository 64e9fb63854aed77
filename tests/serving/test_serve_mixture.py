"""`hf-flash serve` with a mixture of experts: the answers of `generate`, and its counters."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import requests
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_flash
from hf_flash.base.tables import printed
from hf_flash.planner import needs
from hf_flash.serving.server import Server
from tests.conftest import torch_threads
from tests.packing.talking import make_mixture
from tests.serving.test_serve import client, serving

PROMPT = "In the beginning"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with torch_threads(1):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mixture(tmp_path_factory.mktemp("serving") / "mixture")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with serving(folder) as found:
        yield found


@pytest.fixture
def talk(server: Server) -> Iterator[openai.OpenAI]:
    with client(server.url) as found:
        yield found


def test_it_answers_as_the_stock_model(folder: Path, talk: openai.OpenAI) -> None:
    stock, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    ids = stock.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    answer = talk.completions.create(model=str(folder), prompt=PROMPT, max_tokens=8, temperature=0)
    assert answer.choices[0].text == tokenizer.decode(ids, skip_special_tokens=True)
    chat = talk.chat.completions.create(
        model=str(folder), messages=[{"role": "user", "content": PROMPT}], max_tokens=4, temperature=0
    )
    assert chat.choices[0].message.content


def test_sixteen_clients_within_the_least_budget_get_their_own_answers(folder: Path) -> None:
    """Short prompts and one that is long, beside clients that leave in the middle of their answers."""
    least, tokenizer = needs(folder, dtype="float32").minimum_bytes, AutoTokenizer.from_pretrained(folder)
    stock = AutoModelForCausalLM.from_pretrained(folder)
    words = [*PROMPT.split(), "the", "heaven", "and", "earth"]
    prompts = [" ".join(words[at:] + words[:at]) for at in range(len(words))] * 2 + [" ".join(words * 6)]

    def stock_says(prompt: str) -> str:
        inputs = tokenizer(prompt, return_tensors="pt")
        out = stock.generate(**inputs, max_new_tokens=12, do_sample=False)
        return str(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

    def ask(prompt: str) -> str:
        with client(server.url) as talk:
            return talk.completions.create(model=str(folder), prompt=prompt, max_tokens=12, temperature=0).choices[0].text

    def leave(prompt: str) -> None:
        with client(server.url) as talk:
            stream = talk.completions.create(model=str(folder), prompt=prompt, max_tokens=60, temperature=0, stream=True)
            next(iter(stream))
            stream.close()

    hf_flash.configure(memory_budget=least, reader="direct")
    try:
        with serving(folder) as server, ThreadPoolExecutor(16) as pool:
            leaving = [pool.submit(leave, prompts[at]) for at in range(5)]
            asked = [(prompt, pool.submit(ask, prompt)) for prompt in (prompts * 2)[:19]]
            answers = [(prompt, job.result()) for prompt, job in asked]
            for job in leaving:
                job.result()
            found = requests.get(f"{server.url.removesuffix('/v1')}/flash/stats", timeout=30).json()
    finally:
        hf_flash.configure(memory_budget=None, reader=None)
    assert [text for _, text in answers] == [stock_says(prompt) for prompt, _ in answers]
    assert found["dram_bytes"] <= found["budget_bytes"] == least
    assert found["capacity"] == 0


def test_its_counters_are_those_of_experts(folder: Path, server: Server, talk: openai.OpenAI) -> None:
    root = server.url.removesuffix("/v1")
    before = requests.get(f"{root}/flash/stats", timeout=30).json()
    used = talk.completions.create(model=str(folder), prompt=PROMPT, max_tokens=5, temperature=0).usage
    after = requests.get(f"{root}/flash/stats", timeout=30).json()
    assert used is not None
    assert after["tokens"] - before["tokens"] == used.total_tokens - 1
    assert (after["experts"], after["experts_per_token"], after["all_experts"]) == (8, 2, 24)
    assert after["counters"]["selected"] > before["counters"]["selected"]
    metrics = requests.get(f"{root}/metrics", timeout=30).text
    assert "experts" in metrics
    assert "8 experts a layer" in printed(server.describe())
