"""What people use around a model: pipelines, device maps, PEFT, lm-evaluation-harness, worker processes."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, dispatch_model
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, TextIteratorStreamer, pipeline

import hf_flash
from hf_flash import ConfigError, FlashOffloadConfig, UsageError
from tests.conftest import ROOT, TINY_OPT

PROMPTS = ["In the beginning God created", "And", "The state of the Union"]
GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
IDS = torch.arange(5, 30)[None]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real small model, repacked; computes every neuron, so that it can be held against the stock one."""
    folder = hf_flash.repack(TINY_OPT, tmp_path_factory.mktemp("packed") / "tiny-flash")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=FlashOffloadConfig(predictor="none"))
    model.save_pretrained(folder)
    return folder


def load(folder: Path = TINY_OPT, **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **kwargs).eval()


@pytest.fixture(scope="module")
def stock() -> Any:
    return load()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(IDS).logits
    return found


def close_to(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=2e-5 * wanted.abs().max().item(), rtol=0)


# --- pipelines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
def test_a_pipeline_with_batches(packed: Path, stock: Any, tokenizer: Any, batch: int) -> None:
    tokenizer.padding_side = "left"
    settings = {"tokenizer": tokenizer, "batch_size": batch}
    wanted = pipeline("text-generation", model=stock, **settings)(PROMPTS, **GREEDY)
    assert pipeline("text-generation", model=load(packed), **settings)(PROMPTS, **GREEDY) == wanted


def test_a_pipeline_that_streams(packed: Path, stock: Any, tokenizer: Any) -> None:
    texts = []
    for model in (stock, load(packed)):
        pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
        streamer = TextIteratorStreamer(tokenizer, timeout=60)
        thread = threading.Thread(target=pipe, args=(PROMPTS[0],), kwargs=GREEDY | {"streamer": streamer})
        thread.start()
        texts.append(list(streamer))
        thread.join()
    assert texts[0] == texts[1]
    assert len(texts[0]) > 3


@pytest.fixture
def with_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """What transformers and hf_flash see on a machine with a GPU. There is none: whoever moves something there fails."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda *args, **kwargs: True)
    monkeypatch.setattr("transformers.pipelines.base.is_torch_cuda_available", lambda: True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="moves models to a GPU that is there")
@pytest.mark.usefixtures("with_an_accelerator")
def test_a_pipeline_leaves_the_model_on_the_cpu(packed: Path, tokenizer: Any) -> None:
    with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
        pipeline("text-generation", model=TINY_OPT.as_posix())  # the stock model goes to the GPU
    by_name = pipeline("text-generation", model=packed.as_posix())
    loaded = pipeline("text-generation", model=load(packed), tokenizer=tokenizer)
    for pipe in (by_name, loaded):
        assert pipe.device == pipe.model.device == torch.device("cpu")
        assert pipe(PROMPTS[0], **GREEDY)[0]["generated_text"].startswith(PROMPTS[0])
        assert hf_flash.stats(pipe).tokens > 8


@pytest.mark.usefixtures("with_an_accelerator")
def test_there_a_pipeline_wants_no_device(packed: Path) -> None:
    with pytest.raises(ValueError, match="discard the `device` argument"):  # transformers', to any model with a device map
        pipeline("text-generation", model=packed.as_posix(), device="cpu")


@pytest.mark.usefixtures("with_an_accelerator")
def test_a_model_that_stays_can_be_saved_and_used_in_every_way(packed: Path, stock: Any, tmp_path: Path) -> None:
    """The device map that keeps it on the CPU is not taken for accelerate's offloading."""
    model = load(packed)
    for settings in ({}, {"cache_implementation": "static"}, {"num_beams": 2}):
        assert torch.equal(model.generate(IDS, **GREEDY, **settings), stock.generate(IDS, **GREEDY, **settings))
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model))


@pytest.mark.parametrize("device", ["cpu", -1, torch.device("cpu")])
def test_a_pipeline_takes_the_cpu_as_device(packed: Path, device: Any) -> None:
    pipe = pipeline("text-generation", model=packed.as_posix(), device=device)
    assert pipe(PROMPTS[0], **GREEDY)[0]["generated_text"].startswith(PROMPTS[0])


@pytest.mark.parametrize(
    "move",
    [
        lambda model: model.to("cuda"),
        lambda model: model.to(device="mps", dtype=torch.float32),
        lambda model: model.cuda(),
        lambda model: pipeline("text-generation", model=model, tokenizer=TINY_OPT.as_posix(), device="cuda:0"),
    ],
)
def test_moving_it_away_is_refused_before_anything_moves(packed: Path, move: Callable[[Any], Any]) -> None:
    model = load(packed)
    wanted = logits(model)
    with pytest.raises(UsageError, match=r"computes on the CPU[\s\S]*to do"):
        move(model)
    assert torch.equal(logits(model.to("cpu")), wanted)


# --- device maps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device_map", ["cpu", "auto", "balanced", {"": "cpu"}, {"": torch.device("cpu")}, torch.device("cpu")])
def test_device_maps_on_the_cpu(packed: Path, stock: Any, device_map: Any) -> None:
    model = load(packed, device_map=device_map)
    assert torch.equal(model.generate(IDS, **GREEDY), stock.generate(IDS, **GREEDY))


@pytest.mark.parametrize("device_map", [{"": 0}, "cuda:0", {"model.decoder": "cpu", "lm_head": "mps"}])
def test_device_maps_elsewhere_are_refused(packed: Path, device_map: Any) -> None:
    with pytest.raises(ConfigError, match=r"computes on the CPU[\s\S]*device_map[\s\S]*to do"):
        load(packed, device_map=device_map)


def test_accelerate_takes_it_as_it_is(packed: Path, stock: Any) -> None:
    model = Accelerator(cpu=True).prepare_model(load(packed), evaluation_mode=True)
    close_to(logits(model), logits(stock))
    close_to(logits(dispatch_model(load(packed), {"": "cpu"})), logits(stock))


# --- PEFT ------------------------------------------------------------------------------------------------------------

ATTENTION = ["q_proj", "k_proj", "v_proj", "out_proj"]


def adapter(folder: Path, targets: Any) -> tuple[Path, torch.Tensor]:
    """A LoRA adapter made on the stock model, with weights that matter, and the logits with it."""
    torch.manual_seed(0)
    model = get_peft_model(load(), LoraConfig(target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False))
    model.eval().save_pretrained(folder)
    return folder, logits(model)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's, on any model
def test_lora_on_attention_is_what_it_is_on_the_stock_model(packed: Path, stock: Any, tmp_path: Path) -> None:
    folder, wanted = adapter(tmp_path / "adapter", ATTENTION)
    assert (wanted - logits(stock)).abs().max() > 0.5
    wrapped = PeftModel.from_pretrained(load(packed), folder).eval()
    close_to(logits(wrapped), wanted)
    with wrapped.disable_adapter():
        close_to(logits(wrapped), logits(stock))
    assert hf_flash.stats(wrapped).tokens == 2 * IDS.shape[1]
    close_to(logits(wrapped.merge_and_unload()), wanted)

    own = load(packed)
    own.load_adapter(folder)  # transformers' own way
    close_to(logits(own.eval()), wanted)
    own.save_pretrained(tmp_path / "again")  # the adapter alone, as ever
    assert torch.equal(logits(PeftModel.from_pretrained(load(packed), tmp_path / "again").eval()), logits(own))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("targets", [["fc1"], ["fc2"], ["q_proj", "fc1", "fc2"]])
def test_lora_on_the_ffn_is_refused(packed: Path, tmp_path: Path, targets: list[str]) -> None:
    folder, _ = adapter(tmp_path / "adapter", targets)
    for use in (
        lambda model: PeftModel.from_pretrained(model, folder),
        lambda model: model.load_adapter(folder),
        lambda model: get_peft_model(model, LoraConfig(target_modules=targets, task_type="CAUSAL_LM")),
    ):
        with pytest.raises(ValueError, match=r"weights on flash, LoRA only on attention[^`]*is not supported"):
            use(load(packed))


# --- lm-evaluation-harness ---------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # the harness's
def test_the_harness_loads_a_repacked_folder_by_name(packed: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    tasks = TaskManager(include_path=str(ROOT / "examples" / "tasks"), include_defaults=False)

    def accuracy(folder: Path) -> Any:
        found = simple_evaluate(
            model="hf", model_args={"pretrained": str(folder), "dtype": "float32"}, tasks=["next_words"], device="cpu",
            batch_size=4, limit=8, task_manager=tasks, bootstrap_iters=0, log_samples=True,
        )  # fmt: skip
        return found["results"]["next_words"]["acc,none"], [sample["acc"] for sample in found["samples"]["next_words"]]

    assert accuracy(packed) == accuracy(TINY_OPT)


# --- copies and processes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pickled", [pickle.dumps, lambda model: torch.save(model, io.BytesIO())])
@pytest.mark.parametrize("copied", [lambda model: model, copy.copy, copy.deepcopy])
def test_pickles_are_refused(packed: Path, pickled: Callable[[Any], Any], copied: Callable[[Any], Any]) -> None:
    with pytest.raises(UsageError, match=r"cannot be pickled[\s\S]*load it again, in the other process too"):
        pickled(copied(load(packed)))


def work(folder: str, inbox: Any, outbox: Any) -> None:
    """In a process of its own: loads the model there."""
    torch.set_num_threads(1)
    model = load(Path(folder))
    outbox.put(model.generate(inbox.get(), **GREEDY).tolist())


def test_a_spawned_worker_loads_its_own(packed: Path, stock: Any) -> None:
    processes = multiprocessing.get_context("spawn")
    inbox, outbox = processes.Queue(), processes.Queue()
    worker = processes.Process(target=work, args=(str(packed), inbox, outbox))
    worker.start()
    inbox.put(IDS)
    assert outbox.get(timeout=120) == stock.generate(IDS, **GREEDY).tolist()
    worker.join()
    assert worker.exitcode == 0
