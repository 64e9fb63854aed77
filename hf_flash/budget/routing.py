"""`Routing`: what the routers of a mixture of experts did on text, as `hf_flash.calibrate` measures it.

It is stored beside the weights in a file of its own, since a mixture's checkpoint is never changed. No output of the model
depends on it: it only predicts, before the model has run, how often experts will be found in memory.
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
    """One layer. All numbers are shares of the experts that tokens used.

    Attributes:
        reuse: share that the token before had used as well.
        hits: share found in memory, with 0 slots, 1 slot and so on, up to as many as there are experts.
    """

    reuse: float
    hits: tuple[float, ...]


@dataclass(frozen=True)
class Routing:
    """The routing of all layers.

    Attributes:
        text: the name of the text; `None`: it was given as token ids.
        sha256: SHA-256 of its token ids.
        tokens: how many tokens the model has seen.
        counted: for how many of these the experts were counted.
        layers: one entry per layer with experts.
    """

    text: str | None
    sha256: str
    tokens: int
    counted: int
    layers: tuple[LayerRouting, ...]

    @property
    def name(self) -> str:
        """The text's name, for printing: unprintable characters are replaced."""
        return "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in self.text or "token ids")

    def hit_rate(self, slots: Sequence[int]) -> float:
        """Share of the used experts that are in memory, given the slots of each layer.

        Layers count alike, since a token uses equally many experts of each.
        """
        return sum(layer.hits[have] for layer, have in zip(self.layers, slots, strict=True)) / len(self.layers)

    @property
    def reuse(self) -> float:
        """The mean over all layers of `LayerRouting.reuse`."""
        return sum(layer.reuse for layer in self.layers) / len(self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def write_routing(folder: Path, found: Routing) -> None:
    """Write `flash-routing.json` into a folder. Raises `RepackError` if it cannot be written."""
    write_json(folder / ROUTING_FILE, found.to_dict())


def check_writable(folder: Path) -> None:
    """Check that [`write_routing`] can write into a folder, before there is anything to write.

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
    """Copy the routing of the mixture in `source` to `target`. If there is none, remove what `target` has of another mixture.

    Args:
        experts: number of experts in each layer.
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
    """The routing that was measured of the mixture in a folder; `None` if there is none.

    Args:
        experts: number of experts in each layer.

    Raises:
        StoreFormatError: the file is a link to outside the folder, is not a routing file, or is of a model with other layers.
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
    """Whether these are shares for every number of slots, and never fall with more slots."""
    if not _is_list_of(experts + 1, value) or not all(map(_is_share, value)):
        return False
    return all(fewer <= more for fewer, more in pairwise(value))


_WHAT: Final = "what was measured of this model's routers"
_ROUTING: Final[Mapping[str, Check]] = {
    "text?": is_text_or_none, "sha256": is_text, "tokens": is_whole, "counted": is_whole
}  # fmt: skip
