"""Attention of flash models: a few tokens by the compiled part, with stock's answers; all else, and other models, by stock."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_flash import FlashOffloadConfig
from hf_flash.compute import attention
from hf_flash.compute import library as native
from hf_flash.runtime import attention as attending
from tests.conftest import TINY_OPT

pytestmark = pytest.mark.skipif(native.library() is None, reason="no compiled part")
PROMPT = torch.arange(5, 45)[None]


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Rows and tokens of every call that the compiled part answered."""
    seen: list[tuple[int, ...]] = []
    real = attention.attend

    def attend(query: torch.Tensor, *others: Any, **options: Any) -> torch.Tensor:
        seen.append((query.shape[0], query.shape[2]))
        return real(query, *others, **options)

    monkeypatch.setattr(attention, "attend", attend)
    return seen


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose four heads share two of keys."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, max_position_embeddings=400, initializer_range=0.2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("attention") / "grouped"
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def load(folder: Path, dtype: torch.dtype = torch.float32, **arguments: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=FlashOffloadConfig(predictor="none"), dtype=dtype, **arguments
    ).eval()


def stock(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def test_decoding_is_answered_here_and_prompts_by_stock(grouped: Path, shapes: list[tuple[int, ...]]) -> None:
    for folder in (grouped, TINY_OPT):
        shapes.clear()
        model, wanted = load(folder), stock(folder)
        options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 1}
        assert torch.equal(model.generate(PROMPT, **options), wanted.generate(PROMPT, **options))
        assert shapes == [(1, 1)] * 11 * model.config.num_hidden_layers


@pytest.mark.parametrize("options", [
    {"num_beams": 3}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}, {"num_return_sequences": 4},
])  # fmt: skip
def test_other_ways_to_generate(options: dict[str, Any], grouped: Path, shapes: list[tuple[int, ...]]) -> None:
    model, wanted = load(grouped), stock(grouped)
    sampled = options.get("num_return_sequences", 1) > 1
    options = options | {"max_new_tokens": 12, "do_sample": sampled, "pad_token_id": 1, "eos_token_id": None}
    torch.manual_seed(1)
    found = model.generate(PROMPT, **options)
    torch.manual_seed(1)
    assert torch.equal(found, wanted.generate(PROMPT, **options))
    assert shapes


def test_padded_rows_and_drafts_have_the_logits_of_stock(grouped: Path, shapes: list[tuple[int, ...]]) -> None:
    model, wanted = load(grouped), stock(grouped)
    ids = torch.stack([torch.arange(5, 15), torch.arange(20, 30)])
    seen = torch.ones_like(ids)
    seen[0, :4] = 0
    found: list[list[torch.Tensor]] = [[], []]
    for one, into in zip((model, wanted), found, strict=True):
        with torch.no_grad():
            past = one(ids, attention_mask=seen).past_key_values
            for tokens in (1, 3, 8):
                mask = torch.cat([seen, torch.ones(2, past.get_seq_length() + tokens - seen.shape[1], dtype=seen.dtype)], 1)
                out = one(torch.arange(40, 40 + tokens).expand(2, -1), attention_mask=mask, past_key_values=past)
                into.append(out.logits)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    assert shapes == [(2, tokens) for tokens in (1, 3, 8) for _ in range(2)]


def test_stock_models_have_the_bits_that_they_had(grouped: Path, shapes: list[tuple[int, ...]]) -> None:
    wanted = stock(grouped)
    AttentionInterface.register("sdpa", sdpa_attention_forward)
    with torch.no_grad():
        before = wanted.generate(PROMPT, max_new_tokens=6, output_logits=True, return_dict_in_generate=True).logits
        model = load(grouped)
        after = wanted.generate(PROMPT, max_new_tokens=6, output_logits=True, return_dict_in_generate=True).logits
    assert all(map(torch.equal, before, after))
    assert shapes == []
    copied = copy.deepcopy(model)
    copied.generate(PROMPT, max_new_tokens=2, do_sample=False)
    assert shapes == [(1, 1)] * 2


def test_it_is_registered_once(grouped: Path) -> None:
    load(grouped)
    once: Any = AttentionInterface()["sdpa"]
    load(grouped)
    assert AttentionInterface()["sdpa"] is once
    assert once.args == (sdpa_attention_forward,)


def test_what_somebody_registered_is_asked(grouped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def theirs(module: Any, query: torch.Tensor, *others: Any, **options: Any) -> Any:
        asked.append(query.shape[2])
        return sdpa_attention_forward(module, query, *others, **options)

    before = AttentionInterface()["sdpa"]
    AttentionInterface.register("sdpa", theirs)
    load(grouped).generate(PROMPT, max_new_tokens=3, do_sample=False)
    AttentionInterface.register("sdpa", before)
    assert asked == [40] * 2


def test_where_more_is_asked_stock_answers(grouped: Path, shapes: list[tuple[int, ...]]) -> None:
    model, eager = load(grouped), load(grouped, attn_implementation="eager")
    with torch.no_grad():
        past = model(PROMPT).past_key_values
        model(PROMPT[:, :17], past_key_values=copy.deepcopy(past))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(PROMPT[:, :1], past_key_values=copy.deepcopy(past))
        eager.generate(PROMPT, max_new_tokens=3, do_sample=False)
        assert shapes == []
        model.config._attn_implementation = "eager"
        model(PROMPT[:, :1], past_key_values=copy.deepcopy(past))
        assert shapes == []
        model.config._attn_implementation = "sdpa"
        model(PROMPT[:, :1], past_key_values=past)
        assert len(shapes) == 2


# --- tensors that are not what they seem


class Module(torch.nn.Module):
    is_on_flash_model = True
    is_causal = True


def ours(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    return attending._attend(sdpa_attention_forward, Module(), query, key, value, mask)[0]


def theirs(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    found: torch.Tensor = sdpa_attention_forward(Module(), query, key, value, mask)[0]
    return found


def parts(heads: int = 4, key_heads: int = 4, length: int = 5, width: int = 8) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    sizes = (heads, 1), (key_heads, length), (key_heads, length)
    return [torch.randn(1, count, tokens, width, generator=random) for count, tokens in sizes]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_transforms_and_tracers_get_stock(shapes: list[tuple[int, ...]]) -> None:
    query, key, value = parts()
    wanted = theirs(query, key, value)
    assert torch.equal(torch.func.functionalize(ours)(query, key, value), wanted)
    assert torch.equal(torch.func.vmap(ours)(query[None], key[None], value[None])[0], wanted)
    graph = make_fx(lambda *given: ours(*given))(query, key, value)
    assert torch.equal(graph(2 * query, key, value), theirs(2 * query, key, value))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert ours(query, key, value).shape == wanted.shape
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        twice = forward_ad.make_dual(query, torch.ones_like(query))
        assert forward_ad.unpack_dual(ours(twice, key, value)).tangent is not None
    assert shapes == []
    torch.testing.assert_close(ours(query, key, value), wanted)
    assert shapes == [(1, 1)]


def test_numbers_that_lie_elsewhere_or_nowhere(shapes: list[tuple[int, ...]]) -> None:
    query, key, value = parts()
    negative = torch.complex(torch.zeros(5), torch.ones(5)).conj().imag
    assert negative.is_neg()
    mask = negative[None, None, None]
    for given in ([torch._neg_view(query), key, value], [query, torch._neg_view(key), value], [query, key, value, mask]):
        assert torch.equal(ours(*given), theirs(*given))
    key.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="storage"):
        ours(query, key, value)
    assert shapes == []


@pytest.mark.parametrize("sizes", [{"heads": 0, "key_heads": 0}, {"key_heads": 0}, {"width": 0}, {"heads": 0, "key_heads": 2}])
def test_nothing_at_all_is_for_stock(sizes: dict[str, int]) -> None:
    given = parts(**sizes)
    try:
        wanted = theirs(*given)
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=re.escape(str(error)[:40])):
            ours(*given)
    else:
        assert torch.equal(ours(*given), wanted)
