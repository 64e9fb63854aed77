"""Contract C6: docs/store-format.md is what is on disk. Its programs read real stores, its tables name what is in them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hf_flash
from hf_flash import FlashOffloadConfig, StoreError
from hf_flash.predictors.base import PredictorFormat
from hf_flash.predictors.lowrank import LowRankFormat
from hf_flash.predictors.quantized import QuantizedFormat, quantized_formats
from hf_flash.store.layer_file import LayerStore
from hf_flash.store.layout import FlashStore
from hf_flash.store.safetensors_files import read_header
from hf_flash.store.unit import Part
from hf_flash.store.writer import place_layer, unbundle, write_layer, write_safetensors
from tests.conftest import ROOT, make_opt
from tests.docs import blocks, tables

PAGE = ROOT / "docs" / "store-format.md"
PROGRAM: dict[str, Any] = {}
for block in blocks(PAGE, "python"):
    exec(block, PROGRAM)


# --- stores of every kind -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain OPT whose neurons 16 to 31 are active when 0 to 15 are, so that placing them pays. bfloat16, in shards."""
    folder = make_opt(tmp_path_factory.mktemp("coupled") / "plain", dtype=torch.bfloat16, shards="20KB")
    for path in folder.glob("*.safetensors"):
        state = {name: tensor.clone() for name, tensor in load_file(path).items()}
        for name in (name for name in state if ".fc1." in name):
            state[name][16:32] = state[name][:16]
        save_file(state, path, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def fresh(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Repacked, with an 8-bit predictor. Do not write to it."""
    return hf_flash.repack(plain, tmp_path_factory.mktemp("fresh") / "flash", predictor_bits=8)


@pytest.fixture(scope="module")
def calibrated(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Repacked, calibrated, all its layers placed. Do not write to it."""
    folder = hf_flash.repack(plain, tmp_path_factory.mktemp("calibrated") / "flash")
    tokens = torch.randint(4, 96, (6000,), generator=torch.Generator().manual_seed(0))
    hf_flash.calibrate(folder, tokens, samples=64, context=32, rank=8, epochs=1)
    assert all(layer.place is not None for layer in FlashStore.open_folder(folder).layers)
    return folder


@pytest.fixture(scope="module")
def store(request: pytest.FixtureRequest) -> FlashStore:
    return FlashStore.open_folder(request.getfixturevalue(request.param))


def opened(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint folder."""
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


BOTH = pytest.mark.parametrize("store", ["fresh", "calibrated"], indirect=True)


# --- the programs -------------------------------------------------------------------------------------------------------


@BOTH
def test_the_safetensors_library_alone_gets_the_plain_checkpoint_back(plain: Path, store: FlashStore) -> None:
    found, wanted = PROGRAM["read_plain"](store.layers[0].path.parent), opened(plain)
    assert found.keys() == wanted.keys()
    assert all(found[name].dtype == wanted[name].dtype and torch.equal(found[name], wanted[name]) for name in wanted)


def test_it_gets_the_real_model_back(tiny_opt: Path, tmp_path: Path) -> None:
    found = PROGRAM["read_plain"](hf_flash.repack(tiny_opt, tmp_path / "flash"))
    wanted = opened(tiny_opt)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@BOTH
def test_no_library_at_all_gets_one_neuron(plain: Path, store: FlashStore) -> None:
    wanted = opened(plain)
    for layer in store.layers:
        for neuron in (0, 17, layer.d_ff - 1):
            found = torch.frombuffer(bytearray(PROGRAM["read_bundle"](layer.path, neuron)), dtype=layer.dtype)
            assert torch.equal(found[: layer.d_model], wanted[layer.name("up")][neuron])
            assert torch.equal(found[layer.d_model :], wanted[layer.name("down")][:, neuron])


LISTS = {  # of parts, and the version that describes them
    "3": (Part("gate", "row"), Part("up", "row"), Part("down", "column")),
    "4": (Part("gate", "first_rows"), Part("up", "last_rows"), Part("down", "column")),
}


@pytest.mark.parametrize("placed", [False, True])
@pytest.mark.parametrize("version", LISTS)
def test_both_read_a_file_with_a_list_of_parts(tmp_path: Path, placed: bool, version: str) -> None:
    """Where places may be there and may not."""
    d_ff, d_model, path, parts = 80, 24, tmp_path / "flash-layer-00000.safetensors", LISTS[version]
    names = [f"layers.0.{'gate_up' if part.is_half else part.role}.weight" for part in parts]
    of_name = {
        name: torch.randn(part.plain_shape(d_ff, d_model), generator=torch.Generator().manual_seed(1))
        for name, part in zip(names, parts, strict=True)
    }
    matrices = [of_name[name] for name in names]
    origin = {"source": "s", "revision": "", "fingerprint": "f"}
    write_layer(path, 0, 1, "layers.0.gate.bundles", parts, names, matrices, origin)
    if placed:
        (layer,) = FlashStore.open([path]).layers
        place_layer(layer, torch.randperm(d_ff, generator=torch.Generator().manual_seed(2)).int().numpy())
    (layer,) = FlashStore.open([path]).layers
    assert (layer.place is not None) == placed
    assert read_header(path)[1]["hf_flash.format_version"] == version
    assert list(layer.plain_specs) == list(of_name)
    assert all(torch.equal(*pair) for pair in zip(unbundle(layer), of_name.values(), strict=True))
    assert in_file(path, layer.prefix) == layer_tensors(layer, "F32")
    for neuron in (0, 17, d_ff - 1):
        found = torch.frombuffer(bytearray(PROGRAM["read_bundle"](path, neuron)), dtype=torch.float32)
        rows = [part.by_unit(matrix)[neuron] for part, matrix in zip(parts, matrices, strict=True)]
        assert torch.equal(found, torch.cat(rows))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"layers.0.gate.bundles": path.name}}))
    plain = PROGRAM["read_plain"](tmp_path)
    assert plain.keys() == set(names)
    assert all(torch.equal(plain[name], matrix) for name, matrix in zip(names, matrices, strict=True))


@pytest.mark.parametrize("damage", [
    {"parts": "gate:row,up:last_rows,down:column"}, {"parts": "gate:last_rows,up:first_rows,down:column"},
    {"parts": "gate:first_rows,up:first_rows,down:column"}, {"format_version": "3"}, {"up": "another"}, {"down": "gate_up"},
    {"parts": "gate:row,up:row,down:column"},
])  # fmt: skip
def test_halves_that_are_none_are_refused(tmp_path: Path, damage: dict[str, str]) -> None:
    path, parts = tmp_path / "flash-layer-00000.safetensors", LISTS["4"]
    shared, down = torch.zeros(2 * 80, 24), torch.zeros(24, 80)
    origin = {"source": "s", "revision": "", "fingerprint": "f"}
    write_layer(path, 0, 1, "g.bundles", parts, ("gate_up", "gate_up", "down"), (shared, shared, down), origin)
    metadata = read_header(path)[1] | {f"hf_flash.{key}": value for key, value in damage.items()}
    tensors = load_file(path)
    write_safetensors(
        path, {name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()}, tensors.values(), metadata
    )
    with pytest.raises(hf_flash.StoreFormatError, match=str(path)):
        FlashStore.open([path])


@pytest.mark.parametrize("placed", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 40, 1000])
def test_a_matrix_in_a_file_comes_whole_in_pieces(tmp_path: Path, placed: bool, rows: int) -> None:
    d_ff, d_model, path = 41, 24, tmp_path / "flash-layer-00000.safetensors"
    up, down = torch.randn(2, d_ff, d_model, generator=torch.Generator().manual_seed(1)).unbind()
    origin = {"source": "s", "revision": "", "fingerprint": "f"}
    write_layer(path, 0, 1, "0.fc1.bundles", (Part("up", "row"), Part("down", "column")), ("up", "down"), (up, down.T), origin)
    if placed:
        place_layer(FlashStore.open([path]).layers[0], torch.arange(d_ff).flip(0).int().numpy())
    (layer,) = FlashStore.open([path]).layers
    for part, wanted in ((layer.part("up"), up), (layer.part("down"), down), (layer.rows(), torch.cat([up, down], dim=1))):
        pieces = [piece.clone() for piece in part.pieces(rows)]
        assert all(len(piece) == rows for piece in pieces[:-1])
        assert torch.equal(torch.cat(pieces), wanted)
        assert torch.equal(part[:], wanted)


def test_a_newer_format_is_refused_by_both(fresh: Path, tmp_path: Path) -> None:
    for path in copied(fresh, tmp_path).glob("*.safetensors"):
        path.write_bytes(path.read_bytes().replace(b'"hf_flash.format_version":"1"', b'"hf_flash.format_version":"9"'))
    with pytest.raises(ValueError, match="of a newer format"):
        PROGRAM["read_plain"](tmp_path)
    with pytest.raises(ValueError, match="of a newer format"):
        PROGRAM["read_bundle"](next(tmp_path.glob("flash-layer-*")), 0)
    with pytest.raises(hf_flash.StoreVersionError):
        FlashStore.open_folder(tmp_path)


# --- the tables ---------------------------------------------------------------------------------------------------------


def shapes(section: str, **sizes: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> dtype and shape of the tensors in one table of the page; `section`: how its first name begins."""
    (rows,) = [rows for head, rows in tables(PAGE) if head[0] == "tensor" and re.match(section, f"{rows[0][0]} {rows[0][1]}")]
    found = {}
    for name, dtype, shape, *_ in rows:
        dims = tuple(int(eval(size, {"any": -1}, sizes)) for size in shape[1:-1].split(","))
        found[name.strip("`")] = dtype.split()[0].rstrip(","), dims
    return found


def in_file(path: Path, prefix: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The same of a file, for what begins with `prefix`, which becomes `P`."""
    with safe_open(path, "pt") as file:
        parts = {name: file.get_slice(name) for name in file.keys() if name.startswith(prefix)}
        return {name.replace(prefix, "P"): (part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}


def layer_tensors(layer: LayerStore, dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What the table says that a layer's file has."""
    found = shapes("`P.bundles`", d_ff=layer.d_ff, d_model=layer.d_model, parts=len(layer.unit.parts))
    found["P.bundles"] = dtype, found["P.bundles"][1]
    if layer.place is None:
        del found["P.place"]
    return found


def test_layers_have_the_tensors_of_the_table(fresh: Path, calibrated: Path) -> None:
    for folder in (fresh, calibrated):
        for layer in FlashStore.open_folder(folder).layers:
            assert in_file(layer.path, layer.prefix) == layer_tensors(layer, "BF16")


@pytest.mark.parametrize("kind", ["int4-g64", "int8", "lowrank"])
def test_predictors_have_the_tensors_of_the_table(fresh: Path, calibrated: Path, kind: str) -> None:
    store = FlashStore.open_folder(fresh if kind == "int8" else calibrated)
    first = {"int4-g64": "`P.predictor.codes` U8", "int8": "`P.predictor.codes` I8", "lowrank": "`P.predictor.a_codes`"}[kind]
    for layer in store.layers:
        groups = layer.d_model // math.gcd(64, layer.d_model)
        sizes = {"d_ff": layer.d_ff, "d_model": layer.d_model, "groups": groups, "rank": 8}
        assert in_file(store.predictors[kind], layer.prefix) == shapes(first, **sizes)


def test_a_calibration_has_the_tensors_of_the_table(calibrated: Path) -> None:
    store = FlashStore.open_folder(calibrated)
    assert store.calibration is not None
    for layer in store.layers:
        wanted = shapes("`P.calibration.V.shift`", d_ff=layer.d_ff, K=8)
        wanted = {name.replace(".V.", ".int4-g64."): spec for name, spec in wanted.items()}
        text = wanted.pop("calibration.text")
        assert in_file(store.calibration, layer.prefix) == wanted
    assert text[0] == in_file(store.calibration, "calibration.")["Ptext"][0]


@BOTH
def test_metadata_has_the_keys_of_the_table(store: FlashStore) -> None:
    (rows,) = [rows for head, rows in tables(PAGE) if head[0] == "key"]
    for path in [*store.files, *store.others]:
        with safe_open(path, "pt") as file:
            keys = set(file.metadata())
        name = "rest" if path in store.others else path.name.split("-")[1].removesuffix(".safetensors")
        wanted = {f"hf_flash.{key.strip('`')}" for key, where, _ in rows if where == "all" or name in where.split(", ")}
        assert keys == wanted | {"format"}


@BOTH
def test_what_the_page_says_of_files_is_so(store: FlashStore) -> None:
    folder = store.layers[0].path.parent
    files = [*store.files, *store.others]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in files}
    assert index["metadata"]["total_size"] == sum(path.stat().st_size for path in files)
    for path in files:
        length = int.from_bytes(path.read_bytes()[:8], "little")
        assert (8 + length) % 4096 == 0
    (rest,) = [load_file(path) for path in store.others]
    empty = {name: tuple(tensor.shape) for name, tensor in rest.items() if not tensor.numel()}
    tombstones = {name: shape for name, shape in empty.items() if shape != (0,)}
    ups = {layer.name("up"): (0, layer.d_model) for layer in store.layers}
    assert len(empty) - len(tombstones) <= 1
    assert tombstones == ups | {layer.name("down"): (layer.d_model, 0) for layer in store.layers}
    named = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert named.keys() == {"quant_method", "format_version", "predictor", "predictor_bits", "predictor_group_size"}


# --- the formulas -------------------------------------------------------------------------------------------------------


def formulas(store: FlashStore, fmt: PredictorFormat, layer: int, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Scores as the page says, [tokens, d_ff], from nothing but the files."""
    prefix = f"{store.layers[layer].prefix}."
    tensors = {name.removeprefix(prefix): t for name, t in load_file(store.predictors[fmt.variant]).items() if prefix in name}
    own = {name.removeprefix("predictor."): tensor.float() for name, tensor in tensors.items()}
    if fmt.variant == "lowrank":
        return (x @ (own["a_codes"] * own["a_scales"]).T) @ (own["b_codes"] * own["b_scales"]).T + own["offset"]
    if fmt.variant == "int8":
        margin = 3.0 * own["error"] * x.norm(dim=1, keepdim=True) / x.shape[1] ** 0.5
        return x @ (own["codes"] * own["scales"]).T + bias + margin
    q = PROGRAM["int4_rows"](tensors["predictor.codes"], tensors["predictor.scales"], tensors["predictor.zeros"])
    assert store.calibration is not None
    found = load_file(store.calibration)
    shift, spread, margin = (found[f"{prefix}calibration.{fmt.variant}.{name}"] for name in ("shift", "spread", "margin"))
    return x @ q.T + bias - shift + margin * spread


@pytest.mark.parametrize("kind", ["int4-g64", "int8", "lowrank"])
def test_the_formulas_name_the_neurons_that_the_product_names(plain: Path, fresh: Path, calibrated: Path, kind: str) -> None:
    store = FlashStore.open_folder(fresh if kind == "int8" else calibrated)
    fmt: PredictorFormat | None = LowRankFormat.of(store) if kind == "lowrank" else next(iter(quantized_formats(store)))
    assert fmt is not None
    assert fmt.variant == kind
    x = torch.randn(64, store.layers[0].d_model, generator=torch.Generator().manual_seed(1)).bfloat16()
    for layer in store.layers:
        bias = opened(plain)[layer.name("up").replace("weight", "bias")]
        scores = formulas(store, fmt, layer.index, x.float(), bias.float())
        named = fmt.load(store, layer, bias).select(x)
        clear = scores.abs() > 0.05 * scores.abs().mean()  # nearer to zero rounding may decide
        assert named is not None
        assert clear.float().mean() > 0.9
        assert torch.equal(named[clear], scores[clear] > 0)
        assert 0.01 < named.float().mean() < 0.99


def test_int4_without_a_calibration_takes_the_assumed_margin(fresh: Path, plain: Path, tmp_path: Path) -> None:
    store = FlashStore.open_folder(hf_flash.repack(plain, tmp_path / "flash"))
    layer, fmt = store.layers[0], QuantizedFormat(4, 64)
    own = {n.rpartition(".")[2]: t for n, t in load_file(store.predictors["int4-g64"]).items() if layer.prefix in n}
    bias = opened(plain)[layer.name("up").replace("weight", "bias")]
    x = torch.randn(64, layer.d_model, generator=torch.Generator().manual_seed(1)).bfloat16()
    q, length = PROGRAM["int4_rows"](own["codes"], own["scales"], own["zeros"]), x.float().norm(dim=1, keepdim=True)
    up = opened(plain)[layer.name("up")].float()
    torch.testing.assert_close((q - up).norm(dim=1), own["error"], rtol=1e-2, atol=1e-4)
    scores = x.float() @ q.T + bias.float() + 1.5 * own["error"] * length / layer.d_model**0.5
    clear = scores.abs() > 0.05 * scores.abs().mean()
    named = fmt.load(store, layer, bias).select(x)
    assert torch.equal(named[clear], scores[clear] > 0)


# --- what a reader must refuse ------------------------------------------------------------------------------------------


Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]


def again(path: Path, change: Change) -> None:
    """Write a file with other metadata or tensors, its header padded."""
    with safe_open(path, "pt") as file:
        meta = dict(file.metadata())
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(meta, tensors)
    write_safetensors(path, {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}, tensors.values(), meta)


def meta(**values: str) -> Change:
    """Change values of the metadata."""
    return lambda meta, tensors: meta.update({f"hf_flash.{key}": value for key, value in values.items()})


def tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor], new: str | None = None) -> Change:
    """Change the first tensor whose name ends so, and call it `new`."""

    def changed(meta: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        full = next(full for full in tensors if full.endswith(name))
        everything = {new if new and key == full else key: change(t) if key == full else t for key, t in tensors.items()}
        tensors.clear()
        tensors.update(everything)

    return changed


def copied(folder: Path, target: Path) -> Path:
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def load(folder: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=FlashOffloadConfig(predictor="quantized"))


LAYER, PREDICTOR = "flash-layer-00001", "flash-predictor-int4-g64"
REFUSED: dict[str, tuple[str, Change]] = {
    "no bundles": (LAYER, tensor(".bundles", torch.clone, new="something")),
    "bundles of whole numbers": (LAYER, tensor(".bundles", lambda t: t.view(torch.int16))),
    "bundles of another dtype": (LAYER, tensor(".bundles", torch.Tensor.half)),
    "no checksum": (LAYER, lambda meta, tensors: meta.pop("hf_flash.crc32")),
    "parts in an old version": (LAYER, meta(parts="up:row,down:column")),
    "a new version without parts": (LAYER, meta(format_version="3")),
    "parts that are stored in no known way": (LAYER, meta(format_version="3", parts="up:row,down:diagonal")),
    "a part whose matrix has no name": (LAYER, meta(format_version="3", parts="gate:row,up:row,down:column")),
    "another source": (LAYER, meta(fingerprint="0" * 32)),
    "another number of layers": (LAYER, meta(layers="4")),
    "a calibration of other weights": ("flash-calibration", meta(revision="0" * 40)),
    "a predictor of other sizes": (PREDICTOR, tensor(".codes", lambda t: t[:, 1:].contiguous())),
    "a predictor of other dtypes": (PREDICTOR, tensor(".scales", torch.Tensor.half)),
    "a predictor without a layer": (PREDICTOR, tensor(".error", torch.clone, new="something")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_must_be_refused_is_refused(calibrated: Path, tmp_path: Path, case: str) -> None:
    """Beside the damaged files of tests/whole/test_errors.py."""
    name, change = REFUSED[case]
    again(copied(calibrated, tmp_path) / f"{name}.safetensors", change)
    with pytest.raises(StoreError, match=name):
        load(tmp_path)


def test_files_that_are_only_written_again_are_not(calibrated: Path, tmp_path: Path) -> None:
    for path in [path for path in copied(calibrated, tmp_path).glob("*.safetensors") if path.name.startswith("flash")]:
        again(path, lambda meta, tensors: None)
    load(tmp_path)
