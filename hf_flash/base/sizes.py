"""Sizes in bytes as people write and read them: `"6GiB"`, `"50%"`, `"1.5 KiB"`, and sizes for several devices."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from hf_flash.errors import ConfigError

_UNITS = {"": 1, "B": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("", 1000), ("B", 1000), ("IB", 1024))
}


def parse_bytes(value: float | str) -> int:
    """Parse a number of bytes: `6_000_000`, `"6GB"` (decimal) or `"6GiB"` (binary).

    Raises:
        ConfigError: the value is not a positive size.
    """
    if isinstance(value, int | float) and not isinstance(value, bool) and 1 <= value < 1e18 and value == int(value):
        return int(value)
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d+)?)\s*([A-Za-z]*)\s*", value) if isinstance(value, str) else None
    size = int(float(match[1]) * _UNITS.get(match[2].upper(), 0)) if match else 0
    if size < 1:
        raise ConfigError(
            "not a size", where="memory_budget", expected='a positive number of bytes, or text such as "6GiB"', got=repr(value)
        )
    return size


_DEVICE: Final = re.compile(r"([a-z]+)(?::(\d+))?|(\d+)")


def parse_places(value: Any) -> dict[str, int | str] | None:
    """Parse sizes by device: `{"cuda:0": "8GiB", "cpu": "16GiB"}`, with keys as in transformers' `max_memory`, or the text
    `"cuda:0=8GiB,cpu=16GiB"`.

    Returns:
        Sizes by full device name: a number means a CUDA device, and a type without a number its first device. `None`: the
        value is neither a mapping nor such a text.

    Raises:
        ConfigError: a key is not a device, a device comes twice, a value is not a size, or there are no devices.
    """
    if isinstance(value, str) and "=" in value:
        value = dict(part.partition("=")[::2] for part in value.split(","))
    if not isinstance(value, Mapping):
        return None
    found: dict[str, int | str] = {}
    for key, size in value.items():
        match = _DEVICE.fullmatch(str(key).strip()) if isinstance(key, int | str) and not isinstance(key, bool) else None
        kind, index = (match[1] or "cuda", match[2] or match[3]) if match else ("", None)
        name = kind if kind == "cpu" and index is None else f"{kind}:{int(index or 0)}"
        if match is None or name in found:
            raise ConfigError(
                "this device is named twice" if match else "not a device", where="memory_budget",
                expected='devices such as "cuda:0", 0 or "cpu", each with a size', got=repr(key),
            )  # fmt: skip
        parse_bytes(size)
        found[name] = size
    if not found:
        raise ConfigError("no device has a size", where="memory_budget", expected='{"cuda:0": "8GiB"}', got=repr(value))
    return found


def parse_share(value: float | str, whole: int) -> int:
    """Parse `"50%"` as a share of `whole` bytes, or any other value as [`parse_bytes`] does."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", value) if isinstance(value, str) else None
    return int(whole * float(match[1]) / 100) if match else parse_bytes(value)


def format_bytes(n: float) -> str:
    """Write a size for people: `format_bytes(1536)` is `"1.5 KiB"`."""
    for unit in ("B", "KiB", "MiB"):
        if abs(n) < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.2f} GiB"
