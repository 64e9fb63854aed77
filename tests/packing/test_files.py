"""Files that are out of reach, replaced, cut short or somebody else's: nothing good is deleted, nothing wrong is kept."""

from __future__ import annotations

import errno
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import hf_flash
from hf_flash import FlashOffloadConfig, HfFlashError, RepackError, StoreFormatError, StoreReadError
from hf_flash.commands.main import main
from hf_flash.families import family_of
from hf_flash.packing import bundling
from hf_flash.packing.flash_cache import cached_store
from hf_flash.predictors.base import read_tensors
from hf_flash.predictors.quantized import QuantizedFormat
from hf_flash.store.checkpoint import Checkpoint
from hf_flash.store.layout import FlashStore
from hf_flash.store.names import INDEX_NAME
from hf_flash.store.safetensors_files import read_header
from hf_flash.store.writer import write_safetensors
from tests.conftest import ROOT, make_opt
from tests.preloaded_python import python

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="users, mounts and system calls of Linux")
Make = Callable[..., Path]
IDS = torch.tensor([[5, 6, 7, 8]])
REST = "model-00001-of-00001.safetensors"


def load(folder: str | Path, cache: Path | None = None, **arguments: Any) -> Any:
    config = FlashOffloadConfig(cache_dir=cache, **arguments)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(IDS).logits
    return result


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def entry_of(cache: Path) -> Path:
    (entry,) = (path for path in cache.iterdir() if path.is_dir())
    return entry


def store_of(source: Path, cache: Path) -> FlashStore:
    """As loading makes or finds it."""
    config = AutoConfig.from_pretrained(source)
    return cached_store(Checkpoint.open_folder(source), family_of(config), QuantizedFormat(4, 64), str(cache))


# --- the flash cache -------------------------------------------------------------------------------------------------------


@pytest.fixture
def shared(plain: Path) -> Iterator[Path]:
    """A folder of everybody's: `source`, and `cache` with its entry, made by us."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        for path in Path(shutil.copytree(plain, folder / "source")).iterdir():
            path.chmod(0o644)
        (folder / "cache").mkdir()
        store_of(folder / "source", folder / "cache")
        (folder / "cache").chmod(0o777)
        yield folder


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root may read everything, so while this lasts we are somebody else."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to be somebody else")
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("lock", [0o644, 0o666])
def test_a_good_entry_with_a_file_of_somebody_else_is_left_alone(shared: Path, lock: int) -> None:
    entry = entry_of(shared / "cache")
    (entry / "flash-layer-00001.safetensors").chmod(0o600)
    next((shared / "cache").glob(".*.lock")).chmod(lock)
    before = contents(entry)
    with as_nobody(), pytest.raises(StoreReadError, match="Permission denied") as caught:
        store_of(shared / "source", shared / "cache")
    assert caught.value.errno == errno.EACCES
    assert contents(entry) == before


def test_a_folder_that_may_not_be_listed_is_not_empty(shared: Path) -> None:
    entry = entry_of(shared / "cache")
    entry.chmod(0o311)
    with as_nobody(), pytest.raises(HfFlashError, match="Permission denied"):
        store_of(shared / "source", shared / "cache")
    entry.chmod(0o755)
    FlashStore.open_folder(entry)


def test_an_entry_of_somebody_else_is_used(shared: Path) -> None:
    (shared / "cache").chmod(0o755)
    with as_nobody():
        found = store_of(shared / "source", shared / "cache")
        assert torch.equal(
            found.layers[1].part("up")[:], load_file(shared / "source" / "model.safetensors")[found.layers[1].name("up")]
        )


def test_an_entry_on_a_read_only_disk_is_used(shared: Path, tmp_path: Path) -> None:
    (tmp_path / "ro").mkdir()
    bind = ["mount", "--bind", str(shared / "cache"), str(tmp_path / "ro")]
    if subprocess.run(bind, capture_output=True, check=False).returncode:
        pytest.skip("no mounts here")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(tmp_path / "ro")], check=True)
        model = load(shared / "source", tmp_path / "ro", predictor="quantized")
        assert torch.equal(logits(model), logits(load(shared / "source", tmp_path / "other", predictor="quantized")))
        with pytest.raises(RepackError, match="cannot write"):  # what is not ready has to be made
            load(shared / "source", tmp_path / "ro", predictor="quantized", predictor_bits=8)
        hf_flash.close(model)
    finally:
        subprocess.run(["umount", "-l", str(tmp_path / "ro")], check=True)


def test_too_many_open_files_are_no_damage(shared: Path) -> None:
    entry, limits = entry_of(shared / "cache"), resource.getrlimit(resource.RLIMIT_NOFILE)
    checkpoint, family = Checkpoint.open_folder(shared / "source"), family_of({"model_type": "opt"})
    before, free = contents(entry), os.open("/dev/null", os.O_RDONLY)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
    try:
        with pytest.raises(StoreReadError, match="EMFILE") as caught:
            FlashStore.open_folder(entry)
        with pytest.raises(HfFlashError):
            cached_store(checkpoint, family, QuantizedFormat(4, 64), str(shared / "cache"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert caught.value.errno == errno.EMFILE
    assert contents(entry) == before


def test_an_entry_of_a_newer_version_is_left_alone(shared: Path) -> None:
    entry = entry_of(shared / "cache")
    path = entry / "flash-layer-00001.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"hf_flash.format_version":"1"', b'"hf_flash.format_version":"9"'))
    before = contents(entry)
    with pytest.raises(hf_flash.StoreVersionError):
        store_of(shared / "source", shared / "cache")
    assert contents(entry) == before


def test_what_is_proven_damaged_is_made_again(shared: Path) -> None:
    entry = entry_of(shared / "cache")
    before = contents(entry)
    os.truncate(entry / "flash-layer-00001.safetensors", 5000)
    store_of(shared / "source", shared / "cache")
    assert contents(entry) == before
    assert [path.name for path in (shared / "cache").iterdir() if path.is_dir()] == [entry.name]


def snapshot_of(source: Path, cache: Path) -> Path:
    """A folder as the Hub's cache has it: files in `blobs`, links in a snapshot."""
    repo = cache / "models--me--opt"
    folder = repo / "snapshots" / ("0123456789" * 4)
    folder.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for number, path in enumerate(sorted(source.iterdir())):
        shutil.copyfile(path, repo / "blobs" / f"{number:040d}")
        (folder / path.name).symlink_to(Path("../../blobs") / f"{number:040d}")
    return folder


@pytest.mark.parametrize("where", ["sampled", "between the samples"])
def test_a_snapshot_that_was_damaged_and_repaired_is_another_one(tmp_path: Path, where: str) -> None:
    folder = snapshot_of(make_opt(tmp_path / "plain", ffn_dim=4096, num_hidden_layers=1), tmp_path / "hub")
    path, good = folder / "model.safetensors", (folder / "model.safetensors").read_bytes()
    wanted = logits(load(folder, tmp_path / "first", predictor="none"))
    offset = read_header(path)[0]["model.decoder.layers.0.fc2.weight"][1]
    stride = len(good) // 256
    at = next(n for n in range(offset, len(good)) if n % 4 == offset % 4 and 256 < n % stride < 260 + 4) + 400
    bad = bytearray(good)
    if where == "sampled":
        at = offset + 4 * 1000
        bad[at : at + 4 * 3000] = bytes(4 * 3000)
    else:
        bad[at : at + 40] = bytes(40)
    path.write_bytes(bad)
    os.utime(path.resolve(), (1_700_000_000, 1_700_000_000))
    assert not torch.equal(logits(load(folder, tmp_path / "cache", predictor="none")), wanted)
    path.write_bytes(good)
    assert torch.equal(logits(load(folder, tmp_path / "cache", predictor="none")), wanted)


def test_a_link_out_of_a_snapshot_is_refused(opt: Make, tmp_path: Path) -> None:
    folder = snapshot_of(hf_flash.repack(opt(), tmp_path / "packed"), tmp_path / "hub")
    wanted = logits(load(tmp_path / "packed"))
    assert torch.equal(logits(load(folder)), wanted)
    layer = folder / "flash-layer-00001.safetensors"
    layer.unlink()
    layer.symlink_to(tmp_path / "packed" / layer.name)
    for call in (load, FlashStore.open_folder, lambda f: hf_flash.restore(f, tmp_path / "out")):
        with pytest.raises(StoreFormatError, match="outside its folder"):
            call(folder)


# --- file systems that lack something -----------------------------------------------------------------------------------------

WITHOUT = """
import ctypes, gc, sys
from transformers import AutoModelForCausalLM
import hf_flash
from hf_flash import FlashOffloadConfig
from hf_flash.commands.main import main

def refuse(number, error):
    class Rule(ctypes.Structure):
        _fields_ = [("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte), ("k", ctypes.c_uint32)]
    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("rules", ctypes.POINTER(Rule))]
    returned = Rule(0x06, 0, 0, 0x50000 | error), Rule(0x06, 0, 0, 0x7FFF0000)
    rules = (Rule * 4)(Rule(0x20, 0, 0, 0), Rule(0x15, 0, 1, number), *returned)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.byref(Program(4, rules)), 0, 0):
        sys.exit(77)

source, target, cache, number, error = sys.argv[1:]
refuse(int(number), int(error))
for _ in range(2):
    AutoModelForCausalLM.from_pretrained(source, quantization_config=FlashOffloadConfig(cache_dir=cache))
hf_flash.restore(hf_flash.repack(source, target), target + "-again")
gc.collect()
assert main(["cache", "ls", "--cache-dir", cache]) == 0
assert main(["cache", "rm", "--all", "--yes", "--cache-dir", cache]) == 0
"""
NUMBERS = {"x86_64": {"flock": 73, "fsync": 74}, "aarch64": {"flock": 32, "fsync": 82}}.get(platform.machine(), {})


@pytest.mark.timeout(120)
@pytest.mark.skipif(not NUMBERS, reason="the numbers of this processor's system calls are not known")
@pytest.mark.parametrize(("call", "error"), [("flock", errno.ENOSYS), ("fsync", errno.EINVAL)])
def test_a_file_system_without(plain: Path, packed: Path, tmp_path: Path, call: str, error: int) -> None:
    arguments = [plain, tmp_path / "out", tmp_path / "cache", NUMBERS[call], error]
    done = subprocess.run(
        [*python(), "-c", WITHOUT, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode == 77:
        pytest.skip("no seccomp here")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "another process" not in done.stderr
    assert contents(tmp_path / "out") == contents(packed)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert "1 entry" in done.stdout
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


# --- what others left or do ------------------------------------------------------------------------------------------------


def left_behind(target: Path) -> Path:
    """What another run may have left beside a target."""
    partial = target.with_name(f".{target.name}.partial")
    (partial / "folder").mkdir(parents=True)
    (partial / "folder" / "x").write_text("x")
    for name in ("model-00001-of-00009.safetensors", "secret.txt", "tokenizer.json", "flash-layer-00000.safetensors"):
        (partial / name).write_text("of another run")
    return partial


@pytest.mark.parametrize("verb", ["repack", "restore"])
def test_what_another_run_left_is_not_shipped(plain: Path, packed: Path, tmp_path: Path, verb: str) -> None:
    call, source = (hf_flash.repack, plain) if verb == "repack" else (hf_flash.restore, packed)
    call(source, tmp_path / "wanted")
    left_behind(tmp_path / "out")
    assert contents(call(source, tmp_path / "out")) == contents(tmp_path / "wanted")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "wanted"]
    assert all(path.is_file() for path in (tmp_path / "out").iterdir())


def test_a_save_removes_what_a_killed_one_left(packed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(packed, tmp_path / "folder"))
    for name in (f"{REST}.new", f"{REST}.new.tmp", "flash-layer-00001.safetensors.tmp"):
        (folder / name).write_text("half")
    load(packed).save_pretrained(folder)
    assert not [path.name for path in folder.iterdir() if path.suffix in (".tmp", ".new")]


@pytest.mark.parametrize("moment", [0, 2])
def test_a_source_that_changes_while_it_is_read_is_an_error(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    source = Path(shutil.copytree(plain, tmp_path / "source"))
    good, state = (source / "model.safetensors").read_bytes(), (source / "model.safetensors").stat()
    write = bundling.write_layer

    def written(path: Path, index: int, *rest: Any) -> None:
        write(path, index, *rest)
        if index == moment:  # another process writes other weights in place, of the same size
            make_opt(tmp_path / "other", seed=3)
            (source / "model.safetensors").write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())

    with monkeypatch.context() as patch:
        patch.setattr(bundling, "write_layer", written)
        with pytest.raises(RepackError, match="the source changed while it was read"):
            hf_flash.repack(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (source / "model.safetensors").write_bytes(good)
    os.utime(source / "model.safetensors", ns=(state.st_atime_ns, state.st_mtime_ns))
    out, wanted = hf_flash.repack(source, tmp_path / "out"), hf_flash.repack(source, tmp_path / "wanted")
    assert contents(out) == contents(wanted)


def test_a_file_that_is_cut_short_is_an_error_and_no_signal(packed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(packed, tmp_path / "folder"))
    store, checkpoint = FlashStore.open_folder(folder), Checkpoint.open_folder(folder)
    up = store.layers[1].part("up")
    name = next(name for name, (_, shape) in checkpoint.specs.items() if "embed_tokens" in name)
    for path in folder.glob("*.safetensors"):
        os.truncate(path, 4096)
    calls: list[Callable[[], Any]] = [
        lambda: up[:], store.layers[0].bundles, lambda: checkpoint.tensor(name), lambda: list(checkpoint.pieces(name)),
        lambda: read_tensors(store.predictors["int4-g64"], store.layers[0].prefix),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(hf_flash.StoreError):
            call()
    with pytest.raises(StoreReadError, match="ends too early"):
        up[:]


def test_check_finds_that_the_other_weights_were_replaced(packed: Path, opt: Make, tmp_path: Path) -> None:
    other = hf_flash.repack(opt(seed=9), tmp_path / "other")
    plain_file = tmp_path / "plain.safetensors"
    save_file({name: tensor.clone() for name, tensor in load_file(packed / REST).items()}, plain_file)
    for number, replaced in enumerate((other / REST, plain_file)):
        folder = Path(shutil.copytree(packed, tmp_path / f"folder{number}"))
        assert main(["inspect", "--check", str(folder)]) == 0
        shutil.copyfile(replaced, folder / REST)
        (problem,) = FlashStore.open_folder(folder).check()
        assert problem.startswith(REST)
        assert main(["inspect", "--check", str(folder)]) == 1


@pytest.mark.parametrize("damage", ["a name", "places", "another file", "a tensor less", "a name, first version"])
def test_other_weights_that_the_index_was_not_written_for_are_not_loaded(
    packed: Path, opt: Make, tmp_path: Path, damage: str
) -> None:
    """Transformers makes up what it does not find in a file."""
    folder = Path(shutil.copytree(packed, tmp_path / "folder"))
    data = (folder / REST).read_bytes()
    if damage.startswith("a name"):
        changed = data.replace(b"layers.0.fc1.bias", b"layers.0.fc1.bios")
    elif damage == "places":
        one, other = b"layers.0.fc1.bias", b"layers.1.fc1.bias"
        changed = data.replace(one, bytes(len(one))).replace(other, one).replace(bytes(len(one)) + b'"', other + b'"')
    elif damage == "a tensor less":
        tensors = load_file(folder / REST)
        del tensors["model.decoder.layers.0.fc1.bias"]
        changed = save(tensors, {"format": "pt"})
    else:
        changed = (hf_flash.repack(opt(seed=9), tmp_path / "other") / REST).read_bytes()
    assert changed != data
    if damage.endswith("first version"):
        index = json.loads((folder / INDEX_NAME).read_text())
        del index["metadata"]["hf_flash_headers"]
        (folder / INDEX_NAME).write_text(json.dumps(index))
    (folder / REST).write_bytes(changed)
    for call in (lambda: load(folder), lambda: hf_flash.restore(folder, tmp_path / "restored")):
        with pytest.raises(StoreFormatError, match=r"tensors are missing|another file than the index was written for"):
            call()
    assert not (tmp_path / "restored").exists()


def test_an_index_of_the_first_version_says_nothing_of_headers(packed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(packed, tmp_path / "folder"))
    index = json.loads((folder / INDEX_NAME).read_text())
    del index["metadata"]["hf_flash_headers"]
    (folder / INDEX_NAME).write_text(json.dumps(index))
    assert FlashStore.open_folder(folder).check() == []
    assert torch.equal(logits(load(folder)), logits(load(packed)))


def test_a_model_that_was_loaded_by_a_relative_path_stays_where_it_was(
    packed: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, source in (("packed", packed), ("plain", plain)):
        (tmp_path / name).mkdir()
        shutil.copytree(source, tmp_path / name / "model")
        monkeypatch.chdir(tmp_path / name)
        model = load("model", tmp_path / "cache")
        wanted = logits(model)
        make_opt(tmp_path / "elsewhere" / "model", seed=4)
        monkeypatch.chdir(tmp_path / "elsewhere")
        model.save_pretrained(tmp_path / f"saved-{name}")
        assert torch.equal(logits(load(tmp_path / f"saved-{name}")), wanted)


def test_a_repacked_folder_with_the_config_of_the_plain_model_says_so(plain: Path, packed: Path, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(plain)
    for arguments in ({"predictor": "none"}, {}):
        with pytest.raises(StoreFormatError, match="a repacked checkpoint whose config does not say so"):
            AutoModelForCausalLM.from_pretrained(packed, config=config, quantization_config=FlashOffloadConfig(**arguments))
    folder = Path(shutil.copytree(packed, tmp_path / "folder"))
    shutil.copyfile(plain / "config.json", folder / "config.json")
    with pytest.raises(StoreFormatError, match="a repacked checkpoint whose config does not say so"):
        hf_flash.repack(folder, tmp_path / "out")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("trap", ["link", "fifo"])
def test_nothing_is_written_through_what_lies_there(packed: Path, tmp_path: Path, trap: str) -> None:
    victim, path = tmp_path / "victim", tmp_path / "x.safetensors"
    victim.write_text("mine")
    temporary = tmp_path / "x.safetensors.tmp"
    temporary.symlink_to(victim) if trap == "link" else os.mkfifo(temporary)
    write_safetensors(path, {"a": (torch.float32, (2,))}, [torch.ones(2)], {})
    assert read_header(path)[0]["a"][0] == (torch.float32, (2,))
    assert victim.read_text() == "mine"


def test_a_working_folder_that_leads_elsewhere_is_not_used(packed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(packed, tmp_path / "folder"))
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "mine").write_text("mine")
    (folder / ".calibration").symlink_to(tmp_path / "victim")
    tokens = torch.randint(4, 96, (2000,), generator=torch.Generator().manual_seed(0))
    hf_flash.calibrate(folder, tokens, samples=16, context=32, rank=8, epochs=1)
    assert contents(tmp_path / "victim") == {"mine": b"mine"}
    assert FlashStore.open_folder(folder).calibration is not None
    assert FlashStore.open_folder(folder).check() == []
