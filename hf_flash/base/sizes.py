"""Sizes in bytes as people write and read them: `"6GiB"`, `"50%"`, `"1.5 KiB"`."""

from __future__ import annotations

import re

from hf_flash.errors import ConfigError

_UNITS = {"": 1, "B": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("", 1000), ("B", 1000), ("IB", 1024))
}


def parse_bytes(value: float | str) -> int:
    """Parse a number of bytes: `6_000_000`, `"6GB"` (decimal) or `"6GiB"` (binary).

    Raises:
        ConfigError: it is no positive size.
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


def parse_share(value: float | str, whole: int) -> int:
    """Parse `"50%"` as a share of `whole` bytes, or a size as [`parse_bytes`] does."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", value) if isinstance(value, str) else None
    return int(whole * float(match[1]) / 100) if match else parse_bytes(value)


def format_bytes(n: float) -> str:
    """Write a size for people: `format_bytes(1536)` is `"1.5 KiB"`."""
    for unit in ("B", "KiB", "MiB"):
        if abs(n) < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.2f} GiB"
