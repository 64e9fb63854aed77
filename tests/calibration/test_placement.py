"""Placement: neighbours on flash are what is active together; fewer reads, and nothing else changes, by a single bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hf_flash
from hf_flash import ConfigError, DiskSpaceError, FlashOffloadConfig, StoreFormatError
from hf_flash.base.tables import printed
from hf_flash.budget.divide import stored_report
from hf_flash.calibration import job, placement, publishing, work_folder
from hf_flash.calibration.activity import Activations, pack_bits
from hf_flash.calibration.placement import chain, count_reads, place_neurons
from hf_flash.commands import calibration_table
from hf_flash.commands import main as cli
from hf_flash.compute.arithmetic import block_rows
from hf_flash.reading.reader import open_reader
from hf_flash.runtime import attach
from hf_flash.store.layout import FlashStore
from hf_flash.store.writer import place_layer
from tests.conftest import make_opt

INDEX = "model.safetensors.index.json"
QUICK: dict[str, Any] = {"samples": 64, "context": 32, "rank": 8, "epochs": 1}
PROMPT = torch.tensor([[2, 11, 7, 30, 45, 7]])
D_FF = 128


def data(active: torch.Tensor, held_out: int) -> Activations:
    """Activations of `active`, bool [tokens, d_ff]."""
    return Activations(torch.zeros(len(active), 4), pack_bits(active), active.shape[1], held_out)


def couples(tokens: int, d_ff: int, seed: int = 0) -> torch.Tensor:
    """Neurons that are active in pairs: 2 i with 2 i + 1, shuffled within every block."""
    random = torch.Generator().manual_seed(seed)
    active = (torch.rand(tokens, d_ff // 2, generator=random) < 0.05).repeat_interleave(2, dim=1)
    step = block_rows(d_ff, tokens=2)
    order = torch.cat([start + torch.randperm(step, generator=random) for start in range(0, d_ff, step)])
    return active[:, order]


# --- which order ---------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 80), levels=st.integers(1, 50), seed=st.integers(0, 1 << 16))
def test_a_chain_goes_through_every_neuron_once_and_takes_the_strongest_link(count: int, levels: int, seed: int) -> None:
    half = np.random.default_rng(seed).integers(0, levels, (count, count)).astype(np.float32)
    weight = np.triu(half, 1) + np.triu(half, 1).T
    order = chain(weight)
    assert sorted(order.tolist()) == list(range(count))
    if count > 1:
        assert weight[order[:-1], order[1:]].max() == weight.max()


def test_neurons_without_links_stay_in_order() -> None:
    assert chain(np.zeros((70, 70), dtype=np.float32)).tolist() == list(range(70))


@pytest.mark.parametrize("d_ff", [64, 512])
def test_neurons_move_within_their_block_and_next_to_their_partner(d_ff: int) -> None:
    active, step = couples(600, d_ff), block_rows(d_ff, tokens=2)
    place = place_neurons(data(active, 100))
    assert (place.dtype, sorted(place.tolist())) == (np.int32, list(range(d_ff)))
    assert (place // step).tolist() == (np.arange(d_ff) // step).tolist()
    order = np.argsort(place)
    assert torch.equal(active[:500, order[::2]], active[:500, order[1::2]])


def test_reads_are_counted_as_the_window_and_the_reader_do_it() -> None:
    active = couples(2000, 512)
    place = place_neurons(data(active, 1000))
    found = count_reads(data(active, 1000), place)
    assert found.saves_enough
    assert found.after < 0.6 * found.before <= found.missing
    same = count_reads(data(active, 1000), np.arange(512, dtype=np.int32))
    assert (same.before, same.after, same.saves_enough) == (found.before, found.before, False)


@pytest.mark.parametrize("active", [torch.zeros, torch.ones])
def test_silent_and_full_layers(active: Any) -> None:
    known = data(active(300, 100).bool(), 100)
    assert place_neurons(known).tolist() == list(range(100))
    assert not count_reads(known, place_neurons(known)).saves_enough


# --- a folder ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(4, 96, (6000,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def coupled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain OPT whose neurons 16 to 31 are active when 0 to 15 are. Do not write to it."""
    folder = make_opt(tmp_path_factory.mktemp("coupled") / "plain")
    state = load_file(folder / "model.safetensors")
    for name in (name for name in state if ".fc1." in name):
        state[name][16:32] = state[name][:16]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def unplaced(coupled: Path, tokens: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibrated without placement. Do not write to it."""
    folder = hf_flash.repack(coupled, tmp_path_factory.mktemp("unplaced") / "flash")
    hf_flash.calibrate(folder, tokens, **QUICK, placement=False)
    return folder


@pytest.fixture(scope="module")
def placed(coupled: Path, tokens: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibrated with placement. Do not write to it."""
    folder = hf_flash.repack(coupled, tmp_path_factory.mktemp("placed") / "flash")
    hf_flash.calibrate(folder, tokens, **QUICK)
    return folder


@pytest.fixture
def copy(placed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(placed, tmp_path / "copy"))


def run(folder: Path, **config: Any) -> tuple[torch.Tensor, list[int], dict[str, Any]]:
    """Logits of a prompt, tokens that follow it, and what was counted."""
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=FlashOffloadConfig(**config))
    with torch.no_grad():
        logits = model(PROMPT).logits
    found = model.generate(PROMPT, max_new_tokens=24, min_new_tokens=24, do_sample=False)[0].tolist()
    counted = hf_flash.stats(model).to_dict()
    hf_flash.close(model)
    return logits, found, counted


def test_every_layer_is_placed_and_safetensors_reads_it(coupled: Path, placed: Path) -> None:
    store, listed = FlashStore.open_folder(placed), json.loads((placed / INDEX).read_text())["weight_map"]
    plain = load_file(coupled / "model.safetensors")
    for layer in store.layers:
        assert layer.place is not None
        with safe_open(layer.path, "pt") as file:
            assert dict.fromkeys(file.keys(), layer.path.name).items() <= listed.items()
            place = file.get_tensor(f"{layer.prefix}.place")
            assert torch.equal(file.get_tensor(layer.key)[place.long(), : layer.d_model], plain[layer.name("up")])
            assert file.metadata()["hf_flash.format_version"] == "2"
        assert torch.equal(layer.part("up")[:], plain[layer.name("up")])
        assert torch.equal(layer.part("down")[7:9], plain[layer.name("down")].T[7:9])
    assert store.check() == []


def test_files_without_places_are_as_they_were(unplaced: Path) -> None:
    for layer in FlashStore.open_folder(unplaced).layers:
        with safe_open(layer.path, "pt") as file:
            assert (list(file.keys()), file.metadata()["hf_flash.format_version"]) == ([layer.key], "1")


def test_all_else_that_calibration_writes_is_the_same(unplaced: Path, placed: Path) -> None:
    assert (placed / "config.json").read_bytes() == (unplaced / "config.json").read_bytes()
    for name in ("flash-predictor-lowrank.safetensors", "flash-predictor-int4-g64.safetensors"):
        assert (placed / name).read_bytes() == (unplaced / name).read_bytes()
    before, after = (load_file(folder / "flash-calibration.safetensors") for folder in (unplaced, placed))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("reader", ["mmap", "direct"])
@pytest.mark.parametrize("predictor", ["quantized", "lowrank", "none"])
def test_the_answer_is_the_same_bit_for_bit(unplaced: Path, placed: Path, predictor: str, reader: str) -> None:
    config = {"predictor": predictor, "reader": reader, "window": 1}
    model = AutoModelForCausalLM.from_pretrained(placed, quantization_config=FlashOffloadConfig(**config))
    config["memory_budget"] = hf_flash.stats(model).minimum_bytes + 3 * 40 * 256  # room for 40 neurons of 128
    hf_flash.close(model)
    logits, answer, before = run(unplaced, **config)
    placed_logits, placed_answer, after = run(placed, **config)
    assert torch.equal(logits, placed_logits)
    assert answer == placed_answer
    for name in ("hits", "missing_bytes", "selected"):
        assert after["counters"][name] == before["counters"][name]
    if predictor == "quantized":
        assert after["counters"]["reads"] < 0.95 * before["counters"]["reads"]


def test_a_placed_folder_is_restored_bit_for_bit(coupled: Path, placed: Path, tmp_path: Path) -> None:
    before = load_file(coupled / "model.safetensors")
    after = load_file(hf_flash.restore(placed, tmp_path / "plain") / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)


def test_saving_takes_the_places_along(placed: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(placed).save_pretrained(tmp_path / "saved")
    for path in placed.glob("flash-*"):
        assert (tmp_path / "saved" / path.name).read_bytes() == path.read_bytes()
    assert torch.equal(run(tmp_path / "saved")[0], run(placed)[0])


def test_what_was_placed_is_not_written_again(copy: Path, tokens: torch.Tensor) -> None:
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in copy.glob("flash-layer-*")}
    again = hf_flash.calibrate(copy, tokens, **QUICK)
    assert all(layer["reads"]["worth"] for layer in again["layers"])
    assert before == {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in copy.glob("flash-layer-*")}


def test_layers_that_gain_little_are_left_alone(
    coupled: Path, tokens: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "_LEAST_SAVED", 0.99)
    folder = hf_flash.repack(coupled, tmp_path / "flash")
    before = {path.name: path.read_bytes() for path in folder.glob("flash-layer-*")}
    report = hf_flash.calibrate(folder, tokens, **QUICK)
    assert before == {path.name: path.read_bytes() for path in folder.glob("flash-layer-*")}
    assert calibration_table.describe_placement(report) == "none"


def test_a_layer_is_placed_again_from_where_it_lies(copy: Path) -> None:
    ups = [layer.part("up")[:].clone() for layer in FlashStore.open_folder(copy).layers]
    place = np.random.default_rng(3).permutation(D_FF).astype(np.int32)
    place_layer(FlashStore.open_folder(copy).layers[1], place)
    again = FlashStore.open_folder(copy)
    assert np.array_equal(again.layers[1].place, place)  # type: ignore[arg-type]
    assert all(torch.equal(layer.part("up")[:], up) for layer, up in zip(again.layers, ups, strict=True))


def test_inspect_and_the_command_say_what_it_brings(placed: Path, unplaced: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(placed), "--check"]) == 0
    shown = capsys.readouterr().out
    for part in ("3 of 3 layers; ", "neurons a read instead of", "All checksums are right"):
        assert part in shown
    assert cli.main(["inspect", str(unplaced)]) == 0
    assert "none: neurons lie in the order of their ids" in capsys.readouterr().out
    report = stored_report(FlashStore.open_folder(placed))
    assert report is not None
    assert "Neurons placed: 3 of 3 layers" in printed(calibration_table.describe(report))


# --- what can go wrong -----------------------------------------------------------------------------------------------


def test_a_damaged_layer_gets_no_new_checksum(copy: Path) -> None:
    layer = FlashStore.open_folder(copy).layers[1]
    content = bytearray(layer.path.read_bytes())
    content[layer.offset + 5] ^= 1
    layer.path.write_bytes(content)
    with pytest.raises(StoreFormatError, match="the layer file is damaged") as caught:
        place_layer(layer, np.arange(D_FF, dtype=np.int32))
    assert all(part in str(caught.value) for part in (str(layer.path), "expected: CRC-32", "got", "to do"))
    assert layer.path.read_bytes() == content


def test_a_full_disk_leaves_the_folder_whole_and_the_work_done(
    coupled: Path, placed: Path, tokens: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = hf_flash.repack(coupled, tmp_path / "flash")
    real, asked = publishing.check_room, []

    def full(where: Path, needed: int) -> None:
        asked.append(needed)
        if len(asked) == 3:  # the second layer
            raise DiskSpaceError("not enough room on the disk")
        real(where, needed)

    with monkeypatch.context() as patch:
        patch.setattr(work_folder, "check_room", full)
        patch.setattr(publishing, "check_room", full)
        with pytest.raises(DiskSpaceError):
            hf_flash.calibrate(folder, tokens, **QUICK)
    store = FlashStore.open_folder(folder)
    assert [layer.place is not None for layer in store.layers] == [True, False, False]
    assert store.check() == []
    assert torch.equal(run(folder)[0], run(hf_flash.repack(coupled, tmp_path / "fresh"))[0])
    with monkeypatch.context() as patch:
        patch.setattr(job, "make_layer_result", None)  # must not be called again
        hf_flash.calibrate(folder, tokens, **QUICK)
    assert all(path.read_bytes() == (placed / path.name).read_bytes() for path in folder.glob("flash-layer-*"))


def test_a_store_that_changes_while_it_is_loaded_is_not_read(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(store: FlashStore, *args: Any) -> Any:
        place_layer(store.layers[2], np.arange(D_FF, dtype=np.int32))
        return open_reader(store, *args)

    monkeypatch.setattr(attach, "open_reader", late)
    with pytest.raises(StoreFormatError, match="changed while it was being opened") as caught:
        run(copy)
    assert all(part in str(caught.value) for part in ("flash-layer-00002", "to do: load the model again"))


def test_placement_is_true_or_false(copy: Path, tokens: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match="placement is not valid"):
        hf_flash.calibrate(copy, tokens, **QUICK, placement="yes")  # type: ignore[arg-type]
