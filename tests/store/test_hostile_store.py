"""Contract C11: files are hostile. Whatever a header, an index or metadata says, the answer is one of our errors, at once."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hf_flash
from hf_flash import FlashOffloadConfig, HfFlashError, StoreFormatError
from hf_flash.budget.divide import stored_report
from hf_flash.commands.main import main
from hf_flash.predictors.choice import formats_in
from hf_flash.store.layout import FlashStore
from hf_flash.store.safetensors_files import DTYPES, read_header
from tests.conftest import make_opt

INDEX = "model.safetensors.index.json"
PREDICTOR = "flash-predictor-int4-g64.safetensors"
REST = "model-00001-of-00001.safetensors"

# --- headers, beside the safetensors library -------------------------------------------------------------------------------

WIDTHS = {name: dtype.itemsize for name, dtype in DTYPES.items()}


@st.composite
def headers(draw: st.DrawFn) -> tuple[str, int]:
    """The text of a valid header, in any order, and how many bytes of data follow."""
    names = draw(st.lists(st.text(max_size=6).filter(lambda name: name != "__metadata__"), max_size=4, unique=True))
    entries, end = [], 0
    for name in names:
        dtype = draw(st.sampled_from(sorted(WIDTHS)))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        start, end = end, end + WIDTHS[dtype] * torch.Size(shape).numel()
        entries.append((name, {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}))
    header: dict[str, Any] = dict(draw(st.permutations(entries)))
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=3))
    text = json.dumps(header, ensure_ascii=draw(st.booleans()), separators=draw(st.sampled_from([(",", ":"), (", ", " : ")])))
    return text + " " * draw(st.integers(0, 9)), end


PIECES = [
    "-1", "1.0", "1e2", "-0", "00", "18446744073709551616", "9" * 30, "NaN", "Infinity", "true", "null", "[]", "{}", '"x"',
    '""', '"a":1,', '"dtype":"F32",', '"shape":[1],', '"\\ud800"', "\\u0000", "\x00", "\ufeff", "²", "[[[[", "]", "{", "}",
    ",", '"', "F8_E4M3", "F32", "I64", "0", "1", "4", "__metadata__", '{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
    " ", "\n",
]  # fmt: skip


@st.composite
def damaged(draw: st.DrawFn) -> tuple[bytes, int]:
    """A valid header with a few pieces put in, left out or twice; the size or the data may not fit it either."""
    text, size = draw(headers())
    for _ in range(draw(st.integers(0, 3))):
        at, length = draw(st.integers(0, len(text))), draw(st.sampled_from([0, 1, 1, 2, 5, 20]))
        new = draw(st.sampled_from(["", text[at : at + length] * 2, *PIECES]))
        text = text[:at] + new + text[at + length :]
    return text.encode("utf-8", "surrogatepass"), max(0, size + draw(st.sampled_from([0, 0, 0, -1, 1, 8])))


def by_the_library(path: Path) -> dict[str, tuple[str, list[int]]] | None:
    """What the safetensors library makes of a file; `None` if it refuses it."""
    try:
        with safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}
            return {name: (part.get_dtype(), part.get_shape()) for name, part in parts.items()}
    except (SafetensorError, ValueError, OverflowError):
        return None


def by_us(path: Path) -> dict[str, tuple[str, list[int]]] | None:
    try:
        names = {dtype: name for name, dtype in DTYPES.items()}
        return {name: (names[dtype], list(shape)) for name, ((dtype, shape), _) in read_header(path)[0].items()}
    except StoreFormatError:
        return None


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "some.safetensors"


def written(path: Path, text: bytes, data: int) -> Path:
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))
    return path


FUZZ = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(headers())
def test_a_valid_header_is_read_as_the_library_reads_it(place: Path, header: tuple[str, int]) -> None:
    text, size = header
    found = by_us(written(place, text.encode(), size))
    assert found is not None
    assert found == by_the_library(place)


@FUZZ
@given(damaged())
def test_what_the_library_refuses_is_refused(place: Path, header: tuple[bytes, int]) -> None:
    """Ours may only be stricter."""
    found = by_us(written(place, *header))
    if found is not None:
        assert found == by_the_library(place)


@FUZZ
@given(st.binary(max_size=64), st.one_of(st.integers(0, 80), st.integers(0, 2**64 - 1)))
def test_bytes_that_are_no_header_are_refused(place: Path, data: bytes, size: int) -> None:
    place.write_bytes(struct.pack("<Q", size) + data)
    found = by_us(place)
    assert found is None or found == by_the_library(place)


def entry(name: str, start: int, end: int, shape: list[int] | None = None, dtype: str = "U8") -> str:
    info = {"dtype": dtype, "shape": [end - start] if shape is None else shape, "data_offsets": [start, end]}
    return f"{json.dumps(name)}:{json.dumps(info)}"


HEADERS: dict[str, tuple[bytes, int]] = {
    "nested deeply": (b'{"a":' + b"[" * 1_000_000, 0),
    "nested objects": (b'{"a":' * 100_000, 0),
    "a number of 5000 digits": (b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,0]}}', 0),
    "the same tensor twice": (f"{{{entry('a', 0, 1)},{entry('a', 0, 1)}}}".encode(), 1),
    "the metadata twice": (b'{"__metadata__":{},"__metadata__":{}}', 0),
    "a hole": (f"{{{entry('a', 0, 1)},{entry('b', 2, 3)}}}".encode(), 3),
    "an overlap": (f"{{{entry('a', 0, 2)},{entry('b', 1, 3)}}}".encode(), 3),
    "the end before the start": (b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[1,0]}}', 1),
    "a shape that overflows": (f"{{{entry('a', 0, 0, [1 << 59, 64])}}}".encode(), 0),
    "a million dimensions": (f"{{{entry('a', 0, 1, [1] * 1_000_000)}}}".encode(), 1),
    "bytes after the last tensor": (f"{{{entry('a', 0, 1)}}}".encode(), 2),
    "metadata that is a number": (b'{"__metadata__":{"a":1}}', 0),
    "metadata that is a list": (b'{"__metadata__":[]}', 0),
    "not UTF-8": (b'{"\xff\xfe":{}}', 0),
    "a byte order mark": (b"\xef\xbb\xbf{}", 0),
    "a list": (b"[]", 0),
    "a dtype of another kind": (f"{{{entry('a', 0, 1).replace(chr(34) + 'U8' + chr(34), '{}')}}}".encode(), 1),
    "nothing": (b"", 0),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_a_hostile_header_is_a_format_error(place: Path, case: str) -> None:
    with pytest.raises(StoreFormatError, match="not a valid safetensors file"):
        read_header(written(place, *HEADERS[case]))


def test_a_header_longer_than_allowed_is_not_read(place: Path) -> None:
    with open(place, "wb") as file:
        file.write(struct.pack("<Q", 90_000_000))
        file.truncate(100_000_000)  # a hole: nothing is written
    with pytest.raises(StoreFormatError, match="33554432 are allowed"):
        read_header(place)


def test_a_layer_of_nothing_but_a_hole_takes_no_memory(calibrated: Path, tmp_path: Path) -> None:
    """The file is as large as it says, and takes no room on the disk."""
    with safe_open(layer(calibrated), "pt") as file:
        meta = dict(file.metadata()) | {"hf_flash.d_ff": str(1 << 28), "hf_flash.d_model": "1", "hf_flash.format_version": "2"}
    key, end = "model.decoder.layers.1.fc1.", (1 << 28) * 2 * 2
    header = {
        "__metadata__": meta,
        f"{key}bundles": {"dtype": "F16", "shape": [1 << 28, 2], "data_offsets": [0, end]},
        f"{key}place": {"dtype": "I32", "shape": [1 << 28], "data_offsets": [end, 2 * end]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 4096)
    with open(written(tmp_path / "x.safetensors", text, 0), "r+b") as file:
        file.truncate(8 + len(text) + 2 * end)
    with pytest.raises(StoreFormatError, match="not a flash layer file"):
        FlashStore.open_folder(tmp_path)


# --- stores, by the functions that users call ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repacked and calibrated model. Do not write to it."""
    folder = tmp_path_factory.mktemp("hostile")
    packed = hf_flash.repack(make_opt(folder / "plain"), folder / "flash")
    tokens = torch.randint(4, 96, (2000,), generator=torch.Generator().manual_seed(0))
    hf_flash.calibrate(packed, tokens, samples=16, context=32, rank=8, epochs=1)
    return packed


def layer(folder: Path, index: int = 1) -> Path:
    return folder / f"flash-layer-{index:05d}.safetensors"


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a safetensors file's header, and keep its data where it is."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) + -(8 + len(text)) % 4096) + text + b" " * (-(8 + len(text)) % 4096))
    with open(path, "ab") as file:
        file.write(data[8 + size :])


def meta(name: str, **values: str) -> Callable[[Path], None]:
    """Change metadata of a file of the store."""
    changed = {f"hf_flash.{key}": value for key, value in values.items()}
    return lambda folder: edit(folder / name, lambda header: header["__metadata__"].update(changed))


def index_names(name: str, of: str = layer(Path()).name) -> Callable[[Path], None]:
    """Give a file another name in the index."""

    def change(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"] = {key: name if value == of else value for key, value in index["weight_map"].items()}
        (folder / INDEX).write_text(json.dumps(index))

    return change


def moved_out(folder: Path, *, link: bool = False, absolute: bool = False) -> None:
    """A layer file lies in another folder, and the index or a link says so."""
    victim = folder.parent / "victim"
    victim.mkdir(exist_ok=True)
    os.replace(layer(folder), victim / layer(folder).name)
    if link:
        layer(folder).symlink_to(victim / layer(folder).name)
    else:
        index_names(f"{victim if absolute else '../victim'}/{layer(folder).name}")(folder)


def in_its_place(make: Callable[[Path], Any], name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return change


def report(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change the stored report of a calibration."""

    def edited(header: dict[str, Any]) -> None:
        found = json.loads(header["__metadata__"]["hf_flash.calibration"])
        change(found)
        header["__metadata__"]["hf_flash.calibration"] = json.dumps(found)

    return lambda folder: edit(folder / "flash-calibration.safetensors", edited)


def predictor_named(name: str) -> Callable[[Path], None]:
    return meta(PREDICTOR, predictor=name)


def text(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(content)


CALIBRATION = "flash-calibration.safetensors"
LAYER = layer(Path()).name
STORES: dict[str, Callable[[Path], Any]] = {
    "a name in another folder": moved_out,
    "a link to another folder": lambda f: moved_out(f, link=True),
    "an absolute name": lambda f: moved_out(f, absolute=True),
    "a name with a backslash": index_names("..\\victim\\x.safetensors"),
    "a name with a drive": index_names("C:x.safetensors"),
    "a name with a NUL": index_names("a\0.safetensors"),
    "a name with half a pair": index_names("\ud800.safetensors"),
    "a name of 5000 letters": index_names("a" * 5000 + ".safetensors"),
    "an empty name": index_names(""),
    "a device": index_names("/dev/zero"),
    "a link to a device": in_its_place(lambda path: path.symlink_to("/dev/zero"), LAYER),
    "a link to itself": in_its_place(lambda path: path.symlink_to(path.name), LAYER),
    "a FIFO": in_its_place(os.mkfifo, LAYER),
    "a FIFO for the other weights": in_its_place(os.mkfifo, REST),
    "a folder": in_its_place(Path.mkdir, LAYER),
    "a FIFO for an index": in_its_place(os.mkfifo, INDEX),
    "a pickle in a safetensors index": lambda f: (os.replace(f / REST, f / "x.bin"), index_names("x.bin", REST)(f)),
    "an index that is nested": text(INDEX, b'{"weight_map":' + b"[" * 100_000),
    "an index that is not UTF-8": text(INDEX, b'{"weight_map": {"\xff": "\xff"}}'),
    "an index with a byte order mark": text(INDEX, b'\xef\xbb\xbf{"weight_map": {}}'),
    "an index with numbers": text(INDEX, b'{"weight_map": {"a": 1e999}}'),
    "an index with a number of 5000 digits": text(INDEX, b'{"weight_map": ' + b"1" * 5000 + b"}"),
    "a version of another alphabet": meta(LAYER, format_version="²"),
    "a version of Arabic digits": meta(LAYER, format_version="\u0661"),
    "a version of 5000 digits": meta(LAYER, format_version="1" * 5000),
    "a negative version": meta(LAYER, format_version="-1"),
    "a version with a space": meta(LAYER, format_version=" 1"),
    "version 0": meta(LAYER, format_version="0"),
    "a layer of 5000 digits": meta(LAYER, layer="1" * 5000),
    "a layer of another alphabet": meta(LAYER, layer="²"),
    "no layers": meta(LAYER, layers="0"),
    "very many layers": lambda f: [meta(layer(f, i).name, layers="9" * 18)(f) for i in range(3)],
    "no neurons": meta(LAYER, d_ff="0"),
    "no width": meta(LAYER, d_model="0"),
    "sizes that overflow": meta(LAYER, d_ff="9" * 18, d_model="9" * 18),
    "two layers of the same matrix": lambda f: meta(LAYER, up="model.decoder.layers.0.fc1.weight")(f),
    "a predictor without a number": predictor_named("int4-gx"),
    "a predictor of 5000 digits": predictor_named("int4-g" + "1" * 5000),
    "a predictor of group 0": predictor_named("int4-g0"),
    "a predictor with a folder": predictor_named("int4-g64/../x"),
    "a predictor of a name without end": predictor_named("a" * 41),
    "a predictor of large letters": predictor_named("INT8"),
    "a predictor of another alphabet": predictor_named("int4-g²"),
    "a predictor without a name": predictor_named(""),
    "a predictor that nobody knows": predictor_named("oracle"),
    "a predictor of another file's name": predictor_named("lowrank"),
    "a calibration that is no JSON": meta(CALIBRATION, calibration="{"),
    "a calibration that is nested": meta(CALIBRATION, calibration="[" * 100_000),
    "a calibration that is a list": meta(CALIBRATION, calibration="[]"),
    "a calibration that is a number": meta(CALIBRATION, calibration="9" * 5000),
    "a calibration without layers": report(lambda r: r.pop("layers")),
    "a calibration of fewer layers": report(lambda r: r["layers"].pop()),
    "a calibration with layers that are none": report(lambda r: r.update(layers=[1, 2, 3])),
    "a calibration without use": report(lambda r: r["layers"][0].pop("use")),
    "a calibration whose use is empty": report(lambda r: r["layers"][0]["use"].update(mean=[])),
    "a calibration whose use is NaN": report(lambda r: r["layers"][0]["use"].update(mean=[float("nan")])),
    "a calibration whose use goes back": report(lambda r: r["layers"][0]["use"].update(far_tokens=[9, 3], far=[1, 2])),
    "a calibration of a text": report(lambda r: r["layers"][0].update(active="many")),
    "a calibration of a huge number": report(lambda r: r["layers"][0].update(active=10**400)),
    "a calibration of a negative rank": report(lambda r: r["layers"][0]["lowrank"].update(rank=-1)),
    "a calibration that read nothing": report(lambda r: [x["reads"].update(worth=True, after=0) for x in r["layers"]]),
    "a calibration without a text": report(lambda r: r.update(text=None)),
}  # fmt: skip


def loaded(folder: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=FlashOffloadConfig(predictor="quantized"))


def opened(folder: Path) -> None:
    """What looks at a store does no more: a store takes every safe name, the predictors know theirs."""
    store = FlashStore.open_folder(folder)
    formats_in(store)
    stored_report(store)


TOKENS = torch.arange(4, 90).repeat(30)
CALLS: dict[str, Callable[[Path], Any]] = {
    "open": opened,
    "restore": lambda folder: hf_flash.restore(folder, folder.parent / "restored"),
    "calibrate": lambda folder: hf_flash.calibrate(
        folder, torch.arange(4, 90).repeat(30), samples=8, context=32, epochs=0, rank=4
    ),
    "load": loaded,
}
HARMLESS: dict[str, set[str]] = {  # what does not look at it
    "restore": {name for name in STORES if "calibration" in name},
    "calibrate": {name for name in STORES if "calibration" in name},  # makes it anew
    "load": {name for name in STORES if name.startswith("an index") or name == "a FIFO for an index"},  # transformers refuses
}


@pytest.mark.timeout(60)
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFO on this system")
@pytest.mark.parametrize("case", STORES)
def test_a_hostile_store_is_one_of_our_errors(calibrated: Path, tmp_path: Path, case: str) -> None:
    folder = Path(shutil.copytree(calibrated, tmp_path / "hostile"))
    STORES[case](folder)
    before = {path.name for path in tmp_path.iterdir()}
    for name, call in CALLS.items():
        if case not in HARMLESS.get(name, set()):
            with pytest.raises(HfFlashError):
                call(folder)
    assert main(["inspect", str(folder)]) == 1
    assert {path.name for path in tmp_path.iterdir()} == before


CONFIGS: dict[str, bytes] = {
    "nested": b"[" * 100_000,
    "not UTF-8": b'{"model_type": "\xff"}',
    "a byte order mark": b'\xef\xbb\xbf{"model_type": "opt"}',
    "a list": b"[]",
    "a number of 5000 digits": b'{"model_type": ' + b"1" * 5000 + b"}",
    "a quantization_config that is a list": b'{"model_type": "opt", "quantization_config": [1]}',
    "a quantization_config that is a text": b'{"model_type": "opt", "quantization_config": "flash"}',
    "empty": b"",
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_hostile_config_is_one_of_our_errors(calibrated: Path, tmp_path: Path, case: str) -> None:
    folder = Path(shutil.copytree(calibrated, tmp_path / "hostile"))
    (folder / "config.json").write_bytes(CONFIGS[case])
    for call in (lambda: hf_flash.restore(folder, tmp_path / "out"), lambda: hf_flash.repack(folder, tmp_path / "out")):
        with pytest.raises(HfFlashError):
            call()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hostile"]


PLAIN: dict[str, tuple[str, str]] = {
    "in another folder": ("model.safetensors", "../victim/model-00001-of-00001.safetensors"),
    "absolute": ("model.safetensors", "/dev/zero.safetensors"),
    "a pickle": ("model.safetensors", "model-00001-of-00001.bin"),
    "a pickle in another folder": ("pytorch_model.bin", "../victim/model-00001-of-00001.bin"),
    "a link": ("model.safetensors", "link.safetensors"),
}


@pytest.mark.parametrize("case", PLAIN)
def test_an_index_of_a_plain_checkpoint_stays_in_its_folder(tmp_path: Path, case: str) -> None:
    (kind, name), folder = PLAIN[case], make_opt(tmp_path / "plain")
    (tmp_path / "victim").mkdir()
    state = load_file(folder / "model.safetensors")
    os.replace(folder / "model.safetensors", tmp_path / "victim" / "model-00001-of-00001.safetensors")
    torch.save(state, tmp_path / "victim" / "model-00001-of-00001.bin")
    shutil.copyfile(tmp_path / "victim" / "model-00001-of-00001.bin", folder / "model-00001-of-00001.bin")
    (folder / "link.safetensors").symlink_to(tmp_path / "victim" / "model-00001-of-00001.safetensors")
    (folder / f"{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(state, name)}))
    with pytest.raises(StoreFormatError, match=r"index|outside"):
        hf_flash.repack(folder, tmp_path / "out")
    with pytest.raises((HfFlashError, OSError)):  # transformers looks whether they are there
        loaded(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain", "victim"]


def test_a_single_file_may_be_a_link(tmp_path: Path) -> None:
    folder = make_opt(tmp_path / "plain")
    os.replace(folder / "model.safetensors", tmp_path / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    loaded(folder)
    hf_flash.repack(folder, tmp_path / "out")
