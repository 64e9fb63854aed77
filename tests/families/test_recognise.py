"""Models that no family describes are recognised by their structure, and what they compute is tried (contract C9)."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import hf_flash
from hf_flash import FlashOffloadConfig, UnsupportedModelError, families
from hf_flash.compute.activation import activation_like, activation_named
from hf_flash.families.arithmetic_check import arithmetic_of, check_arithmetic
from hf_flash.families.base import Family, longest_sequence
from hf_flash.families.opt import OPT
from hf_flash.families.recognise import config_object, skeleton
from hf_flash.runtime.model import find_runtime

GATED = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
SAMPLE = {  # each with something of its own
    "llama": "mlp, silu", "qwen2": "mlp, silu", "qwen3": "mlp, silu", "gemma2": "mlp, gelu_pytorch_tanh",
    "gemma3": "mlp, gelu_pytorch_tanh", "olmo2": "mlp, silu", "cohere": "mlp, silu", "stablelm": "mlp, silu",
    "granite": "mlp, silu", "lfm2": "feed_forward, silu", "phi": "mlp, gelu_new", "gpt2": "mlp, gelu_new",
    "gptj": "mlp, gelu_new", "gpt_neox": "mlp, gelu", "falcon": "mlp, gelu", "bloom": "mlp, ", "mpt": "ffn, gelu",
    "starcoder2": "mlp, gelu_pytorch_tanh", "persimmon": "mlp, relu2", "nemotron": "mlp, relu2", "arcee": "mlp, relu2",
    "opt": ", relu", "xglm": ", gelu", "bart": ", gelu", "bert": ", gelu", "ctrl": "ffn, relu",
    "phi3": "mlp, silu", "moshi": "mlp, silu", "modernbert-decoder": "mlp, gelu", "gemma4": "mlp, gelu_pytorch_tanh",
}  # fmt: skip


@pytest.mark.parametrize("model_type", SAMPLE)
def test_a_sample_of_the_models_of_transformers_is_equal_to_stock(model_type: str, coverage: ModuleType) -> None:
    """Logits, a left-padded batch, tokens; and once more after saving and loading."""
    kind, why = coverage.attempt(model_type)
    assert kind == "equal", why
    block, _, activation = SAMPLE[model_type].partition(", ")
    assert why.startswith(f"{block or 'inline'}: ")
    assert why.endswith(f"; {activation}") or not activation


MIXTURES = (  # each with something of its own
    "qwen3_moe", "mixtral", "gpt_oss", "olmoe", "deepseek_v3", "granitemoe", "nemotron_h", "inkling2_text", "phimoe",
    "aria_text", "glm4_moe", "qwen2_moe",
)  # fmt: skip


@pytest.mark.parametrize("model_type", MIXTURES)
def test_a_sample_of_the_mixtures_of_transformers_is_equal_to_stock(model_type: str, coverage: ModuleType) -> None:
    kind, why = coverage.attempt(model_type)
    assert kind == "equal", why
    assert why.startswith("experts: ")


REFUSED = {
    "llama4_text": "experts of Llama4TextExperts",
    "gemma3n_text": "other numbers on random input", "bitnet": "ffn_sub_norm.weight", "mamba": "with blocks none",
}  # fmt: skip


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_is_not_recognised_is_refused_with_the_reason(model_type: str, coverage: ModuleType) -> None:
    kind, why = coverage.attempt(model_type)
    assert kind == "refused", why
    assert REFUSED[model_type] in why


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bloom", "xglm", "bert", "nemotron", "phi3", "glm4"])
def test_repacked_it_is_the_same_and_restores_bit_for_bit(model_type: str, coverage: ModuleType, tmp_path: Path) -> None:
    stock, ids = coverage.stock_model(model_type, tmp_path / "plain")
    hf_flash.repack(tmp_path / "plain", tmp_path / "packed")
    flash = AutoModelForCausalLM.from_pretrained(
        tmp_path / "packed", quantization_config=FlashOffloadConfig(predictor="none", memory_budget="1GB")
    )
    least = hf_flash.stats(flash).minimum_bytes
    tight = AutoModelForCausalLM.from_pretrained(
        tmp_path / "packed", quantization_config=FlashOffloadConfig(predictor="none", memory_budget=least)
    )
    wanted = coverage.answers(stock, ids)
    assert coverage.differs(coverage.answers(tight, ids), wanted) == ""
    assert all(
        torch.equal(*pair) for pair in zip(coverage.answers(tight, ids)[:2], coverage.answers(flash, ids)[:2], strict=True)
    )
    assert flash.state_dict().keys() == stock.state_dict().keys()
    hf_flash.restore(tmp_path / "packed", tmp_path / "restored")
    plain, restored = (stored_tensors(tmp_path / folder) for folder in ("plain", "restored"))
    assert plain.keys() == restored.keys()
    assert all(torch.equal(plain[name], restored[name]) for name in plain)


@pytest.mark.parametrize("model_type", ["llava", "qwen3_vl", "mistral3"])
def test_of_a_model_that_looks_at_images_the_language_tower_is_on_flash(
    model_type: str, coverage: ModuleType, tmp_path: Path
) -> None:
    """The other towers stay in memory; saving and restoring give the whole checkpoint."""
    config = coverage.tiny_config(model_type)
    config.update({key: 120 for key in ("image_token_id", "image_token_index", "video_token_id") if hasattr(config, key)})
    torch.manual_seed(0)
    stock, ids = AutoModelForImageTextToText.from_config(config).eval(), torch.randint(4, 100, (2, 12))
    stock.save_pretrained(tmp_path / "plain")
    hf_flash.repack(tmp_path / "plain", tmp_path / "packed")
    flash = AutoModelForImageTextToText.from_pretrained(tmp_path / "packed")
    flash.save_pretrained(tmp_path / "saved")
    for model in (flash, AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")):
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=ids).logits, stock(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
        assert len(find_runtime(model).ffns) == config.get_text_config().num_hidden_layers
    assert flash.state_dict().keys() == stock.state_dict().keys()
    hf_flash.restore(tmp_path / "packed", tmp_path / "restored")
    plain, restored = (stored_tensors(tmp_path / folder) for folder in ("plain", "restored"))
    assert plain.keys() == restored.keys()
    assert all(torch.equal(plain[name], restored[name]) for name in plain)


@pytest.mark.parametrize(("model_type", "given"), [("nemotron", {}), ("llama", {"hidden_act": "relu"})])
def test_with_exact_zeros_neurons_are_predicted(
    model_type: str, given: dict[str, Any], coverage: ModuleType, tmp_path: Path
) -> None:
    """Of a gated layer the gate decides. What is predicted does not depend on what is in memory (contract C3)."""
    config = coverage.tiny_config(model_type)
    config.update({"intermediate_size": 512, **given})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 1.0))
    model.save_pretrained(tmp_path / "plain")
    hf_flash.repack(tmp_path / "plain", tmp_path / "packed")

    def load(budget: int | str) -> Any:
        wanted = FlashOffloadConfig(memory_budget=budget, predictor="quantized")
        return AutoModelForCausalLM.from_pretrained(tmp_path / "packed", quantization_config=wanted)

    roomy = load("1GB")
    tight = load(hf_flash.stats(roomy).minimum_bytes + 300_000)
    assert hf_flash.stats(roomy).predictor == "int4-g64"
    assert 0 < hf_flash.stats(tight).capacity < 512
    ids = torch.randint(4, 100, (1, 12), generator=torch.Generator().manual_seed(1))
    for n in (1, 4, 12):
        with torch.no_grad():
            found, other = roomy(ids[:, :n]).logits, tight(ids[:, :n]).logits
            assert torch.equal(found, other)
            assert torch.nn.functional.cosine_similarity(found, model(ids[:, :n]).logits, dim=-1).min() > 0.97
    assert 0 < hf_flash.stats(roomy).counters.selected < hf_flash.stats(roomy).counters.tokens * 512


# --- what a block computes ------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Three matrices and silu, as most models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(32, 64, bias=False) for _ in range(2))
        self.down_proj, self.act_fn = nn.Linear(64, 32, bias=False), nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class WithFactor(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1.01 * super().forward(x)


class WithClamp(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x).clamp(-2, 2))


class WithNorm(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(nn.functional.layer_norm(x, x.shape[-1:]))


class Swapped(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


class TopHalf(Block):
    """As Gemma 3n has it: what is small for this token is zero."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.gate_proj(x)
        return self.down_proj(self.act_fn(gate * (gate > gate.mean(-1, keepdim=True))) * self.up_proj(x))


class Raising(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise KeyError("more is needed")


class Tuple(Block):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), None


class WithoutAttribute(Block):
    """The activation is called by itself; as in LFM2."""

    def __init__(self) -> None:
        super().__init__()
        del self.act_fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class WithResidual(Block):
    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return residual + super().forward(x)


class OfBoth(Block):
    """As TurboSparse has it: dReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.act_fn = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.act_fn(self.up_proj(x)))


class WithDropout(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


@pytest.mark.parametrize("kind", [WithFactor, WithClamp, WithNorm, Swapped, TopHalf, Raising, Tuple])
def test_a_block_that_computes_something_else_is_refused(kind: Callable[[], nn.Module]) -> None:
    with pytest.raises(UnsupportedModelError, match="does not compute what hf_flash would compute in its place") as caught:
        arithmetic_of(kind(), GATED, "here")  # type: ignore[arg-type]
    assert "where: here" in str(caught.value)


class Fused(nn.Module):
    """Gate and up in one matrix, as Phi-3 has them."""

    def __init__(self, *, bias: bool = False, turned: bool = False) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Linear(32, 128, bias=bias), nn.Linear(64, 32, bias=False)
        self.act_fn, self.turned = nn.SiLU(), turned

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(self.act_fn(up) * gate if self.turned else self.act_fn(gate) * up)


def test_gate_and_up_in_one_matrix_are_the_gate_first_and_have_no_bias() -> None:
    matrices: Any = {"gate": "gate_up_proj", "up": "gate_up_proj", "down": "down_proj"}
    assert arithmetic_of(Fused(), matrices, "here").activation.name == "silu"
    for other in (Fused(bias=True), Fused(turned=True)):
        with pytest.raises(UnsupportedModelError, match="does not compute what hf_flash would compute in its place"):
            arithmetic_of(other, matrices, "here")


@pytest.mark.parametrize("kind", [Block, WithoutAttribute, WithResidual, WithDropout])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16])
def test_what_differs_in_form_alone_is_taken(kind: type[Block], device: str, default: torch.dtype) -> None:
    """Whatever device and dtype are the defaults; the block is not changed, and nothing random is drawn."""
    block, before = kind().to(device).train(), torch.get_rng_state()
    kept = {name: (value, value.shape) for name, value in block.named_parameters()}
    torch.set_default_dtype(default)
    try:
        with torch.device(device):
            found = arithmetic_of(block, GATED, "here")  # type: ignore[arg-type]
    finally:
        torch.set_default_dtype(torch.float32)
    assert (found.activation.name, found.adds_residual) == ("silu", kind is WithResidual)
    assert block.training
    assert {name: (value, value.shape) for name, value in block.named_parameters()}.keys() == kept.keys()
    assert all(value is kept[name][0] for name, value in block.named_parameters())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_layer_that_computes_otherwise_than_the_others_is_refused(tmp_path: Path) -> None:
    config = AutoConfig.for_model("llama", hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2)
    model = skeleton(config)
    family = families.family_of(config, model)
    activation = family.activation_of(config)
    for layer in model.model.layers:
        check_arithmetic(layer, family, activation, "here")
    model.model.layers[2].mlp.act_fn = nn.GELU()
    with pytest.raises(UnsupportedModelError, match=r"expected: the activation silu.*\n  got: gelu"):
        check_arithmetic(model.model.layers[2], family, activation, "here")


@pytest.mark.parametrize("change", ["activation", "norm", "direct"])
def test_linear_layers_in_the_decoder_layer_are_watched(change: str, coverage: ModuleType) -> None:
    model = skeleton(coverage.tiny_config("opt"))
    layer = model.model.decoder.layers[0]
    relu = activation_named("relu")
    check_arithmetic(layer, OPT, relu, "here")
    if change == "activation":
        layer.activation_fn = nn.GELU()
    elif change == "norm":
        layer.fc2 = nn.Sequential(nn.LayerNorm(96), layer.fc2)
        layer.fc2.weight = layer.fc2[1].weight
        layer.activation_fn = nn.Sequential(nn.ReLU(), nn.Softmax(-1))
    else:
        layer.activation_fn = None
        layer.forward = lambda x: layer.fc2(torch.relu(layer.fc1(x)))
    with pytest.raises(UnsupportedModelError, match="does not compute what hf_flash would compute"):
        check_arithmetic(layer, OPT, relu, "here")


def test_a_family_that_says_another_activation_than_the_model_has_is_refused(coverage: ModuleType, tmp_path: Path) -> None:
    """Contract C9 holds for what somebody registers, too."""
    coverage.stock_model("llama", tmp_path)
    wrong = Family("llama", GATED, activation_key="hidden_act_of_another")  # type: ignore[arg-type]
    families.register_family(wrong)
    try:
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_act_of_another": "gelu"}))
        with pytest.raises(UnsupportedModelError, match=r"expected: the activation gelu.*\n  got: silu"):
            AutoModelForCausalLM.from_pretrained(
                tmp_path, quantization_config=FlashOffloadConfig(predictor="none", cache_dir=str(tmp_path / "c"))
            )
    finally:
        del families._FAMILIES["llama"]


# --- names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("function", "name"), [
    (nn.SiLU(), "silu"), (nn.ReLU(), "relu"), (nn.functional.gelu, "gelu"), (nn.GELU("tanh"), "gelu_pytorch_tanh"),
    (lambda x: torch.relu(x).square(), "relu2"), (nn.ReLU6(), "relu6"), (torch.cos, "cos"),
    (lambda x: torch.where(x > 0.01, x, 0.0), "fatrelu"),
])  # fmt: skip
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_activation_has_the_name_of_what_does_the_same(function: Any, name: str, device: str) -> None:
    with torch.device(device):
        found = activation_like(function)
    assert found.name == name
    assert found.zeros == (name in ("relu", "relu2", "relu6", "fatrelu"))
    assert found.level == (float(torch.tensor(0.01)) if name == "fatrelu" else 0.0)
    x = torch.linspace(-3, 3, 50)
    assert torch.equal(found.function(x), function(x))


def test_an_activation_of_both_products_is_found() -> None:
    assert arithmetic_of(OfBoth(), GATED, "here").activation.text == "relu of gate and up"  # type: ignore[arg-type]
    assert arithmetic_of(Block(), GATED, "here").activation.text == "silu"  # type: ignore[arg-type]


def test_numbers_that_json_has_no_words_for_are_read() -> None:
    found = config_object({"model_type": "falcon_h1", "time_step_limit": [0.0, {"__float__": "Infinity"}]})
    assert found.time_step_limit[1] == float("inf")


def test_how_long_a_sequence_may_be() -> None:
    assert longest_sequence(AutoConfig.for_model("llama", max_position_embeddings=77)) == 77
    assert longest_sequence(AutoConfig.for_model("mpt", max_seq_len=99)) == 99
    assert longest_sequence(AutoConfig.for_model("bloom")) == 131072


def test_a_config_that_is_wrong_is_said_to_be_so() -> None:
    """In the words of the class that it is for."""
    with pytest.raises(UnsupportedModelError) as caught:
        families.family_of({"model_type": "llama", "hidden_size": 65, "num_attention_heads": 2})
    assert "ImageTextToText" not in str(caught.value)
    assert "num_attention_heads" in str(caught.value) or "attention heads" in str(caught.value)


def test_autocast_where_a_model_is_loaded_changes_nothing() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert arithmetic_of(Block(), GATED, "here").activation.name == "silu"  # type: ignore[arg-type]
        with pytest.raises(UnsupportedModelError):
            arithmetic_of(WithFactor(), GATED, "here")  # type: ignore[arg-type]


def test_activations_with_parameters_are_not_asked(caplog: pytest.LogCaptureFixture) -> None:
    assert activation_like(torch.cos).name == "cos"
    assert caplog.records == []


def test_code_of_its_own_has_to_be_described() -> None:
    with pytest.raises(UnsupportedModelError, match="this architecture is not supported") as caught:
        families.family_of({"model_type": "thinker", "hidden_size": 7})
    assert "register_family" in str(caught.value)


def test_a_copy_of_a_recognised_model_shares_what_is_on_flash(coverage: ModuleType, tmp_path: Path) -> None:
    _, ids = coverage.stock_model("bloom", tmp_path / "plain")
    flash = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=FlashOffloadConfig(predictor="none", cache_dir=str(tmp_path / "cache"))
    )
    copied = copy.deepcopy(flash)
    with torch.no_grad():
        assert torch.equal(copied(ids).logits, flash(ids).logits)
    assert find_runtime(copied).engine is find_runtime(flash).engine
