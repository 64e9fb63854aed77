"""The systems that a benchmark compares, and how the command line names them. It imports nothing heavy."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

from hf_flash.base.sizes import parse_share
from hf_flash.config_arguments import checked_if_set
from hf_flash.errors import ConfigError


@dataclass(frozen=True)
class System:
    """One row: what to load, and how."""

    label: str
    kind: str = "flash"  # "stock", "accelerate" or "flash"
    capped: bool = True
    in_memory: bool = False  # stock: weights copied off the mapped file
    ffn_only: bool = False  # accelerate: of every layer only the feed-forward part is on disk
    arguments: dict[str, Any] = field(default_factory=dict)  # flash: of FlashOffloadConfig
    window_off: bool = False  # flash: the least budget that the model runs in
    torn: Literal["bundles", "parts"] | None = None  # flash: what is a read of its own; else neighbours are coalesced
    memory: str | None = None  # a budget of its own, of a sweep, instead of the run's


UNCAPPED: Final = 1 << 50  # a budget that nothing fills

SYSTEMS: Final = {
    system.label: system
    for system in (
        System("stock-ram", "stock", capped=False, in_memory=True),
        System("stock-cap", "stock"),
        System("accelerate", "accelerate"),
        System("naive", "accelerate", ffn_only=True),
        System("none", arguments={"predictor": "none"}),
        System("hybrid", arguments={"predictor": "none", "lookahead": 0}, window_off=True),
        System("+predictor", arguments={"lookahead": 0}, window_off=True, torn="parts"),
        System("+window", arguments={"lookahead": 0}, torn="parts"),
        System("+bundling", arguments={"lookahead": 0}, torn="bundles"),
        System("flash"),
        System("flash-uncapped", capped=False, arguments={"memory_budget": UNCAPPED}),
    )
}

ABLATION: Final = ("hybrid", "+predictor", "+window", "+bundling", "flash")

USUAL: Final = "usual"  # what is compared when nobody says what

TINY: Final = ("stock-ram", "none", "flash")

GROUPS: Final = {"ablation": ABLATION, "peers": ("stock-ram", "stock-cap", "accelerate")}


def default_systems(plain: object, *, is_mixture: bool = False) -> list[str]:
    """What is compared when nobody says what: the peers if there is a plain checkpoint for them. A mixture has no predictor."""
    return ["peers"] * (plain is not None) + ["none"] * (not is_mixture) + ["flash"]


def parse_arguments(text: str) -> dict[str, Any]:
    """`"lookahead=0, reader=direct"` as arguments of FlashOffloadConfig, checked."""
    found: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            raise ConfigError("not an argument", expected="name=value", got=repr(item))
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    checked_if_set(found)
    return found


def parse_calls(text: str) -> list[tuple[int, int]]:
    """`"2x1, 1x4, 1x256"` as rows and tokens of calls, in this order; what `--calls` takes."""
    found = [re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", item) for item in filter(None, map(str.strip, text.split(",")))]
    calls = [(int(match[1]), int(match[2])) for match in found if match]
    if not calls or len(calls) < len(found):
        raise ConfigError("not calls", expected='rows and tokens, such as "8x1,1x4,1x256"', got=repr(text))
    return list(dict.fromkeys(calls))


def parse_system(text: str) -> System:
    """`"label: name=value, ..."`, a row of hf_flash with arguments of its own; what `--system` takes."""
    label, colon, rest = text.partition(":")
    if not colon or not label.strip() or label.strip() in SYSTEMS:
        raise ConfigError("not a system", expected='a new name and arguments, such as "direct: reader=direct"', got=repr(text))
    return System(label.strip(), arguments=parse_arguments(rest))


def parse_sweep(text: str) -> list[System]:
    """`"40, 50, 80:quantized, 6GiB"`, the row "flash" at each budget; what `--sweep` takes.

    Args:
        text: percent of the dense model, or sizes with their unit; each with the predictor to take, if not the folder's own.
    """
    found = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        size, colon, predictor = (part.strip() for part in item.partition(":"))
        size += "%" if re.fullmatch(r"[\d.]+", size) else ""
        arguments: dict[str, Any] = {"predictor": predictor} if colon else {}
        checked_if_set({"memory_budget": parse_share(size, 1 << 40), **arguments})  # an error now, not in a row
        found.append(System(" ".join(filter(None, ["flash", size, predictor])), arguments=arguments, memory=size))
    if not found:
        raise ConfigError("not a sweep", expected='budgets, such as "40,50,60"', got=repr(text))
    return found


def resolve_systems(
    names: Sequence[str | System], arguments: Mapping[str, Any], check: bool, plain: Any, *, is_mixture: bool = False
) -> list[System]:
    """The systems, each once, with the arguments for all in those of hf_flash."""
    usual = default_systems(plain, is_mixture=is_mixture)
    wanted = [one for name in names for one in (usual if name == USUAL else [name])]
    flat = [one for name in wanted for one in (GROUPS.get(name, (name,)) if isinstance(name, str) else (name,))]
    flat += ["flash", "flash-uncapped"] if check else []
    found: dict[str, System] = {}
    for item in flat:
        if isinstance(item, str) and item not in SYSTEMS:
            raise ConfigError("no such system", expected=", ".join([*SYSTEMS, *GROUPS]), got=item)
        system = SYSTEMS[item] if isinstance(item, str) else item
        if system.kind != "flash" and plain is None:
            raise ConfigError(f"{system.label} needs the plain checkpoint", hint="name its folder with --plain")
        if system.memory is not None and "memory_budget" in arguments:
            raise ConfigError("a sweep says itself what the budget is", got="memory_budget for all rows of hf_flash")
        if found.get(system.label, system) != system:
            raise ConfigError("two systems of one name", got=system.label)
        found[system.label] = system
    for label, system in found.items():
        if system.kind == "flash":
            found[label] = replace(system, arguments={**arguments, **system.arguments})
            checked_if_set(found[label].arguments)  # an error now, not in a row
    return list(found.values())
