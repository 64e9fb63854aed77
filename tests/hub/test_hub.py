"""The Hub: what is pushed is what others load. The client is the real one; the Hub is `tests/hub_server.py`, on the loopback.

Whoever loads is another process with caches of its own, because `huggingface_hub` reads its environment once. Uploads and
errors mostly happen in this process: `here` points its client at the Hub.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_flash
from hf_flash import FlashOffloadConfig
from hf_flash.commands.main import main
from hf_flash.store.layout import FlashStore
from tests.hub_server import TOKEN, UPLOAD_WARNING, Hub

pytestmark = pytest.mark.filterwarnings(UPLOAD_WARNING)

PROMPT = [[2, 44, 81, 63, 10]]
Make = Callable[..., Path]


# --- helpers ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def load() -> Iterator[Callable[..., Any]]:
    """`from_pretrained` for flash models, which are closed at the end of the test."""
    models = []

    def load(source: Path, **kwargs: Any) -> Any:
        models.append(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **kwargs))
        return models[-1]

    yield load
    for model in models:
        hf_flash.close(model)


@pytest.fixture(scope="module")
def flash(tiny_opt: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model, repacked."""
    return hf_flash.repack(tiny_opt, tmp_path_factory.mktemp("hub") / "tiny-opt-flash")


@pytest.fixture(scope="module")
def small(opt: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model, repacked."""
    return hf_flash.repack(opt(), tmp_path_factory.mktemp("hub") / "small-flash")


def tokens(source: str | Path, plain: bool = False, predictor: str | None = None, **kwargs: Any) -> list[int]:
    """What a model says to the prompt. `plain`: it is a plain checkpoint, to be loaded with its FFN on flash."""
    if plain or predictor:
        kwargs["quantization_config"] = FlashOffloadConfig(predictor=predictor or "none")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **kwargs)
    said = generated(model)
    if getattr(model, "is_quantized", False):
        hf_flash.close(model)
    return said


def generated(model: Any) -> list[int]:
    said: list[int] = model.generate(torch.tensor(PROMPT), max_new_tokens=12, do_sample=False)[0].tolist()
    return said


def elsewhere(hub: Hub, home: Path, *wishes: dict[str, Any], **env: str) -> list[Any]:
    """`[tokens(**wish), ...]`, or what `repack(**wish)` makes, of another process whose caches are in `home`.

    With `fails`, what the error says that it ends with.
    """
    script = """
import json, sys, hf_flash
from tests.hub.test_hub import tokens
def grant(wish):
    if wish.pop("fails", False):
        try:
            return grant(wish)
        except Exception as error:
            return f"{type(error).__name__} {error}"
    return str(hf_flash.repack(**wish)) if "target" in wish else tokens(**wish)
print(json.dumps([grant(wish) for wish in json.loads(sys.argv[1])]))
"""
    printed = hub.run(home, "-c", script, json.dumps(wishes), **env)
    answers: list[Any] = json.loads(printed.splitlines()[-1])
    return answers


def sha256s(folder: Path) -> dict[str, str]:
    """Every file under a folder, and its sha256."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def pushed(hub: Hub, name: str, revision: str = "main") -> dict[str, str]:
    """Path -> sha256 of what was pushed, but for the card (test_card.py)."""
    return {path: blob for path, blob in hub.files(name, revision).items() if path not in (".gitattributes", "README.md")}


# --- the Hub itself ---------------------------------------------------------------------------------------------------


def test_a_part_of_a_file_can_be_asked_for(hub: Hub, opt: Make) -> None:
    hub.publish("me/plain", opt())
    url = f"{hub.url}/me/plain/resolve/main/model.safetensors"
    request = urllib.request.Request(url, headers={"Range": "bytes=8-15"})
    with urllib.request.urlopen(request) as answer:
        assert answer.status == 206
        assert answer.read() == (opt() / "model.safetensors").read_bytes()[8:16]


# --- repacked models --------------------------------------------------------------------------------------------------


def test_what_is_pushed_says_the_same_when_loaded_elsewhere(
    here: Hub, flash: Path, tiny_opt: Path, tmp_path: Path, load: Callable[..., Any]
) -> None:
    """A folder, and a model that was loaded from a plain checkpoint."""
    config = FlashOffloadConfig(cache_dir=tmp_path / "cache")
    model = load(tiny_opt, quantization_config=config)
    info = hf_flash.push(flash, "me/tiny-opt-flash")
    model.push_to_hub("me/other")
    assert info.oid == here.repos["me/tiny-opt-flash"].branches["main"]
    assert pushed(here, "me/tiny-opt-flash") == sha256s(flash)
    stores = sha256s(next(path for path in (tmp_path / "cache").iterdir() if path.is_dir()))
    assert stores.items() <= pushed(here, "me/other").items()

    said = [tokens(flash), generated(model)]
    assert elsewhere(here, tmp_path / "home", {"source": "me/tiny-opt-flash"}, {"source": "me/other"}) == said
    assert not (tmp_path / "home" / "flash").exists()  # nothing had to be repacked


def test_the_tokenizer_beside_a_model_comes_along_where_there_is_none(here: Hub, flash: Path, load: Callable[..., Any]) -> None:
    model, tokenizer = load(flash), AutoTokenizer.from_pretrained(flash)
    model.push_to_hub("me/x")
    assert pushed(here, "me/x").keys() == sha256s(flash).keys()
    tokenizer.model_max_length = 77
    tokenizer.push_to_hub("me/y")
    mine = here.files("me/y")["tokenizer_config.json"]
    model.push_to_hub("me/y")
    assert here.files("me/y")["tokenizer_config.json"] == mine != here.files("me/x")["tokenizer_config.json"]


@pytest.mark.parametrize("plain", [True, False])
def test_pushing_a_model_leaves_nothing_behind(
    here: Hub, opt: Make, small: Path, tmp_path: Path, plain: bool, load: Callable[..., Any]
) -> None:
    """Neither in the flash cache nor beside the folder it was loaded from."""
    source = shutil.copytree(opt() if plain else small, tmp_path / "store")
    config = FlashOffloadConfig(cache_dir=tmp_path / "cache")
    model = load(source, quantization_config=config)
    before = sha256s(tmp_path)
    model.push_to_hub("me/x")
    assert sha256s(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == ({"store", "cache"} if plain else {"store"})


def test_save_pretrained_can_push(here: Hub, small: Path, tmp_path: Path, load: Callable[..., Any]) -> None:
    model = load(small)
    model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="me/saved", commit_message="first")
    model.save_pretrained(tmp_path / "named-after-the-folder", push_to_hub=True)
    assert pushed(here, "me/saved") == sha256s(tmp_path / "saved") == pushed(here, "me/named-after-the-folder")


def test_the_command_pushes_a_folder(hub: Hub, small: Path, tmp_path: Path) -> None:
    printed = hub.run(tmp_path, "-m", "hf_flash", "push", str(small), "me/x", "--private")
    assert printed.strip() == f"{hub.url}/me/x/commit/{hub.repos['me/x'].branches['main']}"
    assert pushed(hub, "me/x") == sha256s(small)
    assert hub.repos["me/x"].private


def test_pushing_again_uploads_nothing_and_makes_no_commit(here: Hub, small: Path) -> None:
    first = hf_flash.push(small, "me/x")
    here.requests.clear()
    assert hf_flash.push(small, "me/x").oid == first.oid
    assert not any(request.startswith("PUT") for request in here.requests)


def test_temporary_and_hidden_files_are_not_pushed(here: Hub, small: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(small, tmp_path / "model")
    (folder / ".secret").write_text("")
    (folder / "config.json.tmp").write_text("")
    (folder / "NOTES.txt").write_text("kept")
    hf_flash.push(folder, "me/x")
    assert set(pushed(here, "me/x")) == {path.name for path in small.iterdir()} | {"NOTES.txt"}


def test_a_pull_request_leaves_the_branch_alone(here: Hub, small: Path) -> None:
    info = hf_flash.push(small, "me/x", create_pr=True)
    assert pushed(here, "me/x") == {}
    assert pushed(here, "me/x", info.pr_revision) == sha256s(small)


def test_the_given_token_is_used(here: Hub, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    hf_flash.push(small, "me/x", token=TOKEN)
    assert pushed(here, "me/x") == sha256s(small)


def test_a_plain_folder_is_refused_before_the_hub_is_asked(here: Hub, tiny_opt: Path, tmp_path: Path) -> None:
    for wrong in (tiny_opt, tmp_path / "missing", tiny_opt / "config.json"):
        with pytest.raises(hf_flash.StoreMissingError):
            hf_flash.push(wrong, "me/x")
    assert here.requests == []


def test_a_folder_with_a_layer_missing_is_refused(here: Hub, small: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(small, tmp_path / "model")
    (folder / "flash-layer-00001.safetensors").unlink()
    with pytest.raises(hf_flash.StoreMissingError):
        hf_flash.push(folder, "me/x")
    assert here.requests == []


# --- plain checkpoints on the Hub -------------------------------------------------------------------------------------


def test_plain_checkpoints_are_repacked_by_name_and_commit(hub: Hub, opt: Make, tmp_path: Path) -> None:
    """Safetensors and pickles; the newest commit, an older one; again, without the Hub."""
    old, new, pickled = opt(), opt(seed=1), tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(old / "config.json", pickled)
    torch.save(AutoModelForCausalLM.from_pretrained(old).state_dict(), pickled / "pytorch_model.bin")
    first, second = hub.publish("me/plain", old), hub.publish("me/plain", new)
    third = hub.publish("me/pickled", pickled)
    home, targets = tmp_path / "home", [str(tmp_path / name) for name in ("a", "b", "c")]
    wishes = [
        {"source": "me/plain", "plain": True},
        {"source": "me/plain", "plain": True, "revision": first},
        {"source": "me/pickled", "plain": True},
    ]
    said = [tokens(new), tokens(old), tokens(old)]
    assert said[0] != said[1]
    repacks = [
        {"source": "me/plain", "target": targets[0]},
        {"source": "me/plain", "target": targets[1], "revision": first},
        {"source": "me/pickled", "target": targets[2]},
    ]

    assert elsewhere(hub, home, *wishes, *repacks) == [*said, *targets]
    entries = {path: path.stat().st_mtime_ns for path in (home / "flash").iterdir() if not path.name.startswith(".")}
    assert sorted(path.name.rpartition("--")[0] for path in entries) == sorted(
        [f"me--plain--{first[:12]}", f"me--plain--{second[:12]}", f"me--pickled--{third[:12]}"]
    )
    for target, source, commit in zip(targets, (new, old, old), (second, first, third), strict=True):
        assert FlashStore.open_folder(target).metadata["revision"] == commit
        restored = load_file(hf_flash.restore(target, f"{target}-restored") / "model.safetensors")
        wanted = load_file(source / "model.safetensors")
        assert all(torch.equal(restored[name], tensor) for name, tensor in wanted.items())

    hub.requests.clear()
    again = tmp_path / "again"
    offline = elsewhere(hub, home, *wishes, {"source": "me/plain", "target": str(again)}, HF_HUB_OFFLINE="1")
    assert offline == [*said, str(again)]
    assert {path: path.stat().st_mtime_ns for path in entries} == entries
    assert hub.requests == []


# --- what is not right yet --------------------------------------------------------------------------------------------


def test_pushing_over_a_plain_checkpoint_replaces_its_weights(here: Hub, opt: Make, small: Path) -> None:
    here.publish("me/x", opt())
    hf_flash.push(small, "me/x")
    assert pushed(here, "me/x") == sha256s(small)


def test_a_branch_that_is_not_there_is_made(here: Hub, small: Path) -> None:
    hf_flash.push(small, "me/x", revision="dev")
    assert pushed(here, "me/x", "dev") == sha256s(small)
    assert pushed(here, "me/x") == {}


def test_an_entry_of_the_flash_cache_is_refused(here: Hub, opt: Make, tmp_path: Path, load: Callable[..., Any]) -> None:
    load(opt(), quantization_config=FlashOffloadConfig(cache_dir=tmp_path / "cache"))
    (entry,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    with pytest.raises(hf_flash.StoreError):
        hf_flash.push(entry, "me/x")
    assert here.requests == []


def test_push_to_hub_takes_the_arguments_of_transformers(here: Hub, small: Path, load: Callable[..., Any]) -> None:
    model = load(small)
    model.push_to_hub("me/x", commit_message="one", commit_description="two", max_shard_size="1GB")


def test_only_the_main_process_pushes(here: Hub, small: Path, tmp_path: Path, load: Callable[..., Any]) -> None:
    model = load(small)
    model.save_pretrained(tmp_path / "x", push_to_hub=True, is_main_process=False)
    assert here.requests == []


def test_the_command_says_what_the_hub_refused(
    here: Hub, small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["repack", "me/nothing", str(tmp_path / "target")]) == 1
    assert main(["push", str(small), "me/not a name"]) == 1
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert main(["push", str(small), "me/x"]) == 1
    assert "401" in capsys.readouterr().err
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # does not listen
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        assert main(["push", str(small), "me/x"]) == 1
    assert "cannot be reached" in capsys.readouterr().err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    assert main(["push", str(small), "me/x"]) == 1
    assert "offline" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["target", "source"])
def test_what_cannot_be_repacked_is_not_downloaded(here: Hub, opt: Make, small: Path, tmp_path: Path, wrong: str) -> None:
    here.publish("me/x", small if wrong == "source" else opt())
    with pytest.raises((hf_flash.TargetExistsError, hf_flash.UnsupportedModelError)):
        hf_flash.repack("me/x", opt() if wrong == "target" else tmp_path / "target", cache_dir=str(tmp_path / "hub"))
    assert not [request for request in here.requests if request.startswith("GET") and request.endswith(".safetensors")]
