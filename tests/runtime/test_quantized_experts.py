"""Experts in mxfp4 and fp8, as they lie: the stock model with the same plain numbers, within any budget."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, FineGrainedFP8Config

import hf_flash
from hf_flash import BudgetError, ConfigError, FlashOffloadConfig, StoreError, UnsupportedModelError
from hf_flash.compute import library as native
from hf_flash.planner import plan
from hf_flash.runtime.experts import FlashExperts
from hf_flash.runtime.model import runtime_of
from tests.conftest import torch_threads
from tests.quantized import MXFP4, fp4_of_experts, fp8, fp8_config, make, mxfp4_as_gpt_oss

E8M0 = torch.float8_e8m0fnu
KINDS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "gpt-oss": ("gpt_oss", mxfp4_as_gpt_oss, MXFP4),
    "qwen3": ("qwen3_moe", fp8((16, 16)), fp8_config((16, 16))),
    "deepseek": ("deepseek_v3", fp8((16, 16), torch.bfloat16), fp8_config((16, 16))),
    "uneven": ("deepseek_v3", fp8((40, 40), uneven=True), fp8_config((40, 40))),
    "wide blocks": ("glm4_moe", fp8((48, 16)), fp8_config((48, 16))),
    "exponents": ("qwen3_moe", fp8((16, 32), E8M0), fp8_config((16, 32), scale_fmt="ue8m0")),
    "other names": ("mixtral", fp8((16, 16), ending="scale"), fp8_config((16, 16))),
    "fp4 beside fp8": ("minimax", fp4_of_experts, fp8_config((16, 16), expert_dtype="fp4")),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    with torch_threads(1):
        yield


@pytest.fixture(scope="module")
def quantized(
    coverage: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Any, torch.Tensor]]:
    """`quantized("qwen3")`: a quantized checkpoint, the stock model with the same plain numbers, and token ids."""
    made: dict[str, tuple[Path, Any, torch.Tensor]] = {}

    def get(kind: str) -> tuple[Path, Any, torch.Tensor]:
        if kind not in made:
            model_type, quantize, config = KINDS[kind]
            base = tmp_path_factory.mktemp("quantized")
            _, ids = coverage.stock_model(model_type, base / "source")
            folder, plain = make(base / "source", base, quantize, config)
            made[kind] = folder, AutoModelForCausalLM.from_pretrained(plain, dtype="float32").eval(), ids
        return made[kind]

    return get


def load(folder: Path, budget: int | str | None = None, **arguments: Any) -> Any:
    kwargs = {"dtype": arguments.pop("dtype", "float32")}
    config = FlashOffloadConfig(memory_budget=budget, **arguments)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **kwargs).eval()


def least(folder: Path, **arguments: Any) -> int:
    with pytest.raises(BudgetError) as caught:
        load(folder, 1, **arguments)
    assert caught.value.minimum_bytes is not None
    return caught.value.minimum_bytes


def answers(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """A batch, a prompt, and single tokens after one another."""
    with torch.no_grad():
        first = model(ids[:1, :6], use_cache=True)
        steps, cache = [model(ids.repeat(1, 4)).logits, first.logits], first.past_key_values
        for at in range(6, 9):
            steps.append(model(ids[:1, at : at + 1], past_key_values=cache, use_cache=True).logits)
    return steps


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_the_stock_model_with_these_numbers_within_any_budget(kind: str, quantized: Any) -> None:
    folder, stock, ids = quantized(kind)
    wanted = answers(stock, ids)
    plenty = load(folder, "1GB")
    assert all(isinstance(ffn, FlashExperts) for ffn in runtime_of(plenty).ffns)
    first = answers(plenty, ids)
    for one, other in zip(first, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    floor, slots = least(folder, reader="direct"), sum(runtime_of(plenty).plan.slot_bytes)
    for room in (0, 1, 3):
        tight = load(folder, floor + room * slots, reader="direct")
        for _ in range(2):
            assert all(map(torch.equal, answers(tight, ids), first)), room
        assert hf_flash.stats(tight).dram_bytes <= floor + room * slots
    how: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids[:1])}
    assert plenty.generate(ids[:1], **how).tolist() == stock.generate(ids[:1], **how).tolist()


@pytest.mark.parametrize("kind", ["gpt-oss", "qwen3", "fp4 beside fp8"])
def test_torch_alone_computes_the_same(kind: str, quantized: Any) -> None:
    folder, stock, ids = quantized(kind)
    with native.switched_off():
        for one, other in zip(answers(load(folder, least(folder) + 100_000), ids), answers(stock, ids), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["gpt-oss", "qwen3"])
def test_in_16_bits_they_are_as_stock_makes_them_plain(kind: str, quantized: Any) -> None:
    folder, stock, ids = quantized(kind)
    quantized_by_stock = AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16").state_dict()
    half, model = copy.deepcopy(stock).bfloat16(), load(folder, dtype="bfloat16")
    for name, value in half.state_dict().items():
        assert torch.equal(model.state_dict()[name] + 0, value), name
        assert torch.equal(quantized_by_stock[name].bfloat16(), value), name
    exact, wanted, found = (answers(one, ids)[0].float() for one in (stock, half, model))
    assert (found - exact).abs().max() <= 2 * (wanted - exact).abs().max() + 1e-3 * exact.abs().max()


def test_slots_hold_experts_as_they_lie(quantized: Any) -> None:
    folder, stock, ids = quantized("gpt-oss")
    model = load(folder, reader="direct")
    places = runtime_of(model).engine.reader.places
    numbers = stock.model.layers[0].mlp.experts.gate_up_proj[0].numel() + stock.model.layers[0].mlp.experts.down_proj[0].numel()
    assert places.layers[0].expert_bytes == numbers // 2 + numbers // 32
    answers(model, ids)
    count = hf_flash.stats(model).counters
    assert count.read_bytes <= places.nbytes + 4096 * 8 * sum(layer.experts for layer in places.layers)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_restored_they_are_the_files_as_they_were(kind: str, quantized: Any, tmp_path: Path) -> None:
    folder, stock, ids = quantized(kind)
    load(folder).save_pretrained(tmp_path / "saved")
    whole = (folder / "model.safetensors").read_bytes()
    assert (tmp_path / "saved" / "model.safetensors").read_bytes() == whole
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="float32").eval()
    torch.testing.assert_close(answers(again, ids)[0], answers(stock, ids)[0], rtol=1e-4, atol=1e-4)
    again.save_pretrained(tmp_path / "twice")
    hf_flash.restore(tmp_path / "twice", tmp_path / "restored")
    assert (tmp_path / "restored" / "model.safetensors").read_bytes() == whole
    configs = [json.loads((place / "config.json").read_text()) for place in (tmp_path / "restored", folder)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


@pytest.mark.parametrize("kind", ["gpt-oss", "qwen3", "other names"])
def test_what_was_changed_in_memory_is_saved_as_plain_numbers(kind: str, quantized: Any, tmp_path: Path) -> None:
    folder, _, ids = quantized(kind)
    model = load(folder)
    weight = model.get_parameter("model.layers.1.self_attn.q_proj.weight")
    weight.data.mul_(0.37)
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert torch.equal(again.get_parameter("model.layers.1.self_attn.q_proj.weight"), weight)
    assert all(map(torch.equal, answers(again, ids), answers(model, ids)))
    stock = json.loads((tmp_path / "saved" / "config.json").read_text())
    stock["quantization_config"] = KINDS[kind][2]
    (tmp_path / "saved" / "config.json").write_text(json.dumps(stock))
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="bfloat16")
    assert torch.equal(other.get_parameter("model.layers.1.self_attn.q_proj.weight").bfloat16(), weight.bfloat16())


def test_planned_they_take_what_they_take_loaded(quantized: Any, tmp_path: Path) -> None:
    for kind in ("gpt-oss", "qwen3", "fp4 beside fp8"):
        folder, *_ = quantized(kind)
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "config.json").write_text((folder / "config.json").read_text())
        outlook = plan(tmp_path / kind, dtype="float32")
        model = load(folder)
        assert outlook.expert_bytes == runtime_of(model).engine.reader.places.layers[-1].expert_bytes
        assert outlook.memory.minimum_bytes >= least(folder)


def test_what_stays_in_32_bits_does_so_beside_quantized_weights(coverage: ModuleType, tmp_path: Path) -> None:
    """Beam's router; and of a plain checkpoint nothing is touched."""
    _, ids = coverage.stock_model("beam", tmp_path / "source")
    folder, plain = make(tmp_path / "source", tmp_path, fp8((16, 16)), fp8_config((16, 16)))
    stock = AutoModelForCausalLM.from_pretrained(plain, dtype="bfloat16").eval()
    kept = {name for name, value in stock.named_parameters() if value.dtype == torch.float32}
    assert kept
    for source in (plain, folder):
        model = load(source, dtype="bfloat16")
        assert {name for name, value in model.named_parameters() if value.dtype == torch.float32} == kept
        for name in kept:
            assert torch.equal(model.get_parameter(name), stock.get_parameter(name))
        held, buffers = (sum(t.nbytes for t in some) for some in (model.parameters(), model.buffers()))
        assert held <= hf_flash.stats(model).resident_bytes <= held + buffers
        found, wanted = (answers(one, ids)[0].float() for one in (model, stock))
        assert (found - wanted).abs().max() <= 0.05 * wanted.abs().max()


@pytest.mark.parametrize("kind", ["qwen3", "other names"])
def test_without_its_head_it_is_saved_with_the_names_of_the_checkpoint(kind: str, quantized: Any, tmp_path: Path) -> None:
    folder, stock, ids = quantized(kind)
    model = AutoModel.from_pretrained(folder, quantization_config=FlashOffloadConfig(), dtype="float32").eval()
    model.save_pretrained(tmp_path / "same")
    assert (tmp_path / "same" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    weight = model.get_parameter("layers.1.self_attn.q_proj.weight")
    weight.data.mul_(0.37)
    model.save_pretrained(tmp_path / "changed")
    changed = copy.deepcopy(stock)
    changed.get_parameter("model.layers.1.self_attn.q_proj.weight").data.mul_(0.37)
    torch.testing.assert_close(answers(load(tmp_path / "changed"), ids)[0], answers(changed, ids)[0], rtol=1e-4, atol=1e-4)


def test_of_layers_that_stay_plain_the_plan_knows(coverage: ModuleType, tmp_path: Path) -> None:
    coverage.stock_model("qwen3_moe", tmp_path / "source")
    some = lambda state: fp8((16, 16))({name: value for name, value in state.items() if "self_attn" in name})  # noqa: E731
    both = lambda state: tuple(state | part for part in some(state))  # noqa: E731
    folder, _ = make(tmp_path / "source", tmp_path, both, fp8_config((16, 16), modules_to_not_convert=["model.layers.*.mlp"]))
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((folder / "config.json").read_text())
    places = runtime_of(load(folder)).engine.reader.places
    assert places.layers[0].pieces[0].dtype == torch.float32
    assert plan(bare, dtype="float32").expert_bytes == places.layers[0].expert_bytes


# --- what is wrong with a checkpoint


def change(folder: Path, target: Path, how: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    target.mkdir()
    for name in ("config.json", "generation_config.json"):
        (target / name).write_bytes((folder / name).read_bytes())
    state = load_file(folder / "model.safetensors")
    how(state)
    save_file({name: value.contiguous() for name, value in state.items()}, target / "model.safetensors", {"format": "pt"})
    return target


QWEN = "model.layers.1.mlp.experts.2.up_proj.weight"
OSS = "model.layers.1.mlp.experts.down_proj"


@pytest.mark.parametrize("tokens", [1, 12], ids=["one call", "a prompt"])
@pytest.mark.parametrize(("kind", "name"), [("qwen3", f"{QWEN}_scale_inv"), ("gpt-oss", f"{OSS}_scales")])
def test_a_scale_that_is_no_number_is_an_error_that_names_the_expert(
    kind: str, name: str, tokens: int, quantized: Any, tmp_path: Path
) -> None:
    folder, _, ids = quantized(kind)

    def damage(state: dict[str, torch.Tensor]) -> None:
        state[name].view(torch.uint8).reshape(state[name].shape[0], -1)[:, -4:] = 0xFF

    def run() -> None:
        for at in range(12):
            answer = ids[:, at : at + 1] if tokens == 1 else ids.repeat(1, 8)
            with torch.no_grad():
                model(answer)

    model = load(change(folder, tmp_path / "bad", damage))
    for _ in range(2):  # the second time as well
        with pytest.raises(hf_flash.StoreError, match=r"layers\.1\.mlp\.experts, expert \d") as caught:
            run()
        assert "scales" in str(caught.value)


@pytest.mark.parametrize(("kind", "how", "said"), [
    ("qwen3", lambda state: state.pop(f"{QWEN}_scale_inv"), "layers.1.mlp.experts.gate_up_proj"),
    ("qwen3", lambda state: state.update({f"{QWEN}_scale_inv": torch.ones(7, 4)}), "layers.1.mlp.experts.gate_up_proj"),
    ("qwen3", lambda state: state.update({f"{QWEN}_scale_inv": torch.ones(3, 4).double()}), "layers.1.mlp.experts"),
    ("qwen3", lambda state: state.update({QWEN: state[QWEN].view(torch.uint8)}), "layers.1.mlp.experts.gate_up_proj"),
    ("gpt-oss", lambda state: state.pop(f"{OSS}_scales"), "layers.1.mlp.experts.down_proj"),
    ("gpt-oss", lambda state: state.pop(f"{OSS}_blocks"), "layers.1.mlp.experts.down_proj"),
    ("gpt-oss", lambda state: state.update({f"{OSS}_scales": state[f"{OSS}_scales"][:, :-1]}), "layers.1.mlp.experts"),
], ids=["none", "grid", "dtype", "bytes", "no scales", "no numbers", "fewer"])  # fmt: skip
def test_scales_that_do_not_fit_are_refused_by_name(kind: str, how: Any, said: str, quantized: Any, tmp_path: Path) -> None:
    folder, *_ = quantized(kind)
    with pytest.raises(hf_flash.HfFlashError) as caught:
        load(change(folder, tmp_path / "changed", how))
    assert said in str(caught.value)


@pytest.mark.parametrize("ending", ["", "_by_another_name"])
def test_numbers_beside_experts_that_lack_their_scales_are_refused(ending: str, quantized: Any, tmp_path: Path) -> None:
    """Stock would multiply with the bare codes, if their dtype fitted."""
    name = "model.layers.1.self_attn.q_proj.weight"

    def rename(state: dict[str, torch.Tensor]) -> None:
        scales = state.pop(f"{name}_scale_inv")
        if ending:
            state[name + ending] = scales

    with pytest.raises(StoreError, match=r"(?s)no scales.*layers\.1\.self_attn\.q_proj"):
        load(change(quantized("qwen3")[0], tmp_path / "changed", rename))


def test_a_config_that_means_nothing_is_an_error(quantized: Any, tmp_path: Path) -> None:
    folder = change(quantized("qwen3")[0], tmp_path / "changed", lambda state: None)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= {"weight_block_size": [16]}
    (folder / "config.json").write_text(json.dumps(config))
    for attempt in (load, plan):
        with pytest.raises(ConfigError, match="does not read"):
            attempt(folder)
    with pytest.raises(ConfigError, match="how a checkpoint is quantized"):
        FlashOffloadConfig(checkpoint_quantization="fp8")  # type: ignore[arg-type]


def test_a_dense_model_that_is_quantized_already_is_refused(coverage: ModuleType, tmp_path: Path) -> None:
    coverage.stock_model("llama", tmp_path / "source")
    folder, _ = make(tmp_path / "source", tmp_path, fp8((16, 16)), fp8_config((16, 16)))
    with pytest.raises(UnsupportedModelError, match="only mixtures"):
        load(folder)


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes", "compressed-tensors"])
def test_other_methods_are_refused_by_name(method: str, quantized: Any, tmp_path: Path) -> None:
    folder = change(quantized("qwen3")[0], tmp_path / "other", lambda state: None)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=f"(?s)does not read.*{method}"):
        load(folder)


def test_stock_goes_on_to_refuse_configs_of_two_methods(quantized: Any) -> None:
    """Ours meets any method; the others are none of our business."""
    folder, *_ = quantized("gpt-oss")
    with pytest.raises(ValueError, match="Mxfp4Config"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=FineGrainedFP8Config(dequantize=True))
