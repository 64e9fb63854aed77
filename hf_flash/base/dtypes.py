"""The compute dtypes, by name, so that a command line can list them without importing torch."""

from __future__ import annotations

from typing import Final

DTYPES: Final = ("float32", "bfloat16", "float16")  # in the order of their numbers in native.h
