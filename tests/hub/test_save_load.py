"""Repacked folders: loaded without arguments, saved, restored, read by others (contracts C2 and C6); the flash cache."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import hf_flash
from hf_flash import FlashOffloadConfig
from tests.preloaded_python import python

ROOT = Path(__file__).parent.parent.parent
SHAPES = ("pre_ln", "post_ln", "no_bias", "odd")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INPUT = torch.tensor([[2, 11, 7, 30, 45, 7]])
ATTENTION = "model.decoder.layers.1.self_attn.q_proj.weight"


# --- helpers ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def complaints() -> Iterator[list[str]]:
    """What transformers and hf_flash log from level WARNING on; a test that asks for it must leave it empty."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "takes the slow path" not in record.getMessage():  # true of the odd shape, and said once
                said.append(record.getMessage())

    listener = Listener(logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("transformers", "hf_flash")]
    for logger in loggers:
        logger.addHandler(listener)
    yield said
    for logger in loggers:
        logger.removeHandler(listener)
    assert not said


@pytest.fixture
def process_defaults() -> Iterator[Callable[..., None]]:
    """`hf_flash.configure`, taken back at the end of the test."""
    yield hf_flash.configure
    hf_flash.configure(window=None, reader=None, memory_budget=None, predictor=None)


@pytest.fixture(scope="module")
def repacked(opt: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`repacked("odd", dtype=...)`: `opt(...)` repacked, made once. Do not write to it."""
    made: dict[str, Path] = {}

    def get(shape: str = "pre_ln", **kwargs: Any) -> Path:
        key = f"{shape}-{sorted(kwargs.items())!s}"
        if key not in made:
            made[key] = hf_flash.repack(opt(shape, **kwargs), tmp_path_factory.mktemp("repacked") / "model")
        return made[key]

    return get


def load(folder: Path, dtype: torch.dtype = torch.float32, auto: Any = AutoModelForCausalLM, **arguments: Any) -> Any:
    """Load a folder; without arguments, no `quantization_config` is passed at all."""
    if arguments:
        return auto.from_pretrained(folder, dtype=dtype, quantization_config=FlashOffloadConfig(**arguments))
    return auto.from_pretrained(folder, dtype=dtype)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Of a prefill and of a decoded token."""
    first = model(INPUT, use_cache=True)
    second = model(INPUT[:, :1], past_key_values=first.past_key_values)
    return torch.cat([first.logits, second.logits], dim=1)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor in a folder's weight files."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            found |= load_file(path)
        elif path.suffix == ".bin":
            found |= torch.load(path, weights_only=True)
    return found


def assert_same_bits(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Names, dtypes, shapes and bytes."""
    assert sorted(got) == sorted(wanted)
    for name, tensor in wanted.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(got[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


def store_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("flash-*"))}


def times(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of the last change of every file below a folder: neither stays when a file is written again."""
    return {
        str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("*.safetensors")
    }


def start(code: str, *arguments: Any, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*python(), "-c", code, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# --- repack, then load ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("complaints")
def test_a_repacked_folder_needs_no_arguments_and_equals_its_source(
    opt: Callable[..., Path], repacked: Callable[..., Path], shape: str, dtype: torch.dtype
) -> None:
    flash = load(repacked(shape), dtype)
    assert hf_flash.stats(flash).predictor == "int4-g64"
    assert torch.equal(logits(flash), logits(load(opt(shape), dtype, predictor="quantized")))


@pytest.mark.usefixtures("complaints")
def test_a_repacked_folder_loads_as_a_bare_model(repacked: Callable[..., Path]) -> None:
    bare, full = load(repacked(), auto=AutoModel), load(repacked())
    assert torch.equal(bare(INPUT).last_hidden_state, full.model(INPUT).last_hidden_state)


@pytest.mark.usefixtures("complaints")
def test_a_folder_repacked_without_predictor_loads_without(opt: Callable[..., Path], tmp_path: Path) -> None:
    flash = load(hf_flash.repack(opt(), tmp_path / "flash", predictor="none"))
    assert hf_flash.stats(flash).predictor == "none"


@pytest.mark.parametrize(
    ("passed", "process", "expected"),
    [
        ({}, {}, {}),
        ({"window": 3}, {}, {"window": 3}),
        ({"reader": "direct"}, {}, {"reader": "direct"}),
        ({"memory_budget": "32MiB"}, {}, {"budget_bytes": 32 << 20}),
        ({"predictor": "none"}, {}, {"predictor": "none"}),
        ({"window": 3, "predictor": "none"}, {}, {"window": 3, "predictor": "none"}),
        ({"window": 5, "reader": "auto"}, {}, {"window": 5}),  # equal to the built-in default, and yet passed
        ({}, {"window": 4}, {"window": 4}),
        ({"window": 3}, {"window": 4, "reader": "direct"}, {"window": 3, "reader": "direct"}),
        ({"reader": "mmap"}, {"reader": "direct", "memory_budget": "32MiB"}, {"budget_bytes": 32 << 20}),
    ],
    ids=str,
)
@pytest.mark.usefixtures("complaints")
def test_what_is_passed_wins_then_the_process_then_what_is_stored(
    repacked: Callable[..., Path],
    tmp_path: Path,
    process_defaults: Callable[..., None],
    passed: dict[str, Any],
    process: dict[str, Any],
    expected: dict[str, Any],
) -> None:
    stored = {"window": 9, "reader": "mmap", "budget_bytes": 48 << 20, "predictor": "int4-g64"}
    load(repacked(), window=9, reader="mmap", memory_budget="48MiB").save_pretrained(tmp_path)
    process_defaults(**process)
    found = hf_flash.stats(load(tmp_path, **passed))
    assert {name: getattr(found, name) for name in stored} == stored | expected


def test_a_process_default_is_not_stored_in_the_model(
    repacked: Callable[..., Path], tmp_path: Path, process_defaults: Callable[..., None]
) -> None:
    process_defaults(window=4)
    load(repacked(), reader="mmap").save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored["reader"] == "mmap"
    assert "window" not in stored


# --- save -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["a new folder", "its own folder"])
@pytest.mark.parametrize("source", ["plain", "repacked"])
@pytest.mark.usefixtures("complaints")
def test_saving_copies_the_store_and_changes_nothing(
    opt: Callable[..., Path], repacked: Callable[..., Path], tmp_path: Path, source: str, where: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(opt() if source == "plain" else repacked(), folder)
    flash = load(folder, predictor="quantized") if source == "plain" else load(folder)
    target = folder if where == "its own folder" else tmp_path / "saved"
    wanted = logits(flash)
    for _ in range(2):  # the second save finds what the first one wrote
        flash.save_pretrained(target)
        assert store_bytes(target).keys() == store_bytes(repacked()).keys()
        assert torch.equal(logits(flash), wanted)
    assert torch.equal(logits(load(target)), wanted)
    if source == "repacked":
        assert store_bytes(target) == store_bytes(repacked())
        assert_same_bits(tensors(target), tensors(repacked()))


def test_saving_over_its_own_folder_leaves_the_store_files_alone(repacked: Callable[..., Path], tmp_path: Path) -> None:
    folder = shutil.copytree(repacked(), tmp_path / "model")
    before = {name: time for name, time in times(folder).items() if name.startswith("flash-")}
    load(folder).save_pretrained(folder)
    assert before.items() <= times(folder).items()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", ["a new folder", "its own folder"])
@pytest.mark.usefixtures("complaints")
def test_a_changed_attention_weight_is_saved_and_the_others_stay(
    repacked: Callable[..., Path], tmp_path: Path, where: str, dtype: torch.dtype
) -> None:
    folder = shutil.copytree(repacked(), tmp_path / "model")
    before = tensors(folder)
    flash = load(folder, dtype)
    with torch.no_grad():
        flash.get_parameter(ATTENTION).mul_(2.5)
    target = folder if where == "its own folder" else tmp_path / "saved"
    flash.save_pretrained(target)
    after = tensors(target)
    assert torch.equal(after.pop(ATTENTION).to(dtype), flash.get_parameter(ATTENTION))
    del before[ATTENTION]
    assert_same_bits(after, before)
    assert torch.equal(logits(load(target, dtype)), logits(flash))


@pytest.mark.usefixtures("complaints")
def test_a_saved_plain_checkpoint_is_a_repacked_one(opt: Callable[..., Path], tmp_path: Path) -> None:
    flash = load(opt("odd"), predictor="quantized", window=7)
    flash.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert torch.equal(logits(again), logits(flash))
    assert hf_flash.stats(again).window == 7
    hf_flash.restore(tmp_path / "saved", tmp_path / "restored")
    assert_same_bits(tensors(tmp_path / "restored"), tensors(opt("odd")))


def test_a_head_that_the_checkpoint_lacks_is_saved_with_the_model(repacked: Callable[..., Path], tmp_path: Path) -> None:
    flash = load(repacked(), auto=AutoModelForSequenceClassification)
    flash.save_pretrained(tmp_path)
    again = load(tmp_path, auto=AutoModelForSequenceClassification)
    assert torch.equal(again.score.weight, flash.score.weight)
    assert torch.equal(again(INPUT).logits, flash(INPUT).logits)


@pytest.mark.usefixtures("complaints")
def test_changed_embeddings_are_saved_and_stay_tied(repacked: Callable[..., Path], tmp_path: Path) -> None:
    flash = load(repacked())
    with torch.no_grad():
        flash.get_input_embeddings().weight.mul_(1.5)
    flash.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert torch.equal(logits(again), logits(flash))
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight


@pytest.mark.usefixtures("complaints")
def test_a_bare_model_saves_what_the_whole_one_needs(repacked: Callable[..., Path], tmp_path: Path) -> None:
    bare = load(repacked(), auto=AutoModel)
    bare.save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path).model(INPUT).last_hidden_state, bare(INPUT).last_hidden_state)


def test_saving_over_another_model_leaves_nothing_of_it(
    opt: Callable[..., Path], repacked: Callable[..., Path], tmp_path: Path
) -> None:
    """The folder held a model with more layers and another predictor."""
    hf_flash.repack(opt("no_bias", num_hidden_layers=5), tmp_path / "saved", predictor_bits=8)
    flash = load(repacked())
    flash.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), logits(flash))
    hf_flash.restore(tmp_path / "saved", tmp_path / "restored")
    assert_same_bits(tensors(tmp_path / "restored"), tensors(opt()))


# --- restore ----------------------------------------------------------------------------------------------------------


def with_tied_duplicate(source: Path, target: Path) -> Path:
    """The same checkpoint with `lm_head.weight` and `embed_tokens.weight` both written out."""
    shutil.copytree(source, target)
    state = load_file(target / "model.safetensors")
    state["lm_head.weight"] = state["model.decoder.embed_tokens.weight"].clone()
    save_file(state, target / "model.safetensors", {"format": "pt"})
    return target


def as_bin(source: Path, target: Path, files: int) -> Path:
    """The same checkpoint as `pytorch_model.bin`, in one file or in several with an index."""
    shutil.copytree(source, target)
    state = load_file(target / "model.safetensors")
    (target / "model.safetensors").unlink()
    weight_map = {name: f"pytorch_model-{i % files + 1:05d}-of-{files:05d}.bin" for i, name in enumerate(state)}
    if files == 1:
        torch.save(state, target / "pytorch_model.bin")
        return target
    for file in set(weight_map.values()):
        torch.save({name: state[name] for name in state if weight_map[name] == file}, target / file)
    (target / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return target


SOURCES: dict[str, Callable[[Callable[..., Path], Path], Path]] = {
    **{shape: lambda opt, _, shape=shape: opt(shape) for shape in SHAPES},
    **{str(dtype): lambda opt, _, dtype=dtype: opt("odd", dtype=dtype) for dtype in DTYPES[1:]},
    "sharded": lambda opt, _: opt(shards="20KB"),
    "sharded float16": lambda opt, _: opt("post_ln", shards="20KB", dtype=torch.float16),
    "tied duplicates": lambda opt, target: with_tied_duplicate(opt(), target),
    "tied duplicates in a bin": lambda opt, target: as_bin(with_tied_duplicate(opt(), target / "1"), target / "2", 1),
    "bin": lambda opt, target: as_bin(opt("no_bias"), target, 1),
    "bin bfloat16": lambda opt, target: as_bin(opt(dtype=torch.bfloat16), target, 1),
    "sharded bin": lambda opt, target: as_bin(opt(), target, 3),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_restore_gives_every_tensor_back_bit_for_bit(opt: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    source = SOURCES[kind](opt, tmp_path / "made")
    hf_flash.repack(source, tmp_path / "flash")
    hf_flash.restore(tmp_path / "flash", tmp_path / "plain")
    assert_same_bits(tensors(tmp_path / "plain"), tensors(source))


@pytest.mark.usefixtures("complaints")
def test_a_restored_folder_is_a_plain_checkpoint_again(
    opt: Callable[..., Path], repacked: Callable[..., Path], tmp_path: Path
) -> None:
    hf_flash.restore(repacked("post_ln"), tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert config == json.loads((opt("post_ln") / "config.json").read_text())
    assert torch.equal(logits(load(tmp_path / "plain")), logits(load(opt("post_ln"))))


@pytest.mark.usefixtures("complaints")
def test_a_checkpoint_with_tied_duplicates_loads_repacked(opt: Callable[..., Path], tmp_path: Path) -> None:
    source = with_tied_duplicate(opt(), tmp_path / "source")
    hf_flash.repack(source, tmp_path / "flash")
    assert torch.equal(logits(load(tmp_path / "flash")), logits(load(source, predictor="quantized")))


# --- the format, as others see it -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_every_tensor_is_in_the_index_and_in_the_file_it_names(repacked: Callable[..., Path], shape: str) -> None:
    folder = repacked(shape)
    found: dict[str, str] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= dict.fromkeys(file.keys(), path.name)
    assert found == json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_bundle_is_the_up_row_then_the_down_column(
    opt: Callable[..., Path], repacked: Callable[..., Path], shape: str, dtype: torch.dtype
) -> None:
    plain, flash = tensors(opt(shape, dtype=dtype)), tensors(repacked(shape, dtype=dtype))
    for layer in range(3):
        prefix = f"model.decoder.layers.{layer}."
        up, down, bundles = plain[prefix + "fc1.weight"], plain[prefix + "fc2.weight"], flash[prefix + "fc1.bundles"]
        assert bundles.dtype == dtype
        assert torch.equal(bundles, torch.cat([up, down.T], dim=1))


@pytest.mark.parametrize("shape", SHAPES)
def test_bundles_start_on_4096_in_their_file(repacked: Callable[..., Path], shape: str) -> None:
    starts = {}
    for path in repacked(shape).glob("flash-layer-*.safetensors"):
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        starts |= {name: 8 + size + info["data_offsets"][0] for name, info in header.items() if name.endswith(".bundles")}
    assert len(starts) == 3
    assert not any(start % 4096 for start in starts.values())


def test_stock_transformers_without_the_plugin_refuses_a_repacked_folder(
    opt: Callable[..., Path], repacked: Callable[..., Path]
) -> None:
    code = """if True:
        import sys
        from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
        AutoModelForCausalLM.from_pretrained(sys.argv[1])
        for auto in (AutoModelForCausalLM, AutoModel):
            try:
                auto.from_pretrained(sys.argv[2])
            except (RuntimeError, ValueError):
                print("refused")
        assert "hf_flash" not in sys.modules
    """
    out, errors = start(code, opt(), repacked()).communicate()
    assert out == "refused\nrefused\n", errors


# --- the flash cache --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("complaints")
def test_a_second_load_of_a_plain_checkpoint_does_not_repack(opt: Callable[..., Path], tmp_path: Path) -> None:
    first = load(opt(), predictor="quantized", cache_dir=tmp_path)
    made = times(tmp_path)
    second = load(opt(), torch.bfloat16, predictor="quantized", window=1, cache_dir=tmp_path)
    assert times(tmp_path) == made != {}
    assert hf_flash.stats(second).predictor == hf_flash.stats(first).predictor


@pytest.mark.usefixtures("complaints")
def test_asking_for_a_predictor_later_adds_it_and_keeps_the_layers(opt: Callable[..., Path], tmp_path: Path) -> None:
    load(opt(), predictor="none", cache_dir=tmp_path)
    layers = times(tmp_path)
    load(opt(), predictor="quantized", cache_dir=tmp_path)
    load(opt(), predictor="quantized", predictor_bits=8, cache_dir=tmp_path)
    assert layers.items() <= times(tmp_path).items()
    assert len(times(tmp_path)) == len(layers) + 2


def test_the_cache_holds_bundles_and_predictors_only(opt: Callable[..., Path], tmp_path: Path) -> None:
    load(opt(), predictor="quantized", cache_dir=tmp_path)
    (entry,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert {path.suffix for path in entry.iterdir()} == {".safetensors"}
    assert all(name.endswith(".bundles") or ".fc1.predictor." in name for name in tensors(entry))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.usefixtures("complaints")
def test_a_changed_source_gets_an_entry_of_its_own(opt: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    folder, cache = tmp_path / "model", tmp_path / "cache"

    def put(source: Path) -> torch.Tensor:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder) if kind == "safetensors" else as_bin(source, folder, 1)
        return logits(load(folder, predictor="none", cache_dir=cache))

    put(opt())
    got = put(opt(seed=1))
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 2
    torch.testing.assert_close(got, logits(load(opt(seed=1))), rtol=1e-4, atol=1e-4)


def test_two_processes_may_load_the_same_plain_checkpoint_at_once(tiny_opt: Path, tmp_path: Path) -> None:
    code = """if True:
        import sys, torch, hf_flash
        from transformers import AutoModelForCausalLM
        print("ready", flush=True)
        sys.stdin.readline()
        config = hf_flash.FlashOffloadConfig(predictor="quantized", cache_dir=sys.argv[2])
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, quantization_config=config)
        print(model.generate(torch.tensor([[2, 11, 7]]), max_new_tokens=8, do_sample=False).tolist())
    """
    processes = [start(code, tiny_opt, tmp_path) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    (first, first_errors), (second, second_errors) = (process.communicate() for process in processes)
    assert [process.returncode for process in processes] == [0, 0], first_errors + second_errors
    assert first == second != ""
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1
