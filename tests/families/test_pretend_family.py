"""A family is data: a kind of model that one file of names describes loads, reads, saves, and gives the model's own answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import CausalLMOutputWithPast

import hf_flash
from hf_flash import FlashOffloadConfig, StoreFormatError, UnsupportedModelError, families
from hf_flash.families.base import Family, Shape, check_family
from hf_flash.runtime.model import find_runtime
from hf_flash.store.layout import FlashStore
from hf_flash.store.safetensors_files import read_header
from tests.families.pretend import PRETEND

# --- the model's own code, as somebody would have written it --------------------------------------------------------------


class PretendConfig(PretrainedConfig):
    model_type = "pretend"

    def __init__(
        self, hidden_size: int = 24, breadth: int | list[int] = 80, num_hidden_layers: int = 3, heads: int = 2,
        vocab_size: int = 64, bend: str = "silu", bias: bool = False, both: bool = False,
        hidden_act_param: float = 0.0, **kwargs: Any,
    ) -> None:  # fmt: skip
        self.hidden_size, self.breadth, self.num_hidden_layers, self.heads = hidden_size, breadth, num_hidden_layers, heads
        self.vocab_size, self.bend, self.bias = vocab_size, bend, bias
        self.both, self.hidden_act_param = both, hidden_act_param
        super().__init__(**{"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3} | kwargs)


class FATReLU(nn.Module):
    """As ProSparse's models have it."""

    def __init__(self, level: float) -> None:
        super().__init__()
        self.level = level

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(x > self.level, x, 0.0)


class Thinking(nn.Module):
    def __init__(self, config: PretendConfig, number: int) -> None:
        super().__init__()
        breadth = config.breadth if isinstance(config.breadth, int) else config.breadth[number]
        self.wicket = nn.Linear(config.hidden_size, breadth, bias=config.bias)
        self.climb = nn.Linear(config.hidden_size, breadth, bias=config.bias)
        self.descend = nn.Linear(breadth, config.hidden_size, bias=config.bias)
        self.bend = FATReLU(config.hidden_act_param) if config.bend == "fatrelu" else ACT2FN[config.bend]
        self.both = config.both

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up = self.climb(x)
        return self.descend(self.bend(self.wicket(x)) * (self.bend(up) if self.both else up))


class Floor(nn.Module):
    def __init__(self, config: PretendConfig, number: int) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(config.hidden_size), nn.Linear(config.hidden_size, config.hidden_size)
        self.thinking = Thinking(config, number)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.mix(x.cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device)[:, None].to(x.dtype))
        return x + self.thinking(self.norm(x))


class Tower(nn.Module):
    def __init__(self, config: PretendConfig) -> None:
        super().__init__()
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.floors = nn.ModuleList(Floor(config, number) for number in range(config.num_hidden_layers))


class PretendForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = PretendConfig

    def __init__(self, config: PretendConfig) -> None:
        super().__init__(config)
        self.model, self.head = Tower(config), nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.data.normal_(0.0, 0.3)

    def get_decoder(self) -> nn.Module:
        return self.model

    def get_input_embeddings(self) -> nn.Module:
        return self.model.words

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        return {"input_ids": input_ids}

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> CausalLMOutputWithPast:
        x = self.model.words(input_ids)
        for floor in self.model.floors:
            x = floor(x)
        return CausalLMOutputWithPast(logits=self.head(x))


@pytest.fixture(scope="module", autouse=True)
def _known() -> Iterator[None]:
    AutoConfig.register("pretend", PretendConfig, exist_ok=True)
    AutoModelForCausalLM.register(PretendConfig, PretendForCausalLM, exist_ok=True)
    families.register_family(PRETEND)
    yield
    del families._FAMILIES["pretend"]


IDS = torch.arange(4, 44).view(2, 20)


def make(folder: Path, **config: Any) -> Path:
    torch.manual_seed(0)
    PretendForCausalLM(PretendConfig(**config)).save_pretrained(folder)
    return folder


# --- what it does -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [{}, {"bias": True}, {"bend": "relu", "bias": True}, {"bend": "gelu", "hidden_size": 22}, {"breadth": [80, 300, 24]}],
)
def test_it_loads_from_a_plain_checkpoint_with_the_models_own_answers(tmp_path: Path, config: dict[str, Any]) -> None:
    plain = make(tmp_path / "plain", **config)
    stock = AutoModelForCausalLM.from_pretrained(plain)
    flash = AutoModelForCausalLM.from_pretrained(plain, quantization_config=FlashOffloadConfig(predictor="none"))
    with torch.no_grad():
        torch.testing.assert_close(flash(IDS).logits, stock(IDS).logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(flash(IDS[:1, :1]).logits, stock(IDS[:1, :1]).logits, rtol=1e-4, atol=1e-4)
    wanted = stock.generate(IDS, max_new_tokens=8, do_sample=False)
    assert flash.generate(IDS, max_new_tokens=8, do_sample=False).tolist() == wanted.tolist()
    assert hf_flash.stats(flash).counters.read_bytes > 0
    assert flash.state_dict().keys() == stock.state_dict().keys()
    weight = flash.model.floors[1].thinking.climb.weight
    assert torch.equal(weight + 0, stock.model.floors[1].thinking.climb.weight)


@pytest.mark.parametrize("predictor", ["none", "quantized"])
@pytest.mark.parametrize(
    "config", [{"bend": "fatrelu", "hidden_act_param": 0.3}, {"bend": "relu", "both": True}, {"bend": "relu2", "both": True}]
)
def test_activations_of_models_with_code_of_their_own(tmp_path: Path, config: dict[str, Any], predictor: str) -> None:
    """ProSparse's FATReLU, and dReLU, which TurboSparse and Bamboo have: ReLU of gate and up."""
    plain = make(tmp_path / "plain", hidden_size=64, breadth=256, **config)
    stock = AutoModelForCausalLM.from_pretrained(plain)
    families.register_family(replace(PRETEND, activation_of_both=config.get("both", False)))
    try:
        quantization = FlashOffloadConfig(predictor=predictor)
        flash = AutoModelForCausalLM.from_pretrained(plain, quantization_config=quantization)
        wanted = stock.generate(IDS[:1], max_new_tokens=12, do_sample=False)
        assert flash.generate(IDS[:1], max_new_tokens=12, do_sample=False).tolist() == wanted.tolist()
        before = hf_flash.stats(flash).counters.selected
        flash(IDS[:1, :1])
        selected = hf_flash.stats(flash).counters.selected - before
        assert selected == 3 * 256 if predictor == "none" else 0 < selected < 2 * 256
        families.register_family(replace(PRETEND, activation_of_both=not config.get("both", False)))
        with pytest.raises(UnsupportedModelError, match=f"activation {config['bend']}"):
            AutoModelForCausalLM.from_pretrained(plain, quantization_config=quantization)
    finally:
        families.register_family(PRETEND)


@pytest.mark.parametrize("predictor", ["none", "quantized"])
def test_layers_of_different_width_each_have_their_own(tmp_path: Path, predictor: str) -> None:
    widths = [4096, 3000, 96]
    plain = make(tmp_path / "plain", breadth=widths, bend="relu", hidden_size=64)
    packed = hf_flash.repack(plain, tmp_path / "packed")
    store = FlashStore.open_folder(packed)
    assert (store.widths, store.check()) == (tuple(widths), [])

    def load(budget: int | str) -> Any:
        config = FlashOffloadConfig(memory_budget=budget, predictor=predictor)
        return AutoModelForCausalLM.from_pretrained(packed, quantization_config=config)

    least = hf_flash.stats(load("1GB")).minimum_bytes
    calls = (IDS, IDS[:1, :1], IDS[:, :3], IDS[:1, :1])
    found = []
    for budget in (least, least + 2_000_000, "1GB"):
        flash = load(budget)
        with torch.no_grad():
            found.append([flash(ids).logits for ids in calls])
        stats = hf_flash.stats(flash)
        assert (stats.d_ff, stats.neurons) == (4096, sum(widths))
        assert stats.window_bytes <= sum(widths) * store.unit.row_bytes
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))
    stock, restored = (AutoModelForCausalLM.from_pretrained(f) for f in (plain, hf_flash.restore(packed, tmp_path / "again")))
    assert all(torch.equal(one, other) for one, other in zip(stock.parameters(), restored.parameters(), strict=True))
    if predictor == "none":
        with torch.no_grad():
            for logits, ids in zip(found[0], calls, strict=True):
                torch.testing.assert_close(logits, stock(ids).logits, rtol=1e-3, atol=1e-3 * float(logits.abs().max()))


def test_weights_of_another_shape_are_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_FLASH_CACHE", str(tmp_path / "cache"))
    plain = make(tmp_path / "plain", breadth=[80, 40, 24])
    config = PretendConfig.from_pretrained(plain)
    config.breadth = [80, 40, 25]
    with pytest.raises(UnsupportedModelError, match=r"d_ff \[80, 40, 25\][\s\S]*d_ff \[80, 40, 24\]"):
        AutoModelForCausalLM.from_pretrained(plain, config=config, quantization_config=FlashOffloadConfig())
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("breadth", [[80, 80], [80, 80, 0], [80, 80, "80"], [80, True, 80], 0, None, []])
def test_widths_that_cannot_be_are_refused(breadth: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="breadth"):
        PRETEND.shape(PretendConfig().to_dict() | {"breadth": breadth})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("capacity", [0, 20, 80])
def test_what_is_in_memory_does_not_change_the_answer(tmp_path: Path, dtype: torch.dtype, capacity: int) -> None:
    plain = make(tmp_path / "plain", bias=True)
    whole = AutoModelForCausalLM.from_pretrained(plain, dtype=dtype, quantization_config=FlashOffloadConfig())
    neuron = find_runtime(whole).store.layers[0].unit.as_dtype(dtype).row_bytes
    least = hf_flash.stats(whole).minimum_bytes
    budget = least + 3 * capacity * neuron
    tight = AutoModelForCausalLM.from_pretrained(
        plain, dtype=dtype, quantization_config=FlashOffloadConfig(memory_budget=budget)
    )
    assert hf_flash.stats(tight).capacity == capacity
    with torch.no_grad():
        for ids in (IDS, IDS[:1, :1], IDS[:, :3], IDS[:1, :1]):
            assert torch.equal(tight(ids).logits, whole(ids).logits)


def test_a_store_has_its_parts_and_gives_the_checkpoint_back(tmp_path: Path) -> None:
    plain = make(tmp_path / "plain", bias=True)
    packed = hf_flash.repack(plain, tmp_path / "packed")
    store = FlashStore.open_folder(packed)
    assert {layer.unit.text for layer in store.layers} == {"gate:row,up:row,down:column"}
    assert store.layers[2].names == tuple(f"model.floors.2.thinking.{name}.weight" for name in ("wicket", "climb", "descend"))
    meta = read_header(store.layers[0].path)[1]
    assert (meta["hf_flash.format_version"], meta["hf_flash.parts"]) == ("3", "gate:row,up:row,down:column")
    assert store.check() == []
    again = hf_flash.restore(packed, tmp_path / "again")
    one, other = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (plain, again))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    model = AutoModelForCausalLM.from_pretrained(packed)
    model.save_pretrained(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(saved(IDS).logits, model(IDS).logits)


def test_relu_on_the_gate_is_predicted_from_the_gate(tmp_path: Path) -> None:
    plain = make(tmp_path / "plain", bend="relu", breadth=256, hidden_size=64)
    config = FlashOffloadConfig(predictor="quantized", predictor_bits=8)
    flash = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config)
    stock = AutoModelForCausalLM.from_pretrained(plain)
    with torch.no_grad():
        torch.testing.assert_close(flash(IDS).logits, stock(IDS).logits, rtol=1e-2, atol=1e-2)
    found = hf_flash.stats(flash)
    assert found.predictor == "int8"
    flash(IDS[:1, :1])
    assert hf_flash.stats(flash).counters.selected < 3 * 256 + found.counters.selected


@pytest.mark.parametrize(("parts", "reads"), [(True, 3), (False, 1)])
def test_a_bundle_is_torn_into_its_parts(tmp_path: Path, parts: bool, reads: int) -> None:
    plain = make(tmp_path / "plain", bend="relu", hidden_size=22)
    config = FlashOffloadConfig(predictor="quantized", lookahead=0)
    whole, torn = (AutoModelForCausalLM.from_pretrained(plain, quantization_config=config) for _ in range(2))
    find_runtime(torn).engine.reader.tear_bundles(parts=parts)
    with torch.no_grad():
        assert torch.equal(torn(IDS[:1, :1]).logits, whole(IDS[:1, :1]).logits)
    count = hf_flash.stats(torn).counters
    assert count.reads == reads * count.missing_bytes / find_runtime(torn).store.layers[0].bundle_bytes > 0


def test_a_predictor_without_zeros_is_refused_by_name(tmp_path: Path) -> None:
    plain = make(tmp_path / "plain")
    with pytest.raises(UnsupportedModelError, match="exact zeros") as caught:
        AutoModelForCausalLM.from_pretrained(plain, quantization_config=FlashOffloadConfig(predictor="quantized"))
    assert "'silu'" in str(caught.value) or "silu" in str(caught.value)


def test_it_is_calibrated_under_its_own_names(tmp_path: Path) -> None:
    plain = make(tmp_path / "plain", bend="relu", bias=True, max_position_embeddings=64)
    folder = hf_flash.repack(plain, tmp_path / "packed")
    tokens = torch.randint(4, 64, (640,), generator=torch.Generator().manual_seed(0))
    report = hf_flash.calibrate(folder, tokens, samples=16, context=32, rank=4, epochs=1, placement=False)
    assert len(report["layers"]) == 3
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=FlashOffloadConfig(predictor="lowrank"))
    model(IDS[:1, :1])
    assert hf_flash.stats(model).predictor == "lowrank"


UP_DOWN: Any = {"up": "a", "down": "b"}


@pytest.mark.parametrize(("field", "family"), [
    ("matrices", {"matrices": {"up": "a"}}),
    ("matrices", {"matrices": {"down": "b", "up": "a"}}),
    ("matrices", {"matrices": UP_DOWN | {"sideways": "c"}}),
    ("matrices", {"matrices": {}}),
    ("matrices", {"matrices": {"gate": "c"} | UP_DOWN, "block": "", "activation": "act"}),
    ("activation", {"matrices": UP_DOWN, "block": ""}),
    ("columns", {"matrices": UP_DOWN, "columns": frozenset({"gate", "down"})}),
    ("matrices", {"matrices": {"up": "a", "gate": "a", "down": "b"}}),
    ("matrices", {"matrices": {"gate": "a", "up": "b", "down": "a"}}),
    ("matrices", {"matrices": {"gate": "a", "up": "a", "down": "a"}}),
    ("matrices", {"matrices": {"up": "a", "down": "a"}}),
    ("matrices", {"matrices": {"gate": "a", "up": "a", "down": "b"}, "columns": frozenset({"gate", "up", "down"})}),
])  # fmt: skip
def test_a_family_that_cannot_be_is_refused(field: str, family: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match=f"{field} of nonsense"):
        check_family(Family("nonsense", **family))


@pytest.mark.parametrize("family", [
    {"matrices": UP_DOWN}, {"matrices": {"gate": "c"} | UP_DOWN}, {"matrices": UP_DOWN, "block": "", "activation": "act"},
    {"matrices": {"gate": "c"} | UP_DOWN, "columns": frozenset({"gate", "up", "down"})},
    {"matrices": {"gate": "a", "up": "a", "down": "b"}},
])  # fmt: skip
def test_a_family_that_can_be_is_not(family: dict[str, Any]) -> None:
    check_family(Family("sense", **family))


def test_the_families_of_the_package_can_be() -> None:
    for family in families._FAMILIES.values():
        check_family(family)


@pytest.mark.parametrize("second", ["vision.floors.0", "decoder.floors.7"])
def test_two_stacks_of_layers_are_refused_and_both_named(second: str) -> None:
    names = [
        f"{layer}.thinking.{matrix}.weight"
        for layer in ("text.floors.0", "text.floors.1", second)
        for matrix in PRETEND.matrices.values()
    ]
    with pytest.raises(StoreFormatError, match="several stacks") as caught:
        PRETEND.names(names)
    assert "text.floors.N.thinking.wicket.weight" in str(caught.value)
    assert second.replace("0", "N").replace("7", "N") + ".thinking.wicket.weight" in str(caught.value)
    assert len(PRETEND.names(names[:6])) == 2


def with_norm(block: nn.Module) -> None:
    block.norm = nn.LayerNorm(24)


def with_second_matrix(block: nn.Module) -> None:
    block.after = nn.Linear(24, 24, bias=False)


def with_scale(block: nn.Module) -> None:
    block.register_buffer("scale", torch.ones(1), persistent=False)


def with_scale_of_a_matrix(block: Any) -> None:
    block.climb.scale = nn.Parameter(torch.ones(1))


def without_a_matrix(block: Any) -> None:
    del block.climb


@pytest.mark.parametrize(("change", "name"), [
    (with_norm, "norm.weight"), (with_second_matrix, "after.weight"), (with_scale, "scale"),
    (with_scale_of_a_matrix, "climb.scale"), (without_a_matrix, "climb.weight"),
])  # fmt: skip
def test_a_block_with_other_tensors_than_its_family_names_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None], name: str
) -> None:
    plain, before = make(tmp_path / "plain", bias=True), Thinking.__init__

    def changed(block: Thinking, *arguments: Any) -> None:
        before(block, *arguments)
        change(block)

    monkeypatch.setattr(Thinking, "__init__", changed)
    with pytest.raises(UnsupportedModelError, match="does not hold what its family describes") as caught:
        AutoModelForCausalLM.from_pretrained(plain, quantization_config=FlashOffloadConfig())
    assert "thinking of floors.0" in str(caught.value)
    assert name in str(caught.value)


def test_sizes_are_those_of_the_config() -> None:
    shape = PRETEND.shape(PretendConfig(heads=4, hidden_size=32).to_dict())
    assert shape == Shape(d_model=32, widths=(80, 80, 80), heads=4, kv_heads=4, head_dim=8)
    assert shape.kv_bytes(2) == 2 * 3 * 32 * 2
    assert Shape(64, (10, 20), 8, 2, 8).kv_bytes(2) == 2 * 2 * 16 * 2
