"""What `from_pretrained` is told about the Hub: revision, token, cache_dir, subfolder, offline. And what is on the disk then.

Whoever loads is another process with caches of its own, as in test_hub.py; the Hub is `tests/hub_server.py`, on the loopback.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file

import hf_flash
from hf_flash.commands.main import main
from hf_flash.packing import repacking
from hf_flash.store.layout import FlashStore
from tests.hub.test_hub import elsewhere, tokens
from tests.hub_server import TOKEN, UPLOAD_WARNING, Hub

pytestmark = pytest.mark.filterwarnings(UPLOAD_WARNING)
Make = Callable[..., Path]
NO_TOKEN = {"HF_TOKEN": "", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}


@pytest.fixture(scope="module")
def small(opt: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model, repacked and calibrated."""
    folder = hf_flash.repack(opt(), tmp_path_factory.mktemp("loading") / "small-flash")
    ids = torch.randint(4, 96, (6000,), generator=torch.Generator().manual_seed(0))
    hf_flash.calibrate(folder, ids, samples=64, context=32, rank=8, epochs=1)
    return folder


@pytest.fixture(scope="module")
def other(opt: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another one of the same shape."""
    return hf_flash.repack(opt(seed=1), tmp_path_factory.mktemp("loading") / "other-flash")


def fetched(hub: Hub) -> set[str]:
    """The names of what was downloaded."""
    return {Path(line).name for line in hub.requests if line.startswith("GET") and "/resolve/" in line}


def nested(folder: Path, **parts: Path) -> Path:
    """A folder with these folders in it, and a weight file that is nobody's."""
    for name, part in parts.items():
        shutil.copytree(part, folder / name)
    (folder / "extra.safetensors").write_bytes(b"not a file of the checkpoint")
    return folder


# --- repacked ---------------------------------------------------------------------------------------------------------


def test_a_private_model_of_some_revision_in_some_cache(hub: Hub, small: Path, other: Path, tmp_path: Path) -> None:
    """token=, revision=, cache_dir=, local_files_only=, force_download=, predictor=."""
    first, second = hub.publish("me/x", other), hub.publish("me/x", small)
    hub.repos["me/x"].private = True
    hub.repos["me/x"].branches["old"] = first
    said, older = tokens(small), tokens(other)
    lowrank = tokens(small, predictor="lowrank")
    assert said != older
    cache = str(tmp_path / "cache")
    mine: dict[str, Any] = {"source": "me/x", "cache_dir": cache, "token": TOKEN}
    wishes = [
        {"source": "me/x", "fails": True},
        {"source": "me/x", "cache_dir": cache, "local_files_only": True, "fails": True},
        mine,
        mine | {"revision": "old"},
        mine | {"revision": second},
        {"source": "me/x", "cache_dir": cache, "local_files_only": True},
        {"source": "me/x", "cache_dir": cache, "local_files_only": True, "predictor": "lowrank"},
        mine | {"force_download": True},
    ]
    refused, absent, *found = elsewhere(hub, tmp_path / "home", *wishes, **NO_TOKEN)
    assert "OSError" in refused
    assert "OSError" in absent
    assert found == [said, older, said, said, lowrank, said]
    assert hub.requests.count(f"GET /me/x/resolve/{second}/flash-layer-00000.safetensors") == 2
    assert not list((tmp_path / "home").rglob("*.safetensors"))

    hub.requests.clear()
    offline = [{"source": "me/x", "cache_dir": cache}, {"source": "me/x", "cache_dir": cache, "revision": "old"}]
    assert elsewhere(hub, tmp_path / "home", *offline, HF_HUB_OFFLINE="1", **NO_TOKEN) == [said, older]
    assert hub.requests == []


def test_the_store_is_used_where_it_was_downloaded_to(hub: Hub, small: Path, tmp_path: Path) -> None:
    """Every byte of it is on the disk once, and the files that are mapped or open are the Hub cache's own."""
    folder = shutil.copytree(small, tmp_path / "model")
    (folder / "README.md").write_text("# A card")
    (folder / "extra.safetensors").write_bytes(b"x" * 100_000)
    hub.publish("me/x", folder)
    home = tmp_path / "home"
    script = """
import json, os, sys
import hf_flash, torch
from transformers import AutoModelForCausalLM
from hf_flash import FlashOffloadConfig
used = {}
for reader in ("mmap", "direct"):
    config = FlashOffloadConfig(reader=reader)
    model = AutoModelForCausalLM.from_pretrained("me/x", quantization_config=config)
    model.generate(torch.tensor([[2, 44, 81]]), max_new_tokens=3)
    fds = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    opened = [os.stat(fd).st_ino for fd in fds if os.path.exists(fd)]
    used[reader] = sorted(set(opened))
    hf_flash.close(model)
    del model
print(json.dumps(used))
"""
    used = json.loads(hub.run(home, "-c", script).splitlines()[-1])
    blobs = {path.stat().st_ino for path in home.rglob("flash-layer-*.safetensors")}  # through the snapshot's links
    assert len(blobs) == len(FlashStore.open_folder(small).layers)
    assert blobs <= set(used["mmap"])
    assert blobs <= set(used["direct"])
    sizes = sorted(path.stat().st_size for path in home.rglob("*") if path.is_file() and not path.is_symlink())
    assert sum(sizes) < sum(path.stat().st_size for path in small.iterdir()) + 10_000
    assert fetched(hub).isdisjoint({"README.md", "extra.safetensors"})
    assert not (home / "flash").exists()


# --- subfolders -------------------------------------------------------------------------------------------------------


def test_models_in_subfolders_are_told_apart(hub: Hub, opt: Make, small: Path, other: Path, tmp_path: Path) -> None:
    """Two plain ones of the same shape at one commit; private, in a cache of their own; and repacked; and two repacked ones."""
    one, two = opt(), opt(seed=1)
    hub.publish("me/flash", nested(tmp_path / "flash", a=small, b=other))
    hub.publish("me/both", nested(tmp_path / "both", a=one, b=two))
    hub.repos["me/both"].private = True
    hub.repos["me/both"].branches["dev"] = hub.repos["me/both"].branches["main"]
    where: dict[str, Any] = {"source": "me/both", "cache_dir": str(tmp_path / "cache")}
    plain = where | {"plain": True, "token": TOKEN, "revision": "dev"}
    targets = [str(tmp_path / name) for name in ("packed-a", "packed-b")]
    wishes = [
        {"source": "me/both", "subfolder": "a", "plain": True, "fails": True},
        plain | {"subfolder": "a"},
        plain | {"subfolder": "b"},
        where | {"token": TOKEN, "target": targets[0], "subfolder": "a"},
        where | {"token": TOKEN, "target": targets[1], "subfolder": "b"},
        {"source": "me/flash", "subfolder": "a"},
        {"source": "me/flash", "subfolder": "b"},
        where | {"token": TOKEN, "target": str(tmp_path / "never"), "revision": "nothing", "fails": True},
    ]
    refused, *found, unknown = elsewhere(hub, tmp_path / "home", *wishes, **NO_TOKEN)
    assert "OSError" in refused
    assert "StoreMissingError" in unknown
    assert found == [tokens(one), tokens(two), *targets, tokens(small), tokens(other)]
    for target, source in zip(targets, (one, two), strict=True):
        restored = load_file(hf_flash.restore(target, f"{target}-restored") / "model.safetensors")
        assert all(torch.equal(restored[name], tensor) for name, tensor in load_file(source / "model.safetensors").items())
    assert FlashStore.open_folder(targets[1]).metadata["source"] == "me/both/b"
    assert "extra.safetensors" not in fetched(hub)


# --- the source is removed ----------------------------------------------------------------------------------------------


def weights(cache: Path) -> dict[str, int]:
    """Weight files that the snapshots in a cache lead to, and how many links each has."""
    found = [os.path.realpath(path) for path in cache.rglob("*") if path.suffix in (".safetensors", ".bin") and path.is_file()]
    return {name: found.count(name) for name in found}


def test_the_weights_of_the_source_are_removed_once_they_are_repacked(
    here: Hub, opt: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of that revision only; what another one shares stays, the small files stay, and they can be had again."""
    folder = Path(shutil.copytree(opt(shards="40KB"), tmp_path / "source"))
    here.publish("me/x", folder)
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes().replace(b'"format":"pt"', b'"format":"np"'))  # the only file that differs
    here.publish("me/x", folder)
    old = next(iter(here.repos["me/x"].commits))
    cache = tmp_path / "cache"
    huggingface_hub.snapshot_download("me/x", revision=old, cache_dir=cache)
    count = len(list(folder.glob("*.safetensors")))
    assert len(weights(cache)) == count

    target = hf_flash.repack("me/x", tmp_path / "flash", cache_dir=str(cache), delete_source=True)
    assert sorted(weights(cache).values()) == [1] * count  # the older revision is whole
    assert len(list((cache / "models--me--x" / "blobs").glob("*"))) == count + len(list(folder.glob("*.json")))
    restored, wanted = hf_flash.restore(target, tmp_path / "restored"), opt()
    found = {name: tensor for path in restored.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in load_file(wanted / "model.safetensors").items())

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    assert main(["repack", "me/x", str(tmp_path / "again"), "--revision", old, "--delete-source"]) == 0
    assert "removed from the Hub's cache" in capsys.readouterr().out
    assert weights(cache) == {}
    assert len(list(cache.rglob("config.json"))) == 2
    hf_flash.repack("me/x", tmp_path / "third", cache_dir=str(cache))
    assert len(weights(cache)) == count


def test_nothing_is_removed_unless_every_bit_was_found_again(
    here: Hub, opt: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that flips a bit in a bundle, or in another weight, behind our back; checksums that fit what was written."""
    here.publish("me/x", opt())
    cache = str(tmp_path / "cache")
    copy = repacking.copy_small_files
    for number, name in enumerate(["flash-layer-00001.safetensors", "model-00001-of-00001.safetensors"]):

        def damaging(source: Path, partial: Path, name: str = name) -> None:
            copy(source, partial)
            data = bytearray((partial / name).read_bytes())
            data[-5] ^= 1
            (partial / name).write_bytes(data)

        monkeypatch.setattr(repacking, "copy_small_files", damaging)
        with pytest.raises(hf_flash.RepackError, match="nothing was deleted"):
            hf_flash.repack("me/x", tmp_path / f"flash{number}", cache_dir=cache, delete_source=True)
        assert len(weights(Path(cache))) == 1


def test_a_local_folder_is_never_removed(opt: Make, tmp_path: Path) -> None:
    with pytest.raises(hf_flash.ConfigError, match="local folder"):
        hf_flash.repack(opt(), tmp_path / "flash", delete_source=True)
    assert not (tmp_path / "flash").exists()
