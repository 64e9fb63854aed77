"""The report that `calibrate` stores as metadata: every value is checked before any of it is used."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, Final

from hf_flash.base.files import parse_json
from hf_flash.budget.demand import LONGEST
from hf_flash.errors import StoreFormatError
from hf_flash.predictors.choice import is_predictor

Check = Callable[[Any], bool]


def is_whole(value: Any) -> bool:
    """Whether this is a count: a non-negative integer below 2 ** 62."""
    return type(value) is int and 0 <= value < 1 << 62


def _amount(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1e18 and math.isfinite(value)


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def is_text(value: Any) -> bool:
    """Whether this is a string."""
    return isinstance(value, str)


def is_text_or_none(value: Any) -> bool:
    """Whether this is a string or `None`."""
    return value is None or isinstance(value, str)


def _amounts(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= LONGEST and all(map(_amount, value))


def _use(value: Any) -> bool:
    """Aggregated use: `mean` for 1, 2, ... tokens, and `far` for some larger numbers of tokens."""
    if not isinstance(value, dict) or not _amounts(value.get("mean")) or not value["mean"]:
        return False
    tokens, far = value.get("far_tokens", []), value.get("far", [])
    if not _amounts(tokens) or not _amounts(far) or len(tokens) != len(far):
        return False
    ascending = [len(value["mean"]), *tokens]
    return all(a < b <= LONGEST for a, b in pairwise(ascending))


def _reads(value: Any) -> bool:
    names = ("missing", "before", "after")
    if not isinstance(value, dict) or not _flag(value.get("worth")) or not all(_amount(value.get(name)) for name in names):
        return False
    return not value["worth"] or (value["before"] > 0 and value["after"] > 0)


# Required keys, with a check for each value. A key that ends in `?` is only in newer reports.
_REPORT: Final[Mapping[str, Check]] = {"reached": _flag, "placement?": _flag}
_TEXT: Final[Mapping[str, Check]] = {
    "tokens": is_whole, "held_out": is_whole, "context": is_whole, "sha256": is_text, "name?": is_text_or_none
}  # fmt: skip
_TARGETS: Final[Mapping[str, Check]] = {"recall": _amount, "extra": _amount}
_LAYER: Final[Mapping[str, Check]] = {"active": _amount, "use": _use, "reads?": _reads}
_LOWRANK: Final[Mapping[str, Check]] = {"rank": is_whole, "recall": _amount, "selected": _amount, "use?": _use}
_MEASURED: Final[Mapping[str, Check]] = {"recall": _amount, "selected": _amount, "use?": _use}


def parse_report(text: str, where: object, layers: int) -> dict[str, Any]:
    """Parse and check a stored calibration report.

    Args:
        text: the report, as JSON.
        where: the file it comes from, for messages.
        layers: how many layers the model has.

    Raises:
        StoreFormatError: the text is not JSON, or a value in it is missing or not valid.
    """
    report = parse_json(text, where)
    check_values(report, _REPORT, where, "the report")
    check_values(report.get("text"), _TEXT, where, "text")
    check_values(report.get("targets"), _TARGETS, where, "targets")
    found = report.get("layers")
    if not isinstance(found, list) or len(found) != layers:
        raise _wrong(where, f"a list of {layers} layers", found)
    for layer in found:
        check_layer(layer, where)
    if any("reads" in layer for layer in found) and "placement" not in report:
        raise _wrong(where, "whether neurons were placed", None)
    checked: dict[str, Any] = report
    return checked


def check_layer(layer: Any, where: object) -> None:
    """Check one layer's part of a report.

    Raises:
        StoreFormatError: with the first value that is wrong.
    """
    check_values(layer, _LAYER, where, "a layer")
    check_values(layer.get("lowrank"), _LOWRANK, where, "lowrank")
    for name in filter(is_predictor, layer):
        check_values(layer[name], _MEASURED, where, name)


def check_values(value: Any, checks: Mapping[str, Check], where: object, what: str) -> None:
    """Check that a value is an object, and that each of its values passes its check.

    Args:
        checks: one check per key; a key that ends in `?` may be missing.
        where: the file the value comes from, for messages.
        what: a name for the value, for messages.

    Raises:
        StoreFormatError: with the first value that is wrong.
    """
    if not isinstance(value, dict):
        raise _wrong(where, f"{what}, an object", value)
    for name, check in checks.items():
        key = name.rstrip("?")
        if key in value and not check(value[key]):
            raise _wrong(where, f"a valid `{key}` in {what}", value[key])
        if key == name and key not in value:
            raise _wrong(where, f"`{key}` in {what}", "no such key")


def _wrong(where: object, expected: str, got: object) -> StoreFormatError:
    hint = "calibrate the model again, or take the file out of the folder and its index"
    return StoreFormatError("not a calibration report", where=where, expected=expected, got=ascii(got)[:200], hint=hint)
