"""Contract C7: one hostile file or argument per error; the message says what, where, expected, got and what to do."""

from __future__ import annotations

import errno
import gc
import json
import logging
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    OPTForCausalLM,
)

import hf_flash
from hf_flash import (
    BudgetError,
    ConfigError,
    DiskSpaceError,
    FlashOffloadConfig,
    InvalidWeightsError,
    RepackError,
    StoreFormatError,
    StoreMissingError,
    StoreVersionError,
    TargetExistsError,
    UnsupportedModelError,
    UsageError,
)
from hf_flash.store.writer import write_safetensors
from tests.conftest import ROOT, make_opt
from tests.preloaded_python import python

INDEX = "model.safetensors.index.json"
PREDICTOR = "flash-predictor-int4-g64.safetensors"
TOKENS = torch.tensor([[5, 6, 7, 8]])
UP, DOWN = "model.decoder.layers.1.fc1.weight", "model.decoder.layers.2.fc2.weight"


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repacked model of the same shape with other weights."""
    folder = tmp_path_factory.mktemp("stranger")
    return hf_flash.repack(make_opt(folder / "plain", seed=7), folder / "flash")


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    """A repacked folder to damage."""
    return Path(shutil.copytree(packed, tmp_path / "damaged"))


@pytest.fixture
def source(plain: Path, tmp_path: Path) -> Path:
    """A plain checkpoint to damage."""
    return Path(shutil.copytree(plain, tmp_path / "source"))


def load(folder: Path, **config: Any) -> Any:
    passed = {"quantization_config": FlashOffloadConfig(**config)} if config else {}
    return AutoModelForCausalLM.from_pretrained(folder, **passed)


def layer(folder: Path, index: int) -> Path:
    return folder / f"flash-layer-{index:05d}.safetensors"


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def unlist(folder: Path, name: str) -> None:
    """Take a file out of the index."""
    edit_json(folder / INDEX, lambda index: index.update(weight_map=listed(index, name)))


def listed(index: dict[str, Any], without: str) -> dict[str, str]:
    return {tensor: file for tensor, file in index["weight_map"].items() if file != without}


def write_again(path: Path, **metadata: str) -> None:
    """The same tensors, laid out by us, with some metadata changed."""
    with safe_open(path, "pt") as file:
        meta = dict(file.metadata())
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    meta |= {f"hf_flash.{key}": value for key, value in metadata.items()}
    specs = {name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()}
    write_safetensors(path, specs, tensors.values(), meta)


def place_again(path: Path, place: torch.Tensor, version: str = "2") -> None:
    """The same file with places for its neurons."""
    with safe_open(path, "pt") as file:
        meta = dict(file.metadata()) | {"hf_flash.format_version": version}
    ((name, bundles),) = load_file(path).items()
    tensors = {name: bundles.clone(), name.replace(".bundles", ".place"): place}
    specs = {name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()}
    write_safetensors(path, specs, tensors.values(), meta)


def overlap(path: Path) -> None:
    """Two tensors of a header that claim the same bytes."""
    info = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    text = json.dumps({"a.bundles": info, "b.bundles": {**info, "data_offsets": [8, 24]}}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(24))


def by_another_tool(path: Path, *, metadata: bool) -> None:
    with safe_open(path, "pt") as file:
        meta = file.metadata()
    save_file({name: value.clone() for name, value in load_file(path).items()}, path, metadata=meta if metadata else None)


def remove(path: Path, *, index: bool) -> None:
    path.unlink()
    if index:
        unlist(path.parent, path.name)


def names_all(error: BaseException, *parts: str) -> None:
    """Every part is in the message."""
    for part in parts:
        assert part in str(error)


# --- a repacked folder ---------------------------------------------------------------------------------------------

ALL = ("where", "got", "to do")
IN_ORDER = torch.arange(128, dtype=torch.int32)
HOSTILE_FILES: dict[str, tuple[Callable[[Path], Any], type[Exception], tuple[str, ...]]] = {
    "the first layer file is cut short": (
        lambda f: os.truncate(layer(f, 0), 5000), StoreFormatError, (*ALL, "flash-layer-00000", "not a valid safetensors")),
    "another layer file is cut short": (
        lambda f: os.truncate(layer(f, 2), 5000), StoreFormatError, (*ALL, "flash-layer-00002")),
    "a layer file is empty": (
        lambda f: layer(f, 1).write_bytes(b""), StoreFormatError, (*ALL, "flash-layer-00001")),
    "a layer file begins with random bytes": (
        lambda f: layer(f, 1).write_bytes(bytes(range(255, 0, -1)) * 40), StoreFormatError, (*ALL, "flash-layer-00001")),
    "tensors of a header overlap": (
        lambda f: overlap(layer(f, 1)), StoreFormatError, (*ALL, "flash-layer-00001")),
    "the bundles have another shape": (
        lambda f: write_again(layer(f, 1), d_ff="64"), StoreFormatError,
        ("where", "flash-layer-00001", "layers.1.fc1.bundles", "expected: (64, 64)", "got: (128, 64)")),
    "the bundles are not aligned": (
        lambda f: by_another_tool(layer(f, 1), metadata=True), StoreFormatError,
        (*ALL, "flash-layer-00001", "multiple of 4096", "repack the model")),
    "a layer file lost its metadata": (
        lambda f: by_another_tool(layer(f, 1), metadata=False), StoreMissingError, (*ALL, "expected: 3 layers", "layers [1]")),
    "a layer file is of a newer version": (
        lambda f: write_again(layer(f, 1), format_version="9"), StoreVersionError,
        (*ALL, "flash-layer-00001", "up to 4", "got: 9", "update hf_flash")),
    "neurons have places, which older versions would pass over": (
        lambda f: place_again(layer(f, 1), IN_ORDER, version="1"), StoreFormatError,
        (*ALL, "flash-layer-00001", "fc1.place", "format version 1", "repack the model")),
    "the places of the neurons are gone": (
        lambda f: write_again(layer(f, 1), format_version="2"), StoreFormatError,
        (*ALL, "flash-layer-00001", "fc1.place", "format version 2", "expected")),
    "too few places": (
        lambda f: place_again(layer(f, 1), IN_ORDER[1:]), StoreFormatError,
        (*ALL, "flash-layer-00001", "fc1.place", "expected: (128,), int32", "got: (127,), torch.int32")),
    "places of another dtype": (
        lambda f: place_again(layer(f, 1), IN_ORDER.long()), StoreFormatError,
        (*ALL, "fc1.place", "expected: (128,), int32", "got: (128,), torch.int64")),
    "two neurons in the same place": (
        lambda f: place_again(layer(f, 1), IN_ORDER.clamp(min=1)), StoreFormatError,
        (*ALL, "fc1.place", "no permutation", "expected: every number below 128 once", "got: 127 of them")),
    "a neuron behind the last": (
        lambda f: place_again(layer(f, 1), IN_ORDER + 1), StoreFormatError, (*ALL, "fc1.place", "no permutation", "got: 127")),
    "a neuron before the first": (
        lambda f: place_again(layer(f, 1), IN_ORDER - 1), StoreFormatError, (*ALL, "fc1.place", "no permutation", "got: 127")),
    "the format version is no number": (
        lambda f: write_again(layer(f, 1), format_version="two"), StoreFormatError, ("where", "flash-layer-00001", "'two'")),
    "a size in the metadata is no number": (
        lambda f: write_again(layer(f, 1), d_ff="many"), StoreFormatError, ("where", "flash-layer-00001", "many")),
    "the number of a layer is no number": (
        lambda f: write_again(layer(f, 1), layer="first"), StoreFormatError, ("where", "flash-layer-00001", "first")),
    "two files hold the same layer": (
        lambda f: write_again(layer(f, 1), layer="0"), StoreFormatError,
        ("where", "flash-layer-00000", "flash-layer-00001", "same layer")),
    "config.json is of a newer version": (
        lambda f: edit_json(f / "config.json", lambda c: c["quantization_config"].update(format_version=2, warp="fast")),
        StoreVersionError, (*ALL, "quantization_config", "up to 1", "got: 2", "update hf_flash")),
    "config.json has a format version that is no number": (
        lambda f: edit_json(f / "config.json", lambda c: c["quantization_config"].update(format_version="two")),
        ConfigError, ("format_version", "two")),
    "config.json has an unknown argument": (
        lambda f: edit_json(f / "config.json", lambda c: c["quantization_config"].update(windwo=3)),
        ConfigError, ("'windwo'", "expected", "did you mean 'window'?")),
    "a listed layer file is not there": (
        lambda f: remove(layer(f, 2), index=False), StoreMissingError, ("where", "flash-layer-00002", "to do")),
    "a layer is gone from folder and index": (
        lambda f: remove(layer(f, 2), index=True), StoreMissingError, (*ALL, "expected: 3 layers", "layers [2]")),
    "a listed predictor is not there": (
        lambda f: remove(f / PREDICTOR, index=False), StoreMissingError, ("where", PREDICTOR, "to do")),
    "the predictor is gone from folder and index": (
        lambda f: remove(f / PREDICTOR, index=True), StoreMissingError,
        (*ALL, "expected: int4-g64", "got: none at all", "predictor='none'")),
    "the predictor is cut short": (
        lambda f: os.truncate(f / PREDICTOR, 4200), StoreFormatError, (*ALL, PREDICTOR)),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "kind", "parts"), HOSTILE_FILES.values(), ids=HOSTILE_FILES)
def test_a_damaged_folder_does_not_load(
    copy: Path, damage: Callable[[Path], Any], kind: type[Exception], parts: tuple[str, ...]
) -> None:
    damage(copy)
    with pytest.raises(kind) as caught:
        load(copy)
    assert type(caught.value) is kind
    names_all(caught.value, *parts)


def test_a_predictor_of_another_checkpoint_is_refused(copy: Path, stranger: Path) -> None:
    shutil.copyfile(stranger / PREDICTOR, copy / PREDICTOR)
    with pytest.raises(StoreFormatError, match="belongs to another checkpoint") as caught:
        load(copy)
    names_all(caught.value, *ALL, PREDICTOR, "expected: fingerprint ")


def test_a_layer_of_another_checkpoint_is_refused(copy: Path, stranger: Path) -> None:
    shutil.copyfile(layer(stranger, 1), layer(copy, 1))
    with pytest.raises(StoreFormatError, match="another checkpoint") as caught:
        load(copy)
    names_all(caught.value, "where", "flash-layer-00001")


def test_a_predictor_that_is_not_stored_is_named_with_those_that_are(packed: Path) -> None:
    with pytest.raises(StoreMissingError) as caught:
        load(packed, predictor_bits=8)
    names_all(caught.value, *ALL, "expected: int8", "got: int4-g64")


def test_a_folder_without_its_predictor_still_loads_without_one(copy: Path) -> None:
    remove(copy / PREDICTOR, index=True)
    assert hf_flash.stats(load(copy, predictor="none")).predictor == "none"


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 3}}'])
@pytest.mark.parametrize("call", [hf_flash.restore, hf_flash.repack])
def test_a_broken_index_is_a_store_error(
    request: pytest.FixtureRequest, tmp_path: Path, call: Callable[..., Path], index: str
) -> None:
    folder = request.getfixturevalue("copy" if call is hf_flash.restore else "source")
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / INDEX).write_text(index)
    with pytest.raises(hf_flash.StoreError) as caught:
        call(folder, tmp_path / "out")
    names_all(caught.value, "where", INDEX)
    assert not (tmp_path / "out").exists()


def test_restoring_a_plain_checkpoint_says_where_nothing_was_found(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreMissingError) as caught:
        hf_flash.restore(plain, tmp_path / "out")
    names_all(caught.value, str(plain), "expected: flash-layer-00000", "to do")


def test_restoring_what_is_not_there_says_where(tmp_path: Path) -> None:
    with pytest.raises(StoreMissingError, match="not a folder") as caught:
        hf_flash.restore(tmp_path / "nothing", tmp_path / "out")
    names_all(caught.value, str(tmp_path / "nothing"))


# --- the source of a repack ----------------------------------------------------------------------------------------


def test_a_shard_of_a_plain_source_is_missing(opt: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(opt(shards="40KB"), tmp_path / "sharded"))
    gone = sorted(folder.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(StoreMissingError) as caught:
        hf_flash.repack(folder, tmp_path / "out")
    names_all(caught.value, *ALL, INDEX, gone.name)
    with pytest.raises(StoreMissingError) as caught:
        load(folder, window=3)
    names_all(caught.value, gone.name)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [UP, DOWN])
def test_values_that_are_not_finite_name_their_tensor(source: Path, tmp_path: Path, name: str, value: float) -> None:
    state = {key: tensor.clone() for key, tensor in load_file(source / "model.safetensors").items()}
    state[name].view(-1)[77] = value
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidWeightsError, match="NaN or infinite") as caught:
        hf_flash.repack(source, tmp_path / "out")
    names_all(caught.value, f"where: {name}", "to do")
    assert not (tmp_path / "out").exists()


def test_a_matrix_that_is_missing_names_its_layer(source: Path, tmp_path: Path) -> None:
    state = {key: value.clone() for key, value in load_file(source / "model.safetensors").items() if key != DOWN}
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StoreFormatError) as caught:
        hf_flash.repack(source, tmp_path / "out")
    names_all(caught.value, "where", "expected", DOWN)


def set_activation(folder: Path, name: str) -> None:
    edit_json(folder / "config.json", lambda config: config.update(activation_function=name))


def test_an_unknown_activation_lists_the_known_ones(source: Path, tmp_path: Path) -> None:
    set_activation(source, "foo")
    with pytest.raises(UnsupportedModelError, match="unknown activation") as caught:
        hf_flash.repack(source, tmp_path / "out")
    names_all(caught.value, "activation_function", "relu", "got: 'foo'")


@pytest.mark.parametrize("verb", ["repack", "load"])
def test_a_predictor_for_an_activation_without_zeros_is_refused(source: Path, tmp_path: Path, verb: str) -> None:
    set_activation(source, "gelu")
    calls: dict[str, Callable[[], Any]] = {
        "repack": lambda: hf_flash.repack(source, tmp_path / "out", predictor="quantized"),
        "load": lambda: load(source, predictor="quantized"),
    }
    with pytest.raises(UnsupportedModelError, match="exact zeros") as caught:
        calls[verb]()
    names_all(caught.value, "activation_function", "expected: relu", "got: gelu", 'predictor="none"')


def test_an_activation_without_zeros_works_when_no_predictor_is_named(source: Path, tmp_path: Path) -> None:
    set_activation(source, "gelu")
    stock = AutoModelForCausalLM.from_pretrained(source)(TOKENS).logits
    for model in (load(source, window=5), load(hf_flash.repack(source, tmp_path / "out"))):
        assert hf_flash.stats(model).predictor == "none"
        torch.testing.assert_close(model(TOKENS).logits, stock, atol=1e-5, rtol=1e-5)


def tiny_mamba() -> Any:
    return MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=50, state_size=4))


def test_an_architecture_that_is_not_recognised_says_why(tmp_path: Path) -> None:
    tiny_mamba().save_pretrained(tmp_path / "model")
    for call in (lambda f: hf_flash.repack(f, tmp_path / "out"), lambda f: load(f, predictor="none")):
        with pytest.raises(UnsupportedModelError) as caught:
            call(tmp_path / "model")
        names_all(caught.value, "mamba", "with blocks none", "register_family")


def test_a_repacked_source_is_not_repacked_again(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="already quantized or repacked") as caught:
        hf_flash.repack(packed, tmp_path / "out")
    names_all(caught.value, str(packed), "got: flash", "repack the plain checkpoint")


def test_a_source_that_is_nothing_is_said_to_be_nothing(tmp_path: Path) -> None:
    with pytest.raises(StoreMissingError, match="no such folder") as caught:
        hf_flash.repack(tmp_path / "no" / "such" / "folder", tmp_path / "out")
    names_all(caught.value, "such")
    (tmp_path / "a-model").mkdir()
    with pytest.raises(StoreMissingError, match=r"did you mean .*a-model"):
        hf_flash.repack(tmp_path / "a-modle", tmp_path / "out")
    (tmp_path / "weights.bin").touch()
    with pytest.raises(ConfigError, match="a file, and not the folder"):
        hf_flash.repack(tmp_path / "weights.bin", tmp_path / "out")


def pickled(folder: Path, **how: Any) -> Path:
    """Turn a checkpoint's weights into `pytorch_model.bin`."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin", **how)
    (folder / "model.safetensors").unlink()
    return folder / "pytorch_model.bin"


def cut(path: Path) -> None:
    os.truncate(path, 3000)


def scratch(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[200:400] = bytes(200)
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, scratch])
def test_a_damaged_pickle_is_a_store_error(source: Path, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    path = pickled(source)
    damage(path)
    for call in (lambda: hf_flash.repack(source, tmp_path / "out"), lambda: load(source, window=2)):
        with pytest.raises(StoreFormatError, match="not a readable PyTorch checkpoint") as caught:
            call()
        names_all(caught.value, str(path), "got", "download it again")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [{"a": 1}, [torch.zeros(1)]])
def test_a_pickle_without_tensors_is_a_store_error(source: Path, tmp_path: Path, content: Any) -> None:
    torch.save(content, pickled(source))
    with pytest.raises(StoreFormatError, match="no tensors") as caught:
        hf_flash.repack(source, tmp_path / "out")
    names_all(caught.value, "pytorch_model.bin", "expected")


def test_an_old_pickle_works_and_says_what_it_costs(
    plain: Path, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = pickled(source, _use_new_zipfile_serialization=False)
    with caplog.at_level(logging.WARNING, logger="hf_flash"):
        out = hf_flash.repack(source, tmp_path / "out")
    assert str(path) in caplog.text
    assert "read into memory whole" in caplog.text
    assert torch.equal(load(out, predictor="none")(TOKENS).logits, load(plain, predictor="none")(TOKENS).logits)


# --- the target of a repack ----------------------------------------------------------------------------------------


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("verb", ["repack", "restore"])
def test_a_target_that_is_not_empty_is_left_alone(plain: Path, packed: Path, tmp_path: Path, verb: str) -> None:
    (tmp_path / "letter.txt").write_text("dear diary")
    with pytest.raises(TargetExistsError, match="not an empty folder") as caught:
        hf_flash.repack(plain, tmp_path) if verb == "repack" else hf_flash.restore(packed, tmp_path)
    names_all(caught.value, str(tmp_path), "to do")
    assert snapshot(tmp_path) == {"letter.txt": b"dear diary"}


def test_an_empty_target_is_taken(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert (hf_flash.repack(plain, tmp_path / "out") / "config.json").exists()


@pytest.mark.parametrize("verb", ["repack", "restore", "save", "cache"])
def test_a_target_under_a_file_cannot_be_written(plain: Path, packed: Path, tmp_path: Path, verb: str) -> None:
    (tmp_path / "file").write_text("")
    target = tmp_path / "file" / "folder" / "out"
    calls: dict[str, Callable[[], Any]] = {
        "repack": lambda: hf_flash.repack(plain, target),
        "restore": lambda: hf_flash.restore(packed, target),
        "save": lambda: load(packed).save_pretrained(target),
        "cache": lambda: load(plain, cache_dir=str(target)),
    }
    with pytest.raises(RepackError, match="cannot write") as caught:
        calls[verb]()
    names_all(caught.value, *ALL, str(tmp_path / "file"))


class Disk:
    """A file system of a given size, held in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def resize(self, size: str, mode: str = "rw") -> None:
        self._mount("-o", f"remount,{mode},size={size}", str(self.folder))

    def _mount(self, *args: str) -> None:
        subprocess.run(["mount", *args], check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """One MiB of disk; only root may make it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "hf_flash-test", str(folder)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a small file system cannot be mounted here: {error}")
    yield Disk(folder)
    gc.collect()
    subprocess.run(["umount", "--lazy", str(folder)], check=True, capture_output=True)  # a model may still have it mapped


@pytest.fixture(scope="module")
def wide(opt: Callable[..., Path]) -> Path:
    """A model whose FFN takes 1.5 MiB, half a MiB a layer."""
    return opt(ffn_dim=2048)


def test_a_disk_that_is_too_small_is_found_before_writing(disk: Disk, wide: Path) -> None:
    before = snapshot(wide)
    with pytest.raises(DiskSpaceError, match="not enough room") as caught:
        hf_flash.repack(wide, disk.folder / "out")
    names_all(caught.value, str(disk.folder), "expected", "bytes) free", "got", "to do")
    assert not list(disk.folder.iterdir())
    assert snapshot(wide) == before
    disk.resize("8m")
    assert hf_flash.stats(load(hf_flash.repack(wide, disk.folder / "out"))).layers == 3


@pytest.mark.parametrize("filler", [0, 600_000, 1_040_000])
def test_a_disk_that_fills_up_while_writing_leaves_nothing_half_written(
    disk: Disk, wide: Path, monkeypatch: pytest.MonkeyPatch, filler: int
) -> None:
    before = snapshot(wide)
    (disk.folder / "other").write_bytes(bytes(filler))
    with monkeypatch.context() as patch:  # somebody else takes the room after the check
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=1 << 40, used=0, free=1 << 40))
        with pytest.raises(DiskSpaceError, match="the disk is full") as caught:
            hf_flash.repack(wide, disk.folder / "out")
    names_all(caught.value, "where", "expected", "room for", "free some space and run it again")
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert not (disk.folder / "out").exists()
    assert not list(disk.folder.rglob("*.tmp"))
    assert snapshot(wide) == before
    done = {path.name: path.stat().st_ino for path in disk.folder.glob(".out.partial/flash-layer-*")}
    assert len(done) == (1 if filler == 0 else 0)
    disk.resize("8m")
    out = hf_flash.repack(wide, disk.folder / "out")
    assert {name: (out / name).stat().st_ino for name in done} == done
    assert [path.name for path in disk.folder.iterdir() if path.name.startswith(".")] == []
    assert torch.equal(load(out)(TOKENS).logits, load(wide, window=5)(TOKENS).logits)


def test_a_disk_that_fills_up_while_saving_leaves_no_half_file(disk: Disk, wide: Path) -> None:
    model = load(wide, window=5)
    with pytest.raises(DiskSpaceError, match="the disk is full") as caught:
        model.save_pretrained(disk.folder / "out")
    names_all(caught.value, str(disk.folder), "to do")
    assert not list(disk.folder.rglob("*.tmp"))
    disk.resize("8m")
    model.save_pretrained(disk.folder / "out")
    assert torch.equal(load(disk.folder / "out")(TOKENS).logits, model(TOKENS).logits)


def test_a_flash_cache_that_is_full_says_so(disk: Disk, wide: Path) -> None:
    with pytest.raises(DiskSpaceError) as caught:
        load(wide, cache_dir=str(disk.folder))
    names_all(caught.value, str(disk.folder), "expected", "got", "to do")
    assert not [path for path in disk.folder.iterdir() if path.is_dir()]


def test_a_disk_that_may_not_be_written_is_a_repack_error(disk: Disk, plain: Path) -> None:
    disk.resize("8m", mode="ro")
    with pytest.raises(RepackError, match="cannot write") as caught:
        hf_flash.repack(plain, disk.folder / "out")
    names_all(caught.value, *ALL, str(disk.folder), "you may write there")
    disk.resize("8m")
    assert hf_flash.repack(plain, disk.folder / "out").is_dir()


@pytest.fixture
def nobody() -> Iterator[None]:
    """Root may write everywhere, so while this lasts we are somebody else."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield
    os.seteuid(user)


@pytest.fixture
def open_folder(packed: Path, plain: Path) -> Iterator[Path]:
    """A folder that everybody may read, with a source in it that everybody may read."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        for path in Path(shutil.copytree(plain, Path(name) / "source")).iterdir():
            path.chmod(0o644)
        (Path(name) / "closed").mkdir(mode=0o555)
        yield Path(name)


def test_a_folder_that_may_not_be_written_is_a_repack_error(open_folder: Path, nobody: None) -> None:
    with pytest.raises(RepackError, match="cannot write") as caught:
        hf_flash.repack(open_folder / "source", open_folder / "closed" / "out")
    names_all(caught.value, *ALL, str(open_folder / "closed"), "Permission denied", "you may write there")


@pytest.mark.timeout(10)
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder in which nobody can make files")
def test_a_folder_that_takes_no_files_is_an_error_and_not_an_endless_wait(plain: Path) -> None:
    with pytest.raises(RepackError, match="cannot write") as caught:
        hf_flash.repack(plain, "/proc/hf_flash-test")
    names_all(caught.value, *ALL, "/proc")


# --- a repack that is killed ---------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
import hf_flash
import hf_flash.packing.repacking
from hf_flash.store import writer
from transformers.utils import logging
logging.disable_progress_bar()
source, target, victim = sys.argv[1:]

def dying(pieces):
    for piece in pieces:
        yield piece[: len(piece) // 2].contiguous()  # half a tensor is in the file, then the power goes
        os.kill(os.getpid(), signal.SIGKILL)

write = writer.write_safetensors
def wrapped(path, specs, pieces, metadata):
    write(path, specs, dying(pieces) if path.name.removesuffix(".new") == victim else pieces, metadata)

for name, module in sys.modules.items():
    if name.startswith("hf_flash.") and hasattr(module, "write_safetensors"):
        module.write_safetensors = wrapped
hf_flash.repack(source, target)
"""


def kill_repack(source: Path, target: Path, victim: str) -> None:
    """Repack in a process of its own that dies by SIGKILL while it writes the file `victim`."""
    done = subprocess.run(
        [*python(), "-c", KILLED, str(source), str(target), victim],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


@pytest.mark.parametrize("victim", ["flash-layer-00001.safetensors", PREDICTOR, "model-00001-of-00001.safetensors"])
def test_a_killed_repack_resumes_and_ends_like_an_undisturbed_one(
    plain: Path, packed: Path, tmp_path: Path, victim: str
) -> None:
    before = snapshot(plain)
    target = tmp_path / "out"
    kill_repack(plain, target, victim)
    assert not target.exists()
    assert snapshot(plain) == before
    partial = tmp_path / ".out.partial"
    finished = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in partial.glob("flash-*.safetensors")}
    assert len(finished) == {"flash-layer-00001.safetensors": 1, PREDICTOR: 3}.get(victim, 4)
    assert victim not in finished

    hf_flash.repack(plain, target)
    assert not partial.exists()
    assert {name: ((target / name).stat().st_ino, (target / name).stat().st_mtime_ns) for name in finished} == finished
    assert snapshot(target) == snapshot(packed)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("other", [{"seed": 7}, {"seed": 7, "num_hidden_layers": 2}], ids=["the same shape", "fewer layers"])
def test_what_a_killed_repack_of_another_model_left_is_not_taken(plain: Path, tmp_path: Path, other: dict[str, Any]) -> None:
    kill_repack(plain, tmp_path / "out", "model-00001-of-00001.safetensors")
    source = make_opt(tmp_path / "other", **other)
    out = hf_flash.repack(source, tmp_path / "out")
    assert snapshot(out) == snapshot(hf_flash.repack(source, tmp_path / "fresh"))
    assert torch.equal(load(out)(TOKENS).logits, load(source, window=5)(TOKENS).logits)


def test_what_a_killed_repack_with_a_predictor_left_is_not_taken_into_one_without(plain: Path, tmp_path: Path) -> None:
    kill_repack(plain, tmp_path / "out", "model-00001-of-00001.safetensors")
    out = hf_flash.repack(plain, tmp_path / "out", predictor="none")
    assert not (out / PREDICTOR).exists()


# --- arguments -----------------------------------------------------------------------------------------------------

MISSPELT = {
    "windwo": "window", "predicter": "predictor", "memory_buget": "memory_budget", "io_thread": "io_threads",
    "readr": "reader", "predictor_bit": "predictor_bits", "cachedir": "cache_dir",
    "predictor_groupsize": "predictor_group_size",
}  # fmt: skip
REFUSED: dict[str, list[Any]] = {
    "predictor": ["lowrnk", "", 4, True, ["quantized"]],
    "predictor_bits": [3, 0, "4", 4.0, True, [4]],
    "predictor_group_size": [0, 1, -64, 64.0, "64", True],
    "predictor_margin": [-0.1, 100, float("nan"), float("inf"), "1.5", True],
    "window": [0, -1, 2.0, "5", True, [5]],
    "lookahead": [-1, 2, 1.0, "1", True, [1]],
    "memory_budget": [0, -1, 1.5, True, "lots", "6 XB", "-1GB", "0.4", "", "9" * 400],
    "units_on": ["gpu", "", 1, True, ["cpu"]],
    "reader": ["disk", "", 1, True, ["mmap"]],
    "io_threads": [0, -4, 1.0, "16", True],
    "cache_dir": [5, 1.5, True, ["/tmp"]],
}


@pytest.mark.parametrize(("wrong", "right"), MISSPELT.items())
@pytest.mark.parametrize("call", [FlashOffloadConfig, hf_flash.configure])
def test_a_misspelt_argument_names_the_nearest(call: Callable[..., Any], wrong: str, right: str) -> None:
    for value in (None, 5):
        with pytest.raises(ConfigError) as caught:
            call(**{wrong: value})
        names_all(caught.value, repr(wrong), "expected: one of predictor", f"did you mean {right!r}?")


def test_an_argument_that_is_like_none_is_refused_without_a_guess() -> None:
    with pytest.raises(ConfigError) as caught:
        FlashOffloadConfig(zzz=1)
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in REFUSED.items() for value in values],
    ids=lambda value: repr(value)[:24],
)
def test_a_wrong_value_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        FlashOffloadConfig(**{name: value})
    names_all(caught.value, name, "expected: ", f"got: {value!r}")
    config = FlashOffloadConfig()
    with pytest.raises(ConfigError):
        setattr(config, name, value)
    with pytest.raises(ConfigError):
        hf_flash.configure(**{name: value})
    assert config.to_dict() == FlashOffloadConfig().to_dict()


def test_every_argument_has_wrong_values_here() -> None:
    with pytest.raises(ConfigError) as caught:
        FlashOffloadConfig(zzz=1)
    (line,) = (line for line in str(caught.value).splitlines() if "expected: one of " in line)
    assert line.partition("one of ")[2].split(", ") == list(REFUSED)


def test_a_path_is_a_path_everywhere(tmp_path: Path) -> None:
    assert FlashOffloadConfig(cache_dir=tmp_path).cache_dir == str(tmp_path)
    hf_flash.configure(cache_dir=tmp_path)
    try:
        assert FlashOffloadConfig().cache_dir == str(tmp_path)
    finally:
        hf_flash.configure(cache_dir=None)


def test_repack_refuses_wrong_arguments_before_it_looks_at_the_source(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="predictor_bits"):
        hf_flash.repack(tmp_path / "nothing", tmp_path / "out", predictor_bits=5)  # type: ignore[arg-type]


@pytest.mark.parametrize("device_map", [{"": "disk"}, {"model.decoder": "cpu", "lm_head": "disk"}])
def test_a_device_map_with_the_disk_in_it_is_refused(packed: Path, device_map: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        AutoModelForCausalLM.from_pretrained(packed, device_map=device_map)
    names_all(caught.value, "where: device_map", "got", "memory_budget")


def test_weights_that_lie_in_memory_only_are_refused(plain: Path) -> None:
    with pytest.raises(ConfigError, match="checkpoint files") as caught:
        OPTForCausalLM.from_pretrained(
            None,
            config=AutoConfig.from_pretrained(plain),
            state_dict=load_file(plain / "model.safetensors"),
            quantization_config=FlashOffloadConfig(),
        )
    names_all(caught.value, "got: a state_dict", "to do")


# --- the budget ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("predictor", ["quantized", "none"])
@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_a_budget_below_the_minimum_names_the_minimum_which_then_works(
    request: pytest.FixtureRequest, kind: str, predictor: str
) -> None:
    folder = request.getfixturevalue(kind)
    free = load(folder, predictor=predictor)
    minimum = hf_flash.stats(free).minimum_bytes
    for budget in (1, minimum - 1):
        with pytest.raises(BudgetError, match="too small") as caught:
            load(folder, predictor=predictor, memory_budget=budget)
        names_all(caught.value, "where: memory_budget", f"({minimum} bytes)", f"({budget} bytes)", "to do")
        names_all(caught.value, "embeddings, attention, norms", "predictor", "scratch buffers")
    tight = load(folder, predictor=predictor, memory_budget=minimum)
    assert torch.equal(tight(TOKENS).logits, free(TOKENS).logits)
    stats = hf_flash.stats(tight)
    assert (stats.capacity, stats.window_bytes) == (0, 0)
    assert stats.dram_bytes <= minimum


def test_a_predictor_that_nobody_named_gives_way_to_the_budget_and_says_so(
    plain: Path, caplog: pytest.LogCaptureFixture
) -> None:
    minimum = hf_flash.stats(load(plain, predictor="none")).minimum_bytes
    with caplog.at_level(logging.WARNING, logger="hf_flash"):
        model = load(plain, memory_budget=minimum)
    assert "loading with predictor='none'" in caplog.text
    assert hf_flash.stats(model).predictor == "none"


# --- a loaded model ------------------------------------------------------------------------------------------------


def test_training_is_refused_and_eval_helps(packed: Path) -> None:
    model = load(packed)
    with pytest.raises(UsageError, match="inference only") as caught:
        model.train()(TOKENS)
    names_all(caught.value, "where: FFN of layer 0", "got: model.train()", "model.eval()")
    assert model.eval()(TOKENS).logits.isfinite().all()


def test_changing_the_dtype_after_loading_is_refused(packed: Path) -> None:
    with pytest.raises(UsageError, match="dtype of the model was changed") as caught:
        load(packed).to(torch.bfloat16)(TOKENS)
    names_all(caught.value, "where", "expected: torch.float32", "got: torch.bfloat16", "dtype=torch.bfloat16")


def test_moving_the_model_away_from_the_cpu_is_refused(packed: Path) -> None:
    ffn = load(packed).model.decoder.layers[0].fc1
    with pytest.raises(UsageError, match="computes on the CPU") as caught:
        ffn(torch.empty(1, 32, device="meta"))
    names_all(caught.value, "where", "expected", "got: meta", "to do")


def test_a_model_that_adds_to_a_layers_output_in_place_runs_without_no_grad(tmp_path: Path) -> None:
    torch.manual_seed(0)
    stock = FalconForCausalLM(FalconConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)).eval()
    stock.save_pretrained(tmp_path)
    flash = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=FlashOffloadConfig(predictor="none"))
    ids = torch.arange(5, 15)[None]
    torch.testing.assert_close(flash(ids).logits, stock(ids).logits, rtol=1e-5, atol=1e-5)


def test_a_backward_pass_is_refused_instead_of_being_wrong(packed: Path) -> None:
    loss = load(packed)(TOKENS, labels=TOKENS).loss
    with pytest.raises(UsageError, match="no gradients") as caught:
        loss.backward()
    names_all(caught.value, "to do", "plain checkpoint")


def test_a_closed_model_says_that_it_is_closed(packed: Path) -> None:
    model = load(packed)
    hf_flash.close(model)
    hf_flash.close(model)
    with pytest.raises(UsageError, match="closed") as caught:
        model(TOKENS)
    names_all(caught.value, "where", "load the model again")


@pytest.mark.parametrize("verb", [hf_flash.stats, hf_flash.close])
def test_a_stock_model_is_not_a_flash_model(plain: Path, verb: Callable[[Any], Any]) -> None:
    for thing in (AutoModelForCausalLM.from_pretrained(plain), object()):
        with pytest.raises(UsageError, match="not a flash model") as caught:
            verb(thing)
        names_all(caught.value, f"got: {type(thing).__name__}", "quantization_config=FlashOffloadConfig()")


@pytest.mark.parametrize("argument", [{"state_dict": {}}, {"variant": "fp16"}])
def test_saving_something_else_than_the_model_is_refused(packed: Path, tmp_path: Path, argument: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="saved from its files") as caught:
        load(packed).save_pretrained(tmp_path / "out", **argument)
    names_all(caught.value, "where: save_pretrained", "got", "to do")
    assert not (tmp_path / "out").exists()


def test_a_store_that_does_not_fit_the_config_is_refused(copy: Path) -> None:
    edit_json(copy / "config.json", lambda config: config.update(ffn_dim=64))
    with pytest.raises(UnsupportedModelError, match="do not fit the model's config") as caught:
        load(copy)
    names_all(caught.value, str(copy), "3 layers, d_ff 64, d_model 32", "3 layers, d_ff 128, d_model 32", "to do")


def test_pushing_a_folder_without_a_store_never_reaches_the_network(plain: Path) -> None:
    with pytest.raises(StoreMissingError):
        hf_flash.push(plain, "nobody/nothing")
