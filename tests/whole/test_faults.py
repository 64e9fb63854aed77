"""Interruptions, forks, threads, files that change under us: nothing is lost, and no answer is wrong."""

from __future__ import annotations

import gc
import mmap
import os
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hf_flash
from hf_flash import FlashOffloadConfig, StoreFormatError, TargetExistsError, UsageError
from hf_flash.compute.kernels import TokenKernel
from hf_flash.compute.library import library
from hf_flash.packing import checkpoint_folder
from hf_flash.store.layout import FlashStore
from tests.conftest import in_a_fork, make_opt

IDS = torch.arange(5, 15)[None]
Load = Callable[..., Any]


@pytest.fixture
def load() -> Load:
    def get(folder: Path, **arguments: Any) -> Any:
        dtype = arguments.pop("dtype", torch.float32)
        config = FlashOffloadConfig(**arguments)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config)

    return get


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    result: torch.Tensor = model(ids).logits
    return result


def decode(model: Any) -> list[torch.Tensor]:
    return [logits(model, ids) for ids in IDS[0].view(-1, 1, 1)]


@pytest.mark.parametrize("step", ["index_select", "index_copy_", "linear", "embedding_bag", "up", "down"])
def test_an_interrupted_call_leaves_no_wrong_rows(opt: Load, load: Load, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    if step in ("up", "down"):
        if library() is None:
            pytest.skip("no compiled part here")
    else:
        monkeypatch.setattr("hf_flash.compute.library._times_off", 1)
    budget = hf_flash.stats(load(opt())).minimum_bytes + 3 * 40 * 256  # some 40 neurons a layer: rows move all the time
    wanted, model = decode(load(opt(), memory_budget=budget)), load(opt(), memory_budget=budget)
    owners: dict[str, Any] = {"index_copy_": torch.Tensor, "index_select": torch, "up": TokenKernel, "down": TokenKernel}
    owner = owners.get(step, torch.nn.functional)
    real, calls = getattr(owner, step), 0

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls % 17 == 0:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, step, interrupted)
    for _ in range(20):
        try:
            decode(model)
        except KeyboardInterrupt:
            pass
    monkeypatch.undo()
    assert calls > 17
    assert all(map(torch.equal, decode(model), wanted))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_worker_reads_with_threads_of_its_own(opt: Load, load: Load) -> None:
    torch.set_num_threads(1)
    model = load(opt(), reader="direct", memory_budget=hf_flash.stats(load(opt())).minimum_bytes)
    wanted = logits(model)
    assert in_a_fork(lambda: torch.equal(logits(model), wanted))
    assert torch.equal(logits(model), wanted)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.parametrize("reader", ["mmap", "direct"])
def test_a_forked_worker_decodes(opt: Load, load: Load, reader: str) -> None:
    torch.set_num_threads(1)
    model, one = load(opt(), reader=reader), torch.tensor([[5]])
    wanted = logits(model, one)

    def again() -> bool:
        for layer in model.model.decoder.layers:
            layer.fc1.window.forget()
        return torch.equal(logits(model, one), wanted)

    assert in_a_fork(lambda: again() and again())
    assert again()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_worker_forked_while_another_thread_computes_does_not_wait_for_it(opt: Load, load: Load) -> None:
    torch.set_num_threads(1)
    model = load(opt(), memory_budget=hf_flash.stats(load(opt())).minimum_bytes)
    ffn, wanted = model.model.decoder.layers[0].fc1, logits(model)
    inside, select = threading.Event(), ffn.predictor.select

    def slowly(x: torch.Tensor) -> Any:  # with the lock held
        inside.set()
        time.sleep(0.3)
        return select(x)

    ffn.predictor = SimpleNamespace(select=slowly)
    thread = threading.Thread(target=logits, args=[model])
    thread.start()
    assert inside.wait(30)
    assert in_a_fork(lambda: torch.equal(logits(model), wanted))
    thread.join()
    assert torch.equal(logits(model), wanted)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_what_is_read_ahead_at_a_fork_is_there_for_both(opt: Load, load: Load) -> None:
    torch.set_num_threads(1)
    model = load(opt(), predictor="quantized", reader="direct", lookahead=1, memory_budget=None)
    wanted, ffns = logits(model), [layer.fc1 for layer in model.model.decoder.layers]
    for ffn in ffns:
        ffn.window.forget()
        ffn.look_ahead(torch.randn(1, ffn.d_model))
    assert all(ffn.reads.under_way for ffn in ffns)
    assert in_a_fork(lambda: torch.equal(logits(model), wanted))
    assert torch.equal(logits(model), wanted)


@pytest.mark.parametrize("reader", ["mmap", "direct"])
def test_closing_while_others_run_gives_answers_or_a_clear_error(opt: Load, load: Load, reader: str) -> None:
    model = load(opt(), reader=reader)
    wanted, failures = logits(model), []

    def work() -> None:
        try:
            while True:
                if not torch.equal(logits(model), wanted):
                    failures.append("a wrong answer")
        except UsageError:
            pass
        except Exception as error:  # noqa: BLE001
            failures.append(repr(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    hf_flash.close(model)
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_dropped_model_gives_its_memory_back_at_once(opt: Load, load: Load) -> None:
    model = load(opt())
    logits(model)
    window = weakref.ref(model.model.decoder.layers[0].fc1.window)
    gc.collect()
    gc.disable()
    try:
        del model
        assert window() is None
    finally:
        gc.enable()


def test_autocast_changes_nothing_of_what_the_ffn_computes(opt: Load, load: Load) -> None:
    stock, model = AutoModelForCausalLM.from_pretrained(opt(), dtype=torch.float32), load(opt(), predictor="none")
    for ids in (IDS, IDS[:, :1]):
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = logits(model, ids), logits(stock, ids)
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.05, atol=0.05 * float(theirs.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decoding_over_many_blocks_rounds_like_the_stock_layer(tmp_path: Path, load: Load, dtype: torch.dtype) -> None:
    folder = make_opt(tmp_path / "wide", ffn_dim=8192, num_hidden_layers=1, init_std=0.05)
    flash = load(folder, predictor="none", dtype=dtype).model.decoder.layers[0]
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).model.decoder.layers[0]
    ours = theirs = 0.0
    for seed in range(16):
        x = torch.randn(1, 32, generator=torch.Generator().manual_seed(seed)).to(dtype)
        exact = stock.double().fc2(stock.activation_fn(stock.fc1(x.double()).to(dtype)).double())
        stock.to(dtype)
        with torch.no_grad():
            ours += float((flash.fc2(flash.fc1(x)) - exact).abs().sum())
            theirs += float((stock.fc2(stock.activation_fn(stock.fc1(x))) - exact).abs().sum())
    assert ours <= 1.1 * theirs


def test_layers_of_different_dtypes_are_refused(tmp_path: Path, opt: Load) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    for path in opt().iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if "layers.1.fc" in name:
            tensors[name] = tensors[name].half()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(StoreFormatError, match="different dtypes"):
        hf_flash.repack(folder, tmp_path / "out")


def test_saving_over_its_own_folder_survives_new_shard_borders(
    tmp_path: Path, opt: Load, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_folder, "_SHARD_BYTES", 6000)
    folder = hf_flash.repack(opt(dtype=torch.float16), tmp_path / "packed")
    model = load(folder)
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            layer.self_attn.q_proj.weight.add_(0.25)
    wanted = logits(model)
    model.save_pretrained(folder)
    assert torch.equal(logits(load(folder)), wanted)
    assert torch.equal(logits(model), wanted)
    assert hf_flash.restore(folder, tmp_path / "restored").is_dir()


def test_saving_leaves_files_of_others_alone(tmp_path: Path, opt: Load, load: Load) -> None:
    others = ["model_backup.safetensors", "model.fp16.safetensors", "notes.txt", "flash-notes.txt"]
    for name in others:
        (tmp_path / name).write_text("mine")
    load(opt()).save_pretrained(tmp_path)
    assert [(tmp_path / name).read_text() for name in others] == ["mine"] * len(others)


def test_other_weights_under_the_same_size_and_time_are_other_weights(tmp_path: Path, load: Load) -> None:
    folder = make_opt(tmp_path / "model", seed=1)
    first, state = logits(load(folder)), (folder / "model.safetensors").stat()
    make_opt(folder, seed=2)
    os.utime(folder / "model.safetensors", ns=(state.st_atime_ns, state.st_mtime_ns))
    assert (folder / "model.safetensors").stat().st_size == state.st_size
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    second = logits(load(folder, predictor="none"))
    torch.testing.assert_close(second, logits(stock), rtol=1e-4, atol=1e-4)
    assert not torch.equal(first, second)


def test_a_tensor_whose_name_looks_like_ours_is_kept(tmp_path: Path, opt: Load) -> None:
    folder = tmp_path / "plain"
    folder.mkdir()
    for path in opt().iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors") | {"extra.predictor.thing": torch.arange(4.0)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    restored = hf_flash.restore(hf_flash.repack(folder, tmp_path / "packed"), tmp_path / "restored")
    assert torch.equal(load_file(restored / "model.safetensors")["extra.predictor.thing"], torch.arange(4.0))


def test_a_damaged_cache_entry_is_made_again(tmp_path: Path, opt: Load, load: Load) -> None:
    wanted = logits(load(opt(), cache_dir=tmp_path))
    next(tmp_path.glob("*/flash-layer-00001.safetensors")).unlink()
    assert torch.equal(logits(load(opt(), cache_dir=tmp_path)), wanted)


def test_a_link_to_an_empty_folder_is_a_target(tmp_path: Path, opt: Load) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    FlashStore.open_folder(hf_flash.repack(opt(), tmp_path / "link"))
    assert FlashStore.open_folder(tmp_path / "real").check() == []
    with pytest.raises(TargetExistsError):
        hf_flash.repack(opt(), tmp_path / "link")


def test_check_finds_a_flipped_bit_in_every_file(tmp_path: Path, opt: Load) -> None:
    folder = hf_flash.repack(opt(), tmp_path / "packed")
    for path in sorted(folder.glob("*.safetensors")):
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        path.write_bytes(data)
        with safe_open(path, framework="pt"):
            assert [path.name in problem for problem in FlashStore.open_folder(folder).check()] == [True]
        data[-5] ^= 1
        path.write_bytes(data)


@pytest.mark.parametrize("reader", ["mmap", "direct", "auto"])
def test_a_system_without_direct_io_and_advice_works_and_says_so(
    opt: Load, load: Load, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, reader: str
) -> None:
    monkeypatch.setattr("hf_flash.compute.library._times_off", 1)
    wanted = logits(load(opt()))
    advice = [name for name in dir(mmap) if name.startswith("MADV_")]
    for module, names in ((os, ["O_DIRECT", "preadv", "posix_fadvise"]), (mmap, advice)):
        for name in names:
            monkeypatch.delattr(module, name, raising=False)
    model = load(opt(), reader=reader)
    assert torch.equal(logits(model), wanted)
    assert hf_flash.stats(model).reader == "mmap"
    assert "no posix_fadvise" in caplog.text
    assert ("falls back to 'mmap': this system has no O_DIRECT" in caplog.text) == (reader == "direct")
