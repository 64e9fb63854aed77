"""`hf-flash serve`: over real HTTP, with the `openai` client and the `transformers chat` command."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, __version__

import hf_flash
from hf_flash import ConfigError, FlashOffloadConfig
from hf_flash.base.tables import printed
from hf_flash.commands import main as cli
from hf_flash.serving.server import Server
from tests.conftest import ROOT, TINY_OPT, torch_threads
from tests.preloaded_python import python

TEMPLATE = ROOT / "examples" / "chat_template.jinja"
PROMPTS = ["In the beginning", "And the people said unto Moses", "The state of the Union is"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with torch_threads(1):
        yield


@contextmanager
def serving(model: str | Path, **settings: Any) -> Iterator[Server]:
    server = Server(str(model), port=0, log_level="warning", **{"dtype": "float32", "chat_template": TEMPLATE} | settings)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join()


@cache
def needs_batching() -> None:
    """Skip where transformers itself cannot batch OPT: in 5.24.0, `PagedAttentionCache` has no `get_seq_length`."""
    stock = AutoModelForCausalLM.from_pretrained(TINY_OPT, dtype=torch.float32)
    (answer,) = stock.generate_batch(
        [[2, 5, 6]],
        generation_config=GenerationConfig(max_new_tokens=1, eos_token_id=2),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=64),
        progress_bar=False,
    ).values()
    if answer.error is not None:
        pytest.skip(f"transformers {__version__} cannot batch OPT: {answer.error}")


@contextmanager
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as found:
        yield found


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A plain checkpoint, with a chat template."""
    with serving(TINY_OPT) as found:
        yield found


@pytest.fixture
def talk(server: Server) -> Iterator[openai.OpenAI]:
    with client(server.url) as found:
        yield found


@pytest.fixture(scope="module")
def continued(tokenizer: Any) -> Callable[..., str]:
    """`continued("text", 8)`: what `generate` says, of a model loaded without any server."""
    flash = FlashOffloadConfig(memory_budget="16MB")
    model = AutoModelForCausalLM.from_pretrained(TINY_OPT, dtype=torch.float32, quantization_config=flash)

    def get(text: str, count: int = 12, ids: Any = None) -> str:
        inputs = tokenizer(text, return_tensors="pt") if ids is None else {"input_ids": ids}
        out = model.generate(**inputs, max_new_tokens=count, do_sample=False)
        return str(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

    return get


def chatted(tokenizer: Any, text: str) -> Any:
    """The token ids of one message in the template of the examples."""
    messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(
        messages, chat_template=TEMPLATE.read_text(), return_tensors="pt", return_dict=True
    ).input_ids


def test_clients_at_once_get_what_generate_says(server: Server, continued: Callable[..., str], tokenizer: Any) -> None:
    """Chats and completions, streamed and in one piece, from several clients at the same time."""

    def chat(text: str) -> str:
        with client(server.url) as found:
            answer = found.chat.completions.create(
                model=str(TINY_OPT), messages=[{"role": "user", "content": text}], max_tokens=12, temperature=0
            )
        return str(answer.choices[0].message.content)

    def chat_streamed(text: str) -> str:
        with client(server.url) as found:
            parts = list(found.chat.completions.create(
                model=str(TINY_OPT), messages=[{"role": "user", "content": text}], max_tokens=12, temperature=0, stream=True
            ))  # fmt: skip
        assert len(parts) > 6
        return "".join(part.choices[0].delta.content or "" for part in parts)

    def completed(text: str) -> str:
        with client(server.url) as found:
            answer = found.completions.create(model=str(TINY_OPT), prompt=text, max_tokens=12, temperature=0)
        return str(answer.choices[0].text)

    with ThreadPoolExecutor(6) as pool:
        asked = [(ask, text, pool.submit(ask, text)) for text in PROMPTS for ask in (chat, chat_streamed, completed)]
        answers = [(ask, text, job.result()) for ask, text, job in asked]
    for ask, text, answer in answers:
        assert answer == continued(text, ids=None if ask is completed else chatted(tokenizer, text)), (ask, text)


def test_the_responses_api_answers_too(talk: openai.OpenAI, continued: Callable[..., str], tokenizer: Any) -> None:
    settings = {"max_output_tokens": 12, "temperature": 0, "stream": False}  # transformers streams here unless told not to
    found = talk.responses.create(model=str(TINY_OPT), input=PROMPTS[0], **settings)
    assert found.output_text == continued(PROMPTS[0], ids=chatted(tokenizer, PROMPTS[0]))


def test_the_counters_are_those_of_the_model(server: Server, talk: openai.OpenAI) -> None:
    root = server.url.removesuffix("/v1")
    before = requests.get(f"{root}/flash/stats", timeout=30).json()
    used = talk.completions.create(model=str(TINY_OPT), prompt=PROMPTS[0], max_tokens=5, temperature=0).usage
    after = requests.get(f"{root}/flash/stats", timeout=30).json()
    assert used is not None
    assert after["tokens"] - before["tokens"] == used.total_tokens - 1  # nothing follows the last token
    assert after == server.stats().to_dict() | {"process_bytes": after["process_bytes"]}
    text = requests.get(f"{root}/metrics", timeout=30).text
    rows = dict(re.findall(r"^(hf_flash_\w+) (\S+)$", text, re.MULTILINE))
    assert rows["hf_flash_tokens_total"] == str(after["counters"]["tokens"])
    assert rows["hf_flash_dram_bytes"] == str(after["dram_bytes"])
    assert "# TYPE hf_flash_read_bytes_total counter" in text
    assert requests.get(f"{root}/health", timeout=30).json() == {"status": "ok"}


def test_the_model_is_listed_and_no_other_is_loaded(server: Server, talk: openai.OpenAI) -> None:
    assert [model.id for model in talk.models.list().data] == [str(TINY_OPT)]
    with pytest.raises(openai.BadRequestError, match="pinned"):
        talk.completions.create(model="facebook/opt-125m", prompt="x")
    loading = requests.post(server.url.removesuffix("/v1") + "/load_model", json={"model": "gpt2"}, timeout=30).text
    assert "this server has another model" in loading


def test_answers_end_where_the_context_does(talk: openai.OpenAI, tokenizer: Any) -> None:
    """OPT has learnt 256 positions here, and the client asks for more, or leaves it to the server's default of 1024."""
    prompt = "and " * 230
    length = len(tokenizer(prompt).input_ids)
    answer = talk.completions.create(model=str(TINY_OPT), prompt=prompt, temperature=0, extra_body={"seed": 1})
    assert answer.usage is not None
    assert (answer.usage.total_tokens, answer.usage.prompt_tokens) == (256, length)
    assert answer.choices[0].finish_reason == "length"
    with pytest.raises(openai.BadRequestError, match=r"too long for the model\s+expected: fewer than 256"):
        talk.completions.create(model=str(TINY_OPT), prompt="and " * 300, stream=True)


def test_a_model_without_a_template_says_so_and_completes(packed_tiny: Path) -> None:
    with serving(packed_tiny, chat_template=None) as server, client(server.url) as talk:
        assert "--chat-template" in printed(server.describe())
        with pytest.raises(openai.BadRequestError, match="chat_template is not set"):
            talk.chat.completions.create(model=str(packed_tiny), messages=[{"role": "user", "content": "x"}])
        assert talk.completions.create(model=str(packed_tiny), prompt="In the", max_tokens=3).choices[0].text


def test_continuous_batching_gives_the_same_answers(continued: Callable[..., str]) -> None:
    needs_batching()
    with serving(TINY_OPT, kv_cache_bytes=32 << 20) as server, client(server.url) as talk, ThreadPoolExecutor(3) as pool:
        jobs = [
            pool.submit(talk.completions.create, model=str(TINY_OPT), prompt=text, max_tokens=12, temperature=0)
            for text in PROMPTS
        ]
        assert [job.result().choices[0].text for job in jobs] == [continued(text) for text in PROMPTS]


def test_a_disk_that_fails_is_said_and_the_server_goes_on(packed_tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(packed_tiny, tmp_path / "flash"))
    hf_flash.configure(reader="direct", memory_budget="9200KB")
    try:
        with serving(folder, dtype="auto") as server, client(server.url) as talk:
            os.truncate(next(iter(sorted(folder.glob("flash-layer-*.safetensors")))), 8192)
            with pytest.raises(openai.InternalServerError, match="flash-layer"):
                talk.completions.create(model=str(folder), prompt=PROMPTS[0], max_tokens=5)
            with pytest.raises(openai.APIError) as caught:
                list(talk.completions.create(model=str(folder), prompt=PROMPTS[0], max_tokens=5, stream=True))
            assert "flash-layer" in str(caught.value.body)
            assert requests.get(server.url.removesuffix("/v1") + "/health", timeout=30).ok
    finally:
        hf_flash.configure(reader=None, memory_budget=None)


def test_an_unloaded_model_comes_back_with_the_next_request(packed_tiny: Path) -> None:
    with serving(packed_tiny) as server, client(server.url) as talk:
        root = server.url.removesuffix("/v1")
        assert requests.post(f"{root}/reset", timeout=30).ok
        assert requests.get(f"{root}/flash/stats", timeout=30).status_code == 503
        assert talk.completions.create(model=str(packed_tiny), prompt="In the", max_tokens=3).choices[0].text
        assert requests.get(f"{root}/flash/stats", timeout=30).json()["tokens"] > 3


@pytest.fixture(scope="module")
def packed_tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf_flash.repack(TINY_OPT, tmp_path_factory.mktemp("packed") / "tiny-flash")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"port": "taken"}, "cannot listen"),
        ({"port": 70_000}, "cannot listen"),
        ({"host": "no.such.host.invalid"}, "cannot listen"),
        ({"chat_template": Path("nowhere.jinja")}, "cannot read the chat template"),
        ({"model": "empty"}, "cannot be loaded"),
        ({"kv_cache_bytes": 1000}, "at least"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anybody_waits(
    server: Server, settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    settings = {"model": str(TINY_OPT), "port": 0} | settings
    if settings["model"] == "empty":
        settings["model"] = str(tmp_path)
    if settings["port"] == "taken":
        settings["port"] = int(server.url.split(":")[2].removesuffix("/v1"))
    with pytest.raises(ConfigError, match=words):
        Server(settings.pop("model"), **settings)


def test_a_folder_that_reads_as_a_revision_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a@b").mkdir()
    with pytest.raises(ConfigError, match="revision"):
        Server(str(tmp_path / "a@b"), port=0)


def test_every_argument_of_the_config_is_on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "memory_budget": "1GB", "predictor": "none", "predictor_bits": 8, "predictor_group_size": 32, "predictor_margin": 2.5,
        "window": 3, "lookahead": 0, "reader": "mmap", "io_threads": 4, "cache_dir": "somewhere",
    }  # fmt: skip
    seen: dict[str, Any] = {}

    def stop_here(model: str, **settings: Any) -> None:
        config = FlashOffloadConfig()
        seen.update({name: config.get(name) for name in given})
        raise ConfigError("seen")

    monkeypatch.setattr("hf_flash.serving.server.Server", stop_here)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    try:
        assert cli.main(["serve", "model", *flags]) == 1
    finally:
        hf_flash.configure(**dict.fromkeys(given))
    assert seen == given


# --- as processes ------------------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "dumb", "COLUMNS": "100"}


def test_the_command_serves_transformers_chat_and_ends_with_ctrl_c(packed_tiny: Path, tmp_path: Path) -> None:
    command = [
        *python(), "-m", "hf_flash", "serve", str(packed_tiny), "--port=0", f"--chat-template={TEMPLATE}",
        "--memory-budget=11MB", "--window=3",
    ]  # fmt: skip
    log = tmp_path / "log"
    with log.open("w") as lines:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=lines, text=True, env=environment())
    assert server.stdout is not None
    with server, server.stdout:
        try:
            url = next(line.split()[-1] for line in server.stdout if line.startswith("base URL"))
            found = requests.get(url.removesuffix("/v1") + "/flash/stats", timeout=30).json()
            assert (found["budget_bytes"], found["window"]) == (11_000_000, 3)

            chat = subprocess.run(
                [*python(), "-m", "transformers.cli.transformers", "chat", str(packed_tiny), url, "max_new_tokens=9"],
                input="In the beginning\nn\n!exit\n", capture_output=True, text=True, env=environment(), cwd=tmp_path,
                timeout=120,
            )  # fmt: skip
            assert chat.returncode == 0, chat.stderr
            assert "9 tokens in" in chat.stdout

            with client(url) as talk:
                stream = talk.completions.create(model=str(packed_tiny), prompt="In the", max_tokens=240, stream=True)
                next(iter(stream))
                server.send_signal(signal.SIGINT)
                with pytest.raises(openai.APIError):  # or an answer that was cut off would look whole
                    list(stream)
            assert server.wait(timeout=30) == 0
        finally:
            server.kill()
    assert "Traceback" not in log.read_text()


def test_the_example_runs(packed_tiny: Path) -> None:
    command = [*python(), str(ROOT / "examples" / "serve_and_chat.py"), str(packed_tiny), "--memory-budget=10MB"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120, check=True)
    assert "> In the beginning" in done.stdout
    assert re.search(r"\d+ tokens, \d+ kB read for each", done.stdout)
    assert "Traceback" not in done.stderr
