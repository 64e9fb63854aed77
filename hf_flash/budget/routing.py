"""`Routing`: what the routers of a mixture of experts did on text, as `hf_flash.calibrate` measures it.

It lies beside the weights, in a file of its own, since a mixture's checkpoint stays as it is. Nothing that is computed depends
on it: it says how often experts will be found in memory, before the model has run.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from hf_flash.base.files import check_inside, new_file, read_json, write_json, writing
from hf_flash.budget.calibration_report import Check, check_values, is_text, is_text_or_none, is_whole
from hf_flash.errors import StoreError
from hf_flash.store.names import ROUTING_FILE

logger = logging.getLogger("hf_flash")


@dataclass(frozen=True)
class LayerRouting:
    """One layer. All are shares of the experts that tokens used.

    Attributes:
        reuse: those that the token before used, too.
        hits: those in memory, with 0 slots, 1 slot and so on, up to as many as there are experts.
    """

    reuse: float
    hits: tuple[float, ...]


@dataclass(frozen=True)
class Routing:
    """All layers.

    Attributes:
        text: what the text is called; `None`: it was given as token ids.
        sha256: of its token ids.
        tokens: that the model has seen. counted: of these, the ones whose experts were counted.
    """

    text: str | None
    sha256: str
    tokens: int
    counted: int
    layers: tuple[LayerRouting, ...]

    @property
    def name(self) -> str:
        """For people: what is not to be printed of a name is replaced."""
        return "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in self.text or "token ids")

    def hit_rate(self, slots: Sequence[int]) -> float:
        """With so many slots in each layer. Layers count alike, as a token uses equally many experts of each."""
        return sum(layer.hits[have] for layer, have in zip(self.layers, slots, strict=True)) / len(self.layers)

    @property
    def reuse(self) -> float:
        """Of all layers."""
        return sum(layer.reuse for layer in self.layers) / len(self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def write_routing(folder: Path, found: Routing) -> None:
    """Write `flash-routing.json` into a folder. Raises `RepackError`: it cannot be written."""
    write_json(folder / ROUTING_FILE, found.to_dict())


def check_writable(folder: Path) -> None:
    """Find out whether [`write_routing`] can write into a folder, before there is anything to write.

    Raises:
        RepackError: it cannot.
    """
    path = folder / ROUTING_FILE
    scratch = path.with_name(path.name + ".tmp")
    with writing(path):
        new_file(scratch).close()
        scratch.unlink()
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))


def copy_routing(source: Path, target: Path, experts: Sequence[int]) -> None:
    """Let a folder have what was measured of the mixture in another; of any other mixture it has nothing then.

    Args:
        experts: of each layer.
    """
    try:
        found = routing_in(source, experts)
    except StoreError as error:
        logger.warning("hf_flash: what was measured of its routers is not saved with the model: %s", error)
        found = None
    if found is not None:
        write_routing(target, found)
    elif source.resolve() != target.resolve():
        (target / ROUTING_FILE).unlink(missing_ok=True)


def routing_in(folder: Path, experts: Sequence[int]) -> Routing | None:
    """What was measured of the mixture in a folder; `None`: nothing.

    Args:
        experts: of each layer.

    Raises:
        StoreFormatError: the file lies elsewhere, holds something else, or was made of a model with other layers.
    """
    path = folder / ROUTING_FILE
    if not path.is_file():
        return None
    check_inside(folder, [path])
    found = read_json(path)
    check_values(found, {**_ROUTING, "layers": partial(_is_list_of, len(experts))}, path, _WHAT)
    for layer, count in zip(found["layers"], experts, strict=True):
        check_values(layer, {"reuse": _is_share, "hits": partial(_are_hits, count)}, path, "a layer")
    layers = tuple(LayerRouting(layer["reuse"], tuple(layer["hits"])) for layer in found["layers"])
    return Routing(found.get("text"), found["sha256"], found["tokens"], found["counted"], layers)


def _is_list_of(count: int, value: Any) -> bool:
    return isinstance(value, list) and len(value) == count


def _is_share(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1


def _are_hits(experts: int, value: Any) -> bool:
    """Whether these are shares for every number of slots, and no fewer with more of them."""
    if not _is_list_of(experts + 1, value) or not all(map(_is_share, value)):
        return False
    return all(fewer <= more for fewer, more in pairwise(value))


_WHAT: Final = "what was measured of this model's routers"
_ROUTING: Final[Mapping[str, Check]] = {
    "text?": is_text_or_none, "sha256": is_text, "tokens": is_whole, "counted": is_whole
}  # fmt: skip
