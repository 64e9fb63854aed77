"""`predictor="none"` is the stock model (contract C4): any checkpoint, any way of generating, any dtype."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    pipeline,
    set_seed,
)

import hf_flash
from hf_flash import FlashOffloadConfig
from tests.conftest import torch_threads

NEW_TOKENS = 10
SHAPES = ("pre_ln", "post_ln", "no_bias", "odd")
MODELS = (*SHAPES, "tiny_opt")
CONTAINERS = ("sharded", "bin", "sharded_bin", "bare_names_bin")  # the weights of pre_ln in other files
HALF = (torch.float16, torch.bfloat16)

Pair = tuple[Any, Any]


# --- the checkpoints, each loaded once as stock and once as flash -----------------------------------------------------


def write_bin(source: Path, target: Path, files: int, prefix: str = "model.") -> Path:
    """The same checkpoint as `pytorch_model.bin`, in one file or in several with an index."""
    target.mkdir()
    state = {prefix + n.removeprefix("model."): t for n, t in load_file(source / "model.safetensors").items()}
    for name in ("config.json", "generation_config.json"):
        (target / name).write_bytes((source / name).read_bytes())
    if files == 1:
        torch.save(state, target / "pytorch_model.bin")
        return target
    weight_map = {name: f"pytorch_model-{i % files + 1:05d}-of-{files:05d}.bin" for i, name in enumerate(state)}
    for file in set(weight_map.values()):
        torch.save({name: state[name] for name in state if weight_map[name] == file}, target / file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": weight_map}
    (target / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return target


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """One thread where matrices are too small to share: threads that wait for each other on a busy machine cost minutes."""
    with torch_threads(torch.get_num_threads() if "tiny_opt" in request.node.name else 1):
        yield


@pytest.fixture(scope="module")
def folder_of(opt: Callable[..., Path], tiny_opt: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {"tiny_opt": tiny_opt}

    def get(source: str) -> Path:
        if source in SHAPES:
            return opt(source)
        if source == "sharded":
            return opt(shards="20KB")
        if source not in made:
            target = tmp_path_factory.mktemp(source) / "model"
            prefix = "" if source == "bare_names_bin" else "model."  # old OPTs on the Hub have names without it
            made[source] = write_bin(opt(), target, 3 if source == "sharded_bin" else 1, prefix)
        return made[source]

    return get


@pytest.fixture(scope="module")
def pair_of(folder_of: Callable[[str], Path]) -> Callable[..., Pair]:
    """`pair_of("odd", torch.float16)`: the stock model and the flash model of a checkpoint."""
    loaded: dict[Any, Pair] = {}

    def get(source: str, dtype: torch.dtype = torch.float32, auto: Any = AutoModelForCausalLM) -> Pair:
        if (source, dtype, auto) not in loaded:
            loaded[source, dtype, auto] = (
                auto.from_pretrained(folder_of(source), dtype=dtype).eval(),
                auto.from_pretrained(folder_of(source), dtype=dtype, quantization_config=FlashOffloadConfig(predictor="none")),
            )
        return loaded[source, dtype, auto]

    return get


# --- what goes in, and ways of generating -----------------------------------------------------------------------------


def prompts(model: Any, *lengths: int) -> dict[str, torch.Tensor]:
    """Token ids that repeat themselves (prompt lookup finds something), left-padded to the longest."""
    generator = torch.Generator().manual_seed(len(lengths))
    ids = torch.full((len(lengths), max(lengths)), model.config.pad_token_id)
    for row, length in enumerate(lengths):
        phrase = torch.randint(3, model.config.vocab_size, (length // 2 + 1,), generator=generator)
        ids[row, -length:] = phrase.repeat(2)[:length]
    return {"input_ids": ids, "attention_mask": (ids != model.config.pad_token_id).long()}


def generate(model: Any, lengths: tuple[int, ...] = (9,), **kwargs: Any) -> torch.Tensor:
    inputs = prompts(model, *lengths)
    tokens: torch.Tensor = model.generate(**inputs, max_new_tokens=NEW_TOKENS, **{"do_sample": False} | kwargs)
    return tokens[:, inputs["input_ids"].shape[1] :]


def sample(model: Any, lengths: tuple[int, ...] = (9,), **kwargs: Any) -> torch.Tensor:
    set_seed(7)
    return generate(model, lengths, do_sample=True, top_k=20, **kwargs)


GREEDY: dict[str, Callable[[Any], torch.Tensor]] = {
    "greedy": generate,
    "left_padded_batch": lambda model: generate(model, (9, 4, 7)),
    "static_cache": lambda model: generate(model, cache_implementation="static"),
    "no_cache": lambda model: generate(model, use_cache=False),
    "prompt_lookup": lambda model: generate(model, prompt_lookup_num_tokens=3),
}
MODES: dict[str, Callable[[Any], torch.Tensor]] = GREEDY | {
    "sampling": sample,
    "beams": lambda model: generate(model, num_beams=4),
    "sampled_beams_in_a_batch": lambda model: sample(model, (5, 8), num_beams=2),
}
IN_FLOAT32 = [(model, mode) for model in MODELS for mode in MODES] + [(files, "greedy") for files in CONTAINERS]
IN_HALF = [(model, mode) for model in SHAPES for mode in GREEDY] + [("tiny_opt", "left_padded_batch")]
ROWS: dict[str, tuple[int, ...]] = dict.fromkeys(GREEDY, (9,)) | {"left_padded_batch": (9, 4, 7)}


# --- what "equal" means -----------------------------------------------------------------------------------------------


def rounding(logits: torch.Tensor, dtype: torch.dtype) -> float:
    """How far apart two correct computations of `logits` may be.

    In half precision every layer rounds the residual stream twice, each time by up to eps / 2 of its size. Of the 2 * layers
    independent errors (here at most 12) sqrt(2 * layers) * eps / 2 arrive at the logits, twice for the difference of two
    computations: about 3.5 * eps of the largest logit. In float32 only the order of sums differs, of up to 1024 terms: about
    sqrt(1024) * eps, in the up and in the down projection.
    """
    return (64 if dtype == torch.float32 else 4) * torch.finfo(dtype).eps * logits.abs().max().item()


@torch.no_grad()
def logits_of(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Float32 logits [rows, tokens, vocabulary] at the positions that are not padding; zero elsewhere."""
    return model(**inputs).logits.float() * inputs["attention_mask"][..., None]


def forced_choices(stock: Any, inputs: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """Stock's logits [rows, new tokens, vocabulary] while it is made to follow `tokens` [rows, new tokens]."""
    ids = torch.cat([inputs["input_ids"], tokens], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(tokens)], dim=1)
    return logits_of(stock, {"input_ids": ids, "attention_mask": mask})[:, -tokens.shape[1] - 1 : -1]


def assert_same_up_to_ties(stock: Any, inputs: dict[str, torch.Tensor], wanted: torch.Tensor, got: torch.Tensor) -> None:
    """Greedy tokens are equal until stock itself could not tell its two best logits apart."""
    logits = forced_choices(stock, inputs, wanted)
    for row in range(len(wanted)):
        steps = min(len(wanted[row]), len(got[row]))
        different = (wanted[row, :steps] != got[row, :steps]).nonzero()
        if len(different):
            at = int(different[0])
            best, second = logits[row, at].topk(2).values
            assert best - second <= rounding(logits[row, at], stock.dtype), f"row {row}, token {at}"


# --- float32: the same tokens -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "mode"), IN_FLOAT32)
def test_tokens_are_the_stock_ones(pair_of: Callable[..., Pair], source: str, mode: str) -> None:
    stock, flash = pair_of(source)
    assert torch.equal(MODES[mode](flash), MODES[mode](stock))


@pytest.mark.parametrize("source", [*MODELS, *CONTAINERS])
@pytest.mark.parametrize("lengths", [(1,), (2,), (11,), (9, 4, 7)], ids=str)
def test_logits_are_close_to_the_stock_ones(pair_of: Callable[..., Pair], source: str, lengths: tuple[int, ...]) -> None:
    stock, flash = pair_of(source)
    wanted = logits_of(stock, prompts(stock, *lengths))
    torch.testing.assert_close(logits_of(flash, prompts(flash, *lengths)), wanted, rtol=0, atol=rounding(wanted, torch.float32))


@pytest.mark.parametrize("source", MODELS)
def test_logits_are_close_at_every_generated_token(pair_of: Callable[..., Pair], source: str) -> None:
    stock, flash = pair_of(source)
    wanted, got = (
        m.generate(
            **prompts(m, 9), max_new_tokens=NEW_TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        for m in (stock, flash)
    )
    assert torch.equal(got.sequences, wanted.sequences)
    logits = torch.stack(wanted.logits)
    torch.testing.assert_close(torch.stack(got.logits), logits, rtol=0, atol=rounding(logits, torch.float32))


@pytest.mark.parametrize("roles", ["flash target", "flash draft", "flash both"])
@pytest.mark.parametrize(("target", "draft"), [("pre_ln", "post_ln"), ("odd", "odd"), ("tiny_opt", "tiny_opt")])
def test_assisted_generation_gives_the_stock_tokens(pair_of: Callable[..., Pair], target: str, draft: str, roles: str) -> None:
    stock, flash = pair_of(target)
    stock_draft, flash_draft = pair_of(draft)
    mine = stock if roles == "flash draft" else flash
    assistant = stock_draft if roles == "flash target" else flash_draft
    wanted = generate(stock, assistant_model=stock_draft)
    assert torch.equal(generate(mine, assistant_model=assistant), wanted)


def test_pipeline_gives_the_stock_text(pair_of: Callable[..., Pair], tokenizer: Any) -> None:
    texts = ["In the beginning", "And it came to pass that the"]
    wanted, got = (
        pipeline("text-generation", model=m, tokenizer=tokenizer)(texts, max_new_tokens=NEW_TOKENS, do_sample=False)
        for m in pair_of("tiny_opt")
    )
    assert got == wanted


def test_pipeline_loads_a_flash_model_by_name(tiny_opt: Path, pair_of: Callable[..., Pair], tokenizer: Any) -> None:
    arguments = {"quantization_config": FlashOffloadConfig(predictor="none"), "dtype": torch.float32}
    mine = pipeline("text-generation", model=str(tiny_opt), model_kwargs=arguments)
    stock = pipeline("text-generation", model=pair_of("tiny_opt")[0], tokenizer=tokenizer)
    request = {"text_inputs": "In the beginning", "max_new_tokens": NEW_TOKENS, "do_sample": False}
    assert mine(**request) == stock(**request)
    assert hf_flash.stats(mine).predictor == "none"


# --- half precision: the same up to rounding --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("source", MODELS)
@pytest.mark.parametrize("lengths", [(1,), (11,), (9, 4, 7)], ids=str)
def test_logits_in_half_precision_differ_by_rounding(
    pair_of: Callable[..., Pair], source: str, dtype: torch.dtype, lengths: tuple[int, ...]
) -> None:
    stock, flash = pair_of(source, dtype)
    wanted = logits_of(stock, prompts(stock, *lengths))
    torch.testing.assert_close(logits_of(flash, prompts(flash, *lengths)), wanted, rtol=0, atol=rounding(wanted, dtype))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("source", MODELS)
def test_half_precision_is_as_near_to_the_truth_as_stock_is(
    pair_of: Callable[..., Pair], source: str, dtype: torch.dtype
) -> None:
    """The truth: the weights as rounded to `dtype`, computed in float32."""
    stock, flash = pair_of(source, dtype)
    exact = type(stock)(stock.config).to(torch.float32).eval()
    exact.load_state_dict({name: value.float() for name, value in stock.state_dict().items()})
    inputs = prompts(stock, 9, 4, 7)
    truth = logits_of(exact, inputs)
    mine, theirs = ((logits_of(m, inputs) - truth).square().mean().sqrt().item() for m in (flash, stock))
    assert mine <= 1.5 * theirs


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("source", "mode"), IN_HALF)
def test_tokens_in_half_precision_are_the_stock_ones_up_to_ties(
    pair_of: Callable[..., Pair], source: str, dtype: torch.dtype, mode: str
) -> None:
    stock, flash = pair_of(source, dtype)
    assert_same_up_to_ties(stock, prompts(stock, *ROWS[mode]), GREEDY[mode](stock), GREEDY[mode](flash))


# --- other heads ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", MODELS)
def test_bare_model_gives_the_stock_hidden_states(pair_of: Callable[..., Pair], source: str) -> None:
    stock, flash = pair_of(source, auto=AutoModel)
    inputs = prompts(stock, 9, 4, 7)
    with torch.no_grad():
        wanted, got = (m(**inputs, output_hidden_states=True).hidden_states for m in (stock, flash))
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=rounding(b, torch.float32))


@pytest.mark.parametrize("source", MODELS)
@pytest.mark.parametrize(
    ("auto", "head"), [(AutoModelForSequenceClassification, "score"), (AutoModelForQuestionAnswering, "qa_outputs")]
)
def test_models_with_a_new_head_give_the_stock_outputs(pair_of: Callable[..., Pair], source: str, auto: Any, head: str) -> None:
    stock, flash = pair_of(source, auto=auto)
    getattr(flash, head).load_state_dict(getattr(stock, head).state_dict())
    inputs = prompts(stock, 9, 4, 7)
    with torch.no_grad():
        wanted, got = (m(**inputs).to_tuple()[:2] for m in (stock, flash))
    for a, b in zip(got, wanted, strict=True):
        if isinstance(b, torch.Tensor):
            torch.testing.assert_close(a, b, rtol=0, atol=rounding(b, torch.float32))
