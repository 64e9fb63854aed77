"""Damage to the files of a checkpoint: one mutation a case, drawn from a table of kinds."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

Files = Mapping[str, bytes]
Change = bytes | Callable[[Path], None]  # the file's new contents, or what makes something else of its name
Changes = dict[str, Change]

INDEX: Final = "model.safetensors.index.json"
_MOST: Final = 4096  # of a number in config.json: transformers itself builds what is written there
_TEXTS: Final = [
    "", "x", "0", "1", "-1", "01", "²", "٣", "1e400", "nan", "5" * 5000, "x" * 100_000, "int4-gx", "int4-g0", "int8", "lowrank",
    "../x", "/dev/zero", "[]", "{}", "null", "\ud800", "\0", "flash-layer-00000.safetensors", "config.json", "." * 300,
]  # fmt: skip
_NAMES: Final = [
    "../packed/flash-layer-00001.safetensors", "/dev/zero", "/proc/self/mem", "..", ".", "", "config.json", "\0", "x" * 300,
    "flash-layer-00099.safetensors", "x.bin", "FLASH-LAYER-00000.safetensors", "./flash-layer-00000.safetensors", INDEX,
]  # fmt: skip
_VALUES: Final = [None, True, False, -1, 0, 1, 2, 7, 2**31, 2**63, 2**64, 1.5, -1e308, [], [[]], {}, {"x": 1}, *_TEXTS]
_RAW: Final = [
    b"", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, b"\xff\xfe{}", b"null", b"[]", b'"x"', b"{", b"{}" * 2, b"\0" * 64,
    b'{"weight_map": {}}', b'{"weight_map": []}', b'{"x": 1e999}', b'{"x": NaN}',
]  # fmt: skip


def weights(files: Files) -> list[str]:
    return sorted(name for name in files if name.endswith(".safetensors"))


def header_size(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def flip(data: bytes, begin: int, end: int, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        changed[draw.randrange(begin, end)] ^= 1 << draw.randrange(8)
    return bytes(changed)


def in_data(files: Files, draw: random.Random) -> Changes:
    name = draw.choice(weights(files))
    return {name: flip(files[name], header_size(files[name]), len(files[name]), draw)}


def in_header(files: Files, draw: random.Random) -> Changes:
    name = draw.choice(weights(files))
    data = files[name]
    used = 8 + len(data[8 : header_size(data)].rstrip())
    return {name: flip(data, 0, used, draw)}


def cut(files: Files, draw: random.Random) -> Changes:
    name = draw.choice(sorted(files))
    data = files[name]
    return {name: data + b"\0" * draw.randrange(1, 9000) if draw.random() < 0.2 else data[: draw.randrange(len(data))]}


def header(files: Files, draw: random.Random) -> Changes:
    """Another value, another name, one more or one less somewhere in the JSON of a header."""
    name = draw.choice(weights(files))
    return {name: with_header(files[name], lambda value: change_json(value, draw, _VALUES))}


def metadata(files: Files, draw: random.Random) -> Changes:
    name = draw.choice(weights(files))

    def change(value: Any) -> None:
        found = value.setdefault("__metadata__", {})
        found[draw.choice(sorted(found) or ["format"])] = draw.choice(_TEXTS)

    return {name: with_header(files[name], change)}


def with_header(data: bytes, change: Callable[[Any], None]) -> bytes:
    """The file with its header changed, and padded as before where there is room."""
    size = header_size(data)
    value = json.loads(data[8:size])
    change(value)
    text = json.dumps(value, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 4096 if size % 4096 == 0 else 0)
    return len(text).to_bytes(8, "little") + text + data[size:]


def index(files: Files, draw: random.Random) -> Changes:
    if INDEX not in files:
        return config(files, draw)
    value = json.loads(files[INDEX])
    names = value["weight_map"]
    if draw.random() < 0.7:
        names[draw.choice(sorted(names))] = draw.choice(_NAMES)
    else:
        change_json(value, draw, _VALUES)
    return {INDEX: json.dumps(value).encode()}


def config(files: Files, draw: random.Random) -> Changes:
    name = draw.choice(["config.json"] * 4 + ["generation_config.json"])
    value = json.loads(files[name])
    inside = value.get("quantization_config", value) if draw.random() < 0.5 else value
    change_json(inside, draw, [v for v in _VALUES if not isinstance(v, int | float) or abs(v) <= _MOST])
    return {name: json.dumps(value).encode()}


def raw(files: Files, draw: random.Random) -> Changes:
    """Text that is no JSON, or none that anybody expects."""
    name = draw.choice(sorted(name for name in files if name.endswith(".json")))
    return {name: draw.choice(_RAW)}


def swap(files: Files, draw: random.Random) -> Changes:
    """A file in another one's place, or each in the other's."""
    one, other = draw.sample(weights(files), 2) if len(weights(files)) > 1 else sorted(files)[:2]
    return {one: files[other]} | ({other: files[one]} if draw.random() < 0.5 else {})


def other_thing(files: Files, draw: random.Random) -> Changes:
    """Something that is no regular file, or nothing. JSON is read by transformers first, which would wait for ever for some."""
    name = draw.choice(sorted(files))
    things = [Path.mkdir, _link("nowhere"), _link(name), Path.exists]
    return {name: draw.choice(things + ([] if name.endswith(".json") else [os.mkfifo, _link("/dev/zero")]))}


def _link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def change_json(value: Any, draw: random.Random, values: list[Any]) -> None:
    """Change one place in a JSON value, any depth."""
    place = value
    while True:
        keys = sorted(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            if isinstance(place, dict):
                place["x"] = draw.choice(values)
            return
        key = draw.choice(keys)
        if isinstance(place[key], dict | list) and place[key] and draw.random() < 0.8:
            place = place[key]
            continue
        act = draw.random()
        if act < 0.7:
            place[key] = draw.choice(values)
        elif isinstance(place, dict) and act < 0.85:
            place[draw.choice(_TEXTS)] = place.pop(key)
        else:
            del place[key]
        return


KINDS: Final[dict[str, Callable[[Files, random.Random], Changes]]] = {
    "bits of data": in_data,
    "bits of a header": in_header,
    "cut": cut,
    "header": header,
    "metadata": metadata,
    "index": index,
    "config": config,
    "no JSON": raw,
    "swapped": swap,
    "no file": other_thing,
}
