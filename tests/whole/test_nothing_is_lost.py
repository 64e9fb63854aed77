"""State dicts, copies, conversions, adapters and tracers: they work as on the stock model, or are refused (contract C7)."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import warnings
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad
import torch.distributed.checkpoint
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file, save_model
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations, parametrize, prune
from transformers import (
    AutoModelForCausalLM,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
)  # fmt: skip

import hf_flash
from hf_flash import ConfigError, FlashOffloadConfig, StoreMissingError, UsageError

IDS = torch.tensor([[2, 11, 7, 30, 45, 7]])
FC1, FC2, BIAS = (f"model.decoder.layers.1.{name}" for name in ("fc1.weight", "fc2.weight", "fc1.bias"))
Change = Callable[[Any], Any]
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's, on any model


def load(folder: Path, predictor: str | None = "none", **arguments: Any) -> Any:
    settings = FlashOffloadConfig(predictor=predictor, **arguments)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=settings)


def load_stock(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture
def flash(packed: Path) -> Any:
    return load(packed)


@pytest.fixture
def stock(plain: Path) -> Any:
    return load_stock(plain)


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    """Of a prompt and of one token alone, which go different ways."""
    return torch.cat([model(ids).logits, model(ids[:, :1]).logits], dim=1)


def assert_close(found: Any, wanted: Any) -> None:
    """Two models, or their logits."""
    found, wanted = (part.detach() if isinstance(part, torch.Tensor) else logits(part) for part in (found, wanted))
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))


def assert_same_tensors(
    found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], *, but: Set[str] = frozenset()
) -> None:
    assert sorted(found) == sorted(wanted.keys() - but)
    for name, tensor in found.items():
        assert type(tensor) is torch.Tensor
        assert torch.equal(tensor, wanted[name]), name


def ffn(model: Any, layer: int = 1) -> Any:
    return model.model.decoder.layers[layer].fc1


# --- writers that are not ours ----------------------------------------------------------------------------------------


def test_a_state_dict_is_that_of_the_stock_model(flash: Any, stock: Any) -> None:
    found, wanted = flash.state_dict(), stock.state_dict()
    assert list(found) == list(wanted)
    assert [(t.shape, t.dtype, t.device) for t in found.values()] == [(t.shape, t.dtype, t.device) for t in wanted.values()]
    assert_same_tensors({name: tensor.clone() for name, tensor in found.items()}, wanted)


def through_torch(model: Any, folder: Path) -> Any:
    torch.save(model.state_dict(), folder / "all.pt")
    return torch.load(folder / "all.pt")


def through_safetensors(model: Any, folder: Path) -> Any:
    save_file({name: t for name, t in model.state_dict().items() if name != "lm_head.weight"}, folder / "all.safetensors")
    return load_file(folder / "all.safetensors")


def through_save_model(model: Any, folder: Path) -> Any:
    save_model(model, str(folder / "all.safetensors"))
    return load_file(folder / "all.safetensors")


def through_accelerate(model: Any, folder: Path) -> Any:
    Accelerator(cpu=True).save_model(model, folder, max_shard_size="20KB")
    shards = [load_file(path) for path in folder.glob("*.safetensors")]
    assert len(shards) > 2
    return {name: tensor for shard in shards for name, tensor in shard.items()}


def through_checkpoints_of_torch(model: Any, folder: Path) -> Any:
    with warnings.catch_warnings(action="ignore"):  # of one process
        torch.distributed.checkpoint.save(model.state_dict(), checkpoint_id=folder, no_dist=True)
        found = {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in model.state_dict().items()}
        torch.distributed.checkpoint.load(found, checkpoint_id=folder, no_dist=True)
    return found


def through_pickle(model: Any, folder: Path) -> Any:
    return pickle.loads(pickle.dumps(model.state_dict()))


def through_numpy(model: Any, folder: Path) -> Any:
    return {name: torch.from_numpy(tensor.numpy()) for name, tensor in model.state_dict().items()}


def through_a_copy(model: Any, folder: Path) -> Any:
    return {name: tensor + 0 for name, tensor in copy.deepcopy(model.state_dict()).items()}


WRITERS = (
    through_torch, through_safetensors, through_save_model, through_accelerate, through_checkpoints_of_torch, through_pickle,
    through_numpy, through_a_copy,
)  # fmt: skip


@pytest.mark.parametrize("written", WRITERS)
def test_every_writer_writes_the_real_weights(
    flash: Any, stock: Any, tmp_path: Path, written: Callable[[Any, Path], Any]
) -> None:
    found = written(flash, tmp_path)
    left_out = {"lm_head.weight", "model.decoder.embed_tokens.weight"} - found.keys()  # one of two that are tied
    assert len(left_out) < 2
    assert_same_tensors(found, stock.state_dict(), but=left_out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", ["post_ln", "no_bias", "odd"])
def test_it_holds_in_every_shape_and_dtype(opt: Callable[..., Path], tmp_path: Path, shape: str, dtype: torch.dtype) -> None:
    """The weights on flash are bfloat16: what is computed in float32 is given in float32."""
    folder = opt(shape, dtype=torch.bfloat16)
    settings = FlashOffloadConfig(predictor="none", cache_dir=str(tmp_path / "cache"))
    flash = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=settings)
    wanted = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).state_dict()
    assert_same_tensors(through_torch(flash, tmp_path), wanted)


def test_a_part_of_the_model_is_written_whole(flash: Any, stock: Any) -> None:
    buffer = io.BytesIO()
    torch.save(flash.model.decoder.layers.state_dict(), buffer)
    buffer.seek(0)
    assert_same_tensors(torch.load(buffer), stock.model.decoder.layers.state_dict())


def test_a_model_around_it_saves_the_plain_checkpoint(flash: Any, stock: Any, tmp_path: Path) -> None:
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**small, image_size=8, patch_size=4).to_dict(),
        qformer_config=Blip2QFormerConfig(**small, encoder_hidden_size=16).to_dict(),
        text_config=stock.config.to_dict(),
        num_query_tokens=2,
    )
    around = Blip2ForConditionalGeneration(config).eval()
    around.language_model = flash
    around.save_pretrained(tmp_path)
    again, info = Blip2ForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert_same_tensors(again.language_model.state_dict(), stock.state_dict())


def test_a_state_dict_reads_nothing_before_it_is_used_and_says_what_does_not_fit(
    flash: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_flash.runtime.flash_weights.available_memory", lambda: 1000)
    state = flash.state_dict()
    assert "FlashWeight" in repr(state[FC1])
    for use in (torch.clone, torch.Tensor.numpy, pickle.dumps, lambda weight: weight.data_ptr()):
        with pytest.raises(UsageError, match=r"do not fit into memory[\s\S]*layers.1.fc1.weight[\s\S]*16.0 KiB[\s\S]*to do"):
            use(state[FC1])
    flash.save_pretrained(tmp_path / "saved")  # copies files


def test_a_store_that_is_gone_is_an_error_of_ours(plain: Path, tmp_path: Path) -> None:
    flash = load(hf_flash.repack(plain, tmp_path / "flash"))
    state = flash.state_dict()
    for path in (tmp_path / "flash").glob("flash-layer-*"):
        path.unlink()
    with pytest.raises(StoreMissingError, match=r"is not there[\s\S]*flash-layer-00001"):
        state[FC1].clone()


# --- weights that are given to the FFN --------------------------------------------------------------------------------


def other(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor + 0.25 for name, tensor in state.items()}


@pytest.mark.parametrize("how", [{}, {"strict": False}, {"assign": True}, {"strict": False, "assign": True}], ids=str)
def test_other_ffn_weights_are_refused_and_nothing_is_loaded(flash: Any, stock: Any, how: dict[str, bool]) -> None:
    before = logits(flash)
    with pytest.raises(UsageError, match=r"on flash[\s\S]*layers.0.fc1.weight, .*and 2 more[\s\S]*repack"):
        flash.load_state_dict(other(stock.state_dict()), **how)
    assert torch.equal(logits(flash), before)
    with pytest.raises(UsageError, match=r"layers\.1\.fc2\.weight"):
        flash.load_state_dict({FC2: stock.state_dict()[FC2].flip(0)}, strict=False)
    part = flash.model.decoder.layers[1]
    with pytest.raises(UsageError, match=r"fc1\.weight"):
        part.load_state_dict({"fc1.weight": stock.state_dict()[FC1].double() * 2}, strict=False)
    flash.load_state_dict(stock.state_dict(), **how)
    assert torch.equal(logits(flash), before)


def test_finetuned_weights_around_the_ffn_are_loaded(flash: Any, stock: Any) -> None:
    changed = {name: t + 0.25 if name not in (FC1, FC2) and ".fc" not in name else t for name, t in stock.state_dict().items()}
    flash.load_state_dict(changed)
    stock.load_state_dict(changed)
    assert_close(flash, stock)
    stock.load_state_dict(flash.state_dict(), assign=True)  # and back
    assert_close(flash, stock)


def zeros(shape: tuple[int, ...] = (128, 32)) -> torch.Tensor:
    return torch.zeros(shape)


REFUSED: dict[str, Change] = {
    "a parameter": lambda fc1: setattr(fc1, "weight", nn.Parameter(zeros())),
    "a tensor": lambda fc1: setattr(fc1, "weight", zeros()),
    "nothing": lambda fc1: setattr(fc1, "weight", None),
    "another shape": lambda fc1: setattr(fc1, "weight", zeros((4, 32))),
    "registered": lambda fc1: fc1.register_parameter("weight", nn.Parameter(zeros())),
    "a buffer": lambda fc1: fc1.register_buffer("weight", zeros()),
    "data": lambda fc1: setattr(fc1.weight, "data", zeros()),
    "into data": lambda fc1: fc1.weight.data.copy_(zeros()),
    "in place": lambda fc1: fc1.weight.mul_(2),
    "a row": lambda fc1: fc1.weight.__setitem__(3, 1.0),
    "out": lambda fc1: torch.add(zeros(), 1, out=fc1.weight),
    "several": lambda fc1: torch._foreach_mul_([fc1.weight], 2),
    "init": lambda fc1: nn.init.normal_(fc1.weight),
    "a state dict's": lambda fc1: fc1.state_dict()["weight"].zero_(),
}


@pytest.mark.parametrize("change", REFUSED)
def test_weights_cannot_be_put_in_place(flash: Any, change: str) -> None:
    before = logits(flash)
    with pytest.raises(UsageError, match=r"only read[\s\S]*layers.1.fc1.weight"):
        REFUSED[change](ffn(flash))
    assert torch.equal(logits(flash), before)


def test_the_same_weights_are_taken(flash: Any, stock: Any) -> None:
    ffn(flash).weight = ffn(stock).weight
    assert torch.equal(ffn(flash).weight[5], ffn(stock).weight[5])
    assert_close(torch.func.functional_call(flash, dict(stock.named_parameters()), (IDS,)).logits, stock(IDS).logits)
    with pytest.raises(UsageError, match=r"fc1\.weight"):
        torch.func.functional_call(flash, other(dict(stock.named_parameters())), (IDS,))
    assert_close(flash, stock)


@pytest.mark.parametrize(
    "change",
    [
        lambda fc1: parametrize.register_parametrization(fc1, "weight", nn.Identity()),
        lambda fc1: prune.l1_unstructured(fc1, "weight", 0.5),
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
    ],
)
def test_what_would_recompute_the_weights_does_not_pass(flash: Any, change: Change) -> None:
    with pytest.raises((ValueError, TypeError)):
        change(ffn(flash))


def test_a_layer_that_was_replaced_by_a_plain_one_computes_and_is_not_saved(flash: Any, stock: Any, tmp_path: Path) -> None:
    layer, plain = flash.model.decoder.layers[1], stock.model.decoder.layers[1]
    layer.fc1 = plain.fc1
    with pytest.raises(UsageError, match=r"replaced[\s\S]*both projections"):
        flash(IDS)
    layer.fc2 = plain.fc2
    assert_close(flash, stock)
    assert_same_tensors(through_torch(flash, tmp_path), stock.state_dict())  # plain writers can
    with pytest.raises(UsageError, match=r"layers are not those"):
        flash.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("predictor", ["none", "quantized"])
def test_resized_embeddings_work_and_are_saved(packed: Path, tmp_path: Path, predictor: str) -> None:
    flash = load(packed, predictor)
    flash.resize_token_embeddings(104, mean_resizing=False)
    assert logits(flash).shape[-1] == 104
    flash.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path, predictor)), logits(flash))


# --- biases -----------------------------------------------------------------------------------------------------------


def by_loading(model: Any, bias: torch.Tensor) -> None:
    model.load_state_dict({BIAS: bias}, strict=False, assign=True)


def by_data(model: Any, bias: torch.Tensor) -> None:
    ffn(model).bias.data = bias


def by_parameter(model: Any, bias: torch.Tensor) -> None:
    ffn(model).bias = nn.Parameter(bias)


def by_copying(model: Any, bias: torch.Tensor) -> None:
    model.load_state_dict({BIAS: bias}, strict=False)


@pytest.mark.parametrize("put", [by_loading, by_data, by_parameter, by_copying])
@pytest.mark.parametrize("predictor", ["none", "quantized"])
def test_a_bias_that_was_replaced_is_used_by_the_predictor_too(
    packed: Path, stock: Any, put: Callable[[Any, torch.Tensor], None], predictor: str
) -> None:
    more = {} if predictor == "none" else {"predictor_margin": 20.0}
    flash = load(packed, predictor, **more)
    before = logits(flash)
    for model in (flash, stock):
        put(model, stock.state_dict()[BIAS].abs() + 3)  # nearly all neurons are active now
    assert (logits(flash) - before).abs().max() > 0.1
    assert_close(flash, stock)


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (lambda bias: bias.double(), "torch.float64"),
        (lambda bias: bias.half(), "torch.float16"),
        (lambda bias: bias[:100].clone(), r"\[100\]"),
        (lambda bias: torch.stack([bias, bias], 1)[:, 0], "not contiguous"),
        (lambda bias: bias.expand(1, -1), r"\[1, 128\]"),
        (lambda bias: bias.to("meta"), "on meta"),
    ],
)
@pytest.mark.parametrize("predictor", ["none", "quantized"])
def test_a_bias_that_does_not_fit_is_refused(packed: Path, change: Change, got: str, predictor: str) -> None:
    flash = load(packed, predictor, lookahead=1)
    ffn(flash).bias = nn.Parameter(change(ffn(flash).bias.detach()))
    for ids in (IDS, IDS[:, :1]):
        with pytest.raises(UsageError, match=rf"bias does not fit[\s\S]*layer 1[\s\S]*\[128\] torch.float32[\s\S]*{got}"):
            flash(ids)


class Plus(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.5


@pytest.mark.parametrize(
    "change",
    [
        lambda fc1: parametrize.register_parametrization(fc1, "bias", Plus()),
        lambda fc1: prune.random_unstructured(fc1, "bias", 0.9),
    ],
)
def test_a_bias_may_be_computed_anew(packed: Path, stock: Any, change: Change) -> None:
    flash = load(packed, "quantized", predictor_margin=20.0)
    for model in (flash, stock):
        torch.manual_seed(0)
        with torch.no_grad():
            change(ffn(model))
    assert_close(flash, stock)


def test_a_gradient_of_a_bias_alone_is_refused(flash: Any) -> None:
    flash.requires_grad_(False)
    ffn(flash).bias.requires_grad_(True)
    with pytest.raises(UsageError, match="no gradients"):
        flash(IDS).logits.sum().backward()


# --- saving a model whose layers are others ---------------------------------------------------------------------------


def cut(model: Any) -> None:
    model.model.decoder.layers = model.model.decoder.layers[:2]
    model.config.num_hidden_layers = 2


def cut_in_secret(model: Any) -> None:
    model.model.decoder.layers = model.model.decoder.layers[:2]


def turn(model: Any) -> None:
    model.model.decoder.layers = nn.ModuleList([*model.model.decoder.layers][::-1])


def repeat(model: Any) -> None:
    model.model.decoder.layers[2] = model.model.decoder.layers[0]


def repeat_a_copy(model: Any) -> None:
    model.model.decoder.layers[2] = copy.deepcopy(model.model.decoder.layers[0])


def grow(model: Any) -> None:
    model.model.decoder.layers.append(copy.deepcopy(model.model.decoder.layers[0]))
    model.config.num_hidden_layers = 4


def wrap(model: Any) -> None:
    get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))


@pytest.mark.parametrize("change", [cut, cut_in_secret, turn, repeat, repeat_a_copy, grow, wrap])
@pytest.mark.parametrize("target", ["a new folder", "its own folder"])
def test_a_model_with_other_layers_is_not_saved(plain: Path, tmp_path: Path, change: Change, target: str) -> None:
    folder = hf_flash.repack(plain, tmp_path / "flash")
    flash = load(folder)
    change(flash)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UsageError, match=r"layers are not those that were loaded[\s\S]*expected: the 3 layers[\s\S]*to do"):
        flash.save_pretrained(folder if target == "its own folder" else tmp_path / "saved")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not (tmp_path / "saved").exists()


def test_a_layer_of_another_model_is_not_saved(plain: Path, opt: Callable[..., Path], tmp_path: Path) -> None:
    flash, another = load(plain), load(opt(seed=1))
    flash.model.decoder.layers[1] = another.model.decoder.layers[1]
    with pytest.raises(UsageError, match="layers are not those that were loaded"):
        flash.save_pretrained(tmp_path / "saved")


# --- arguments of stock's save_pretrained, and conversions ------------------------------------------------------------


def test_what_stock_takes_is_taken(flash: Any, stock: Any, tmp_path: Path) -> None:
    """As SentenceTransformer, trl and accelerate call it."""
    flash.save_pretrained(tmp_path / "1", safe_serialization=True)
    flash.save_pretrained(
        tmp_path / "2", is_main_process=True, save_function=torch.save, state_dict=None, max_shard_size="1GB", variant=None,
        distributed_checkpoint=False, save_original_format=True, save_peft_format=True, token=None,
    )  # fmt: skip
    accelerator = Accelerator(cpu=True)
    state = accelerator.get_state_dict(accelerator.prepare_model(flash, evaluation_mode=True))
    flash.save_pretrained(tmp_path / "3", state_dict=state, save_function=accelerator.save)
    for name in "123":
        assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval(), flash)


def test_a_state_dict_is_what_is_saved(flash: Any, stock: Any, tmp_path: Path) -> None:
    changed = {
        name: t * 1.5 if "self_attn" in name else t for name, t in stock.state_dict().items() if name != "lm_head.weight"
    }
    flash.save_pretrained(tmp_path / "saved", state_dict=changed)
    stock.load_state_dict(changed, strict=False)
    assert_close(load(tmp_path / "saved"), stock)
    for state, error, match in (
        ({name: t for name, t in changed.items() if "self_attn" not in name}, ConfigError, "saved from its files"),
        (changed | {FC1: changed[FC1] + 1}, UsageError, "layers.1.fc1.weight"),
    ):
        with pytest.raises(error, match=match):
            flash.save_pretrained(tmp_path / "other", state_dict=state)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "argument", [{"safe_serialization": False}, {"variant": "fp16"}, {"distributed_checkpoint": True}], ids=str
)
def test_what_cannot_be_honoured_is_refused_by_name(flash: Any, tmp_path: Path, argument: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"saved from its files[\s\S]*got: {next(iter(argument))}"):
        flash.save_pretrained(tmp_path / "saved", **argument)
    assert not (tmp_path / "saved").exists()
    if "distributed_checkpoint" not in argument:
        with pytest.raises(ConfigError, match=rf"saved from its files[\s\S]*got: {next(iter(argument))}"):
            flash.push_to_hub("me/model", **argument)


@pytest.mark.parametrize(
    "convert",
    [
        lambda model: model.half(),
        lambda model: model.bfloat16(),
        lambda model: model.double(),
        lambda model: model.to(torch.float16),
        lambda model: model.to("cpu", torch.bfloat16),
        lambda model: model.to(torch.zeros(1).half()),
        lambda model: model.type(torch.float64),
        lambda model: model.type("torch.HalfTensor"),
    ],
)
def test_another_dtype_is_refused_at_once(flash: Any, convert: Change) -> None:
    before = logits(flash)
    for part in (flash, nn.Sequential(flash), flash.model.decoder.layers[1]):
        with pytest.raises(UsageError, match=r"dtype of the model was changed[\s\S]*expected: torch.float32[\s\S]*to do"):
            convert(part)
        if part is flash:
            assert torch.equal(logits(flash), before)  # nothing was converted


@pytest.mark.parametrize(
    "convert",
    [
        lambda model: model.float(),
        lambda model: model.to(torch.float32),
        lambda model: model.to("cpu"),
        lambda model: model.cpu(),
        lambda model: model.type(torch.float32),
    ],
)
def test_its_own_dtype_changes_nothing(flash: Any, convert: Change) -> None:
    before = logits(flash)
    assert torch.equal(logits(convert(flash)), before)


# --- copies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda model: copy.deepcopy(copy.deepcopy(model))])
def test_a_copy_computes_the_same_and_stays_tied(packed: Path, copied: Change) -> None:
    flash = load(packed, "quantized", lookahead=1)
    again = copied(flash)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    for _ in range(3):
        settings = {"max_new_tokens": 8, "do_sample": False}
        assert torch.equal(again.generate(IDS, **settings), flash.generate(IDS, **settings))
    assert hf_flash.stats(again).tokens == hf_flash.stats(flash).tokens > 0


def test_a_copy_has_parameters_of_its_own(packed: Path, stock: Any, tmp_path: Path) -> None:
    """And each of the two predicts with its own bias, in turns."""
    flash = load(packed, "quantized", predictor_margin=20.0)
    again, changed = copy.deepcopy(flash), copy.deepcopy(stock)
    for model in (again, changed):
        with torch.no_grad():
            ffn(model).bias.add_(3)
            model.model.decoder.layers[0].self_attn.q_proj.weight.mul_(2)
    for _ in range(2):
        assert_close(flash, stock)
        assert_close(again, changed)
    again.save_pretrained(tmp_path)
    assert_close(load(tmp_path, "quantized", predictor_margin=20.0), changed)


def test_two_threads_may_use_a_model_and_its_copy(packed: Path) -> None:
    flash = load(packed, "quantized")
    again = copy.deepcopy(flash)
    with torch.no_grad():
        ffn(again).bias.add_(3)
    wanted = [logits(model) for model in (flash, again)]
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(20):
            if not torch.equal(logits((flash, again)[number]), wanted[number]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_one_outlives_the_other(packed: Path) -> None:
    flash = load(packed, "quantized")
    wanted = logits(flash)
    again, layer = copy.deepcopy(flash), copy.deepcopy(flash.model.decoder.layers[1])
    del flash
    gc.collect()
    assert torch.equal(logits(again), wanted)
    del again
    gc.collect()
    assert layer(torch.zeros(1, 3, 32)).shape == (1, 3, 32)
    assert hf_flash.stats(layer).tokens > 0
    hf_flash.close(layer)


def test_closing_a_copy_closes_both(flash: Any) -> None:
    hf_flash.close(copy.deepcopy(flash))
    with pytest.raises(UsageError, match="closed"):
        flash(IDS)


def test_a_head_and_a_layer_can_be_copied_and_not_pickled(tiny_opt: Path) -> None:
    flash = load(tiny_opt)
    x = torch.randn(1, 3, flash.config.hidden_size)
    for part in (flash.lm_head, flash.model.decoder.layers[0]):
        with torch.no_grad():
            assert torch.equal(copy.deepcopy(part)(x), part(x))
        with pytest.raises(UsageError, match="cannot be pickled"):
            pickle.dumps(part)


# --- PEFT -------------------------------------------------------------------------------------------------------------


def lora(model: Any, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **{"target_modules": ["q_proj"]} | settings)
    return get_peft_model(model, config).eval()


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied after merging")
@pytest.mark.parametrize("settings", [{"modules_to_save": ["lm_head"]}, {"modules_to_save": ["fc1"]}, {"bias": "all"}], ids=str)
def test_adapters_that_save_more_than_lora(
    flash: Any, stock: Any, plain: Path, packed: Path, tmp_path: Path, settings: Any
) -> None:
    ours, theirs = lora(flash, **settings), lora(stock, **settings)
    for model in (ours, theirs):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("lm_head.modules_to_save.default.weight", "fc1.bias", "fc1.modules_to_save.default.bias")):
                    parameter.add_(0.5)
    assert_close(ours, theirs)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    for name in ("ours", "theirs"):
        again = (PeftModel.from_pretrained(model, tmp_path / name).eval() for model in (load(packed), load_stock(plain)))
        assert_close(*again)
    assert_close(copy.deepcopy(ours), theirs)
    assert_close(ours.merge_and_unload(), theirs.merge_and_unload())


def test_adapters_are_merged_and_the_result_is_saved(flash: Any, stock: Any, tmp_path: Path) -> None:
    merged = []
    for model in (lora(flash), lora(stock)):
        model.add_adapter("two", LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["q_proj"]))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".two." in name:
                    parameter.fill_(0.1)
        model.add_weighted_adapter(["default", "two"], [0.5, 0.5], "both", combination_type="linear")
        model.set_adapter("both")
        merged.append(model.merge_and_unload())
    assert_close(*merged)
    merged[0].save_pretrained(tmp_path)
    assert_close(load(tmp_path), merged[1])


@pytest.mark.parametrize("kind", [{"modules_to_save": ["fc1"]}, {"target_parameters": ["fc1.weight"]}], ids=str)
@pytest.mark.parametrize("use", [PeftModel.from_pretrained, lambda model, folder: model.load_adapter(folder)])
@pytest.mark.filterwarnings("ignore:target_parameters=.* were set but no parameter was matched")
def test_an_adapter_that_changes_the_ffn_is_refused(flash: Any, stock: Any, tmp_path: Path, kind: Any, use: Any) -> None:
    adapted = lora(stock, **kind)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "fc1.modules_to_save" in name:
                parameter.add_(0.5)
    adapted.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"fc1[\s\S]*repack"):
        use(flash, str(tmp_path))


# --- tracers and transformations --------------------------------------------------------------------------------------


def dual(call: Change) -> Any:
    x = torch.randn(3, 32)
    with torch.autograd.forward_ad.dual_level():
        return call(torch.autograd.forward_ad.make_dual(x, x))


X = torch.randn(3, 32)
TRACERS: dict[str, Change] = {
    "jit.trace": lambda model: torch.jit.trace(model, (IDS,), strict=False, check_trace=False),
    "jit.trace of a layer": lambda model: torch.jit.trace(ffn(model), (X,)),
    "jit.script": torch.jit.script,
    "jit.script of a layer": lambda model: torch.jit.script(ffn(model)),
    "export": lambda model: torch.export.export(model, (IDS,)),
    "export of one token": lambda model: torch.export.export(model, (IDS[:, :1],)),
    "onnx": lambda model: torch.onnx.export(model, (IDS,), io.BytesIO(), dynamo=False),
    "make_fx": lambda model: make_fx(ffn(model))(X),
    "make_fx before dispatch": lambda model: make_fx(ffn(model), pre_dispatch=True)(X),
    "make_fx fake": lambda model: make_fx(ffn(model), tracing_mode="fake")(X),
    "fx": lambda model: torch.fx.symbolic_trace(nn.Sequential(ffn(model))),
    "vmap": lambda model: torch.func.vmap(ffn(model))(X[None]),
    "grad": lambda model: torch.func.grad(lambda x: ffn(model)(x).sum())(X),
    "grad of biases": lambda model: torch.func.grad(lambda b: torch.func.functional_call(model, b, (IDS,)).logits.sum())(
        {BIAS: ffn(model).bias.detach()}
    ),
    "jvp": lambda model: torch.func.jvp(ffn(model), (X,), (X,)),
    "forward mode": lambda model: dual(ffn(model)),
}


@pytest.mark.filterwarnings("ignore")  # of torch, on its own future
@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize("lookahead", [0, 1])
def test_tracers_are_refused_by_name(packed: Path, tracer: str, lookahead: int) -> None:
    flash = load(packed, "quantized", lookahead=lookahead)
    before = logits(flash)
    with torch.no_grad() if "grad" not in tracer and "jvp" not in tracer else torch.enable_grad():
        with pytest.raises(UsageError, match=r"cannot be traced, exported or transformed[\s\S]*to do"):
            TRACERS[tracer](flash)
    assert torch.equal(logits(flash), before)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of TorchScript
def test_a_head_can_be_traced_and_scripted(tiny_opt: Path) -> None:
    head = load(tiny_opt).lm_head
    x = torch.randn(3, head.in_features)
    with torch.no_grad():
        for made in (torch.jit.trace(head, (x,)), torch.jit.script(head)):
            torch.testing.assert_close(made(x), head(x))
