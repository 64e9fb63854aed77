"""Plain checkpoints: a folder, a Hub repository or a list of files, seen as named tensors that stay on disk until used.

Reads what transformers reads: `model.safetensors` or `pytorch_model.bin`, single or sharded. Pickles are opened with
`weights_only`, and memory-mapped.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import huggingface_hub
import torch
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import safe_open

from .errors import ConfigError, StoreFormatError, StoreMissingError
from .store import DTYPE_NAMES, FORMAT_VERSION, TensorSpec, listed_files, read_header

logger = logging.getLogger("hf_flash")

_WEIGHTS: Final = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_SAMPLES: Final = 256
_SNAPSHOT: Final = re.compile(
    r"(?P<cache>.*)[/\\]models--(?P<repo>[^/\\]+)[/\\]snapshots[/\\](?P<commit>[0-9a-f]{7,64})(?:[/\\](?P<inside>.*))?"
)


@dataclass
class Checkpoint:
    """Tensors by name over one or more files."""

    files: list[Path]
    specs: dict[str, TensorSpec] = field(default_factory=dict)
    _where: dict[str, Path] = field(default_factory=dict)
    _pickles: dict[Path, dict[str, torch.Tensor]] = field(default_factory=dict)

    @classmethod
    def open(cls, files: list[Path]) -> Checkpoint:
        """Open weight files: all safetensors or all pickles.

        Raises:
            StoreMissingError, StoreFormatError: with the file and what is wrong with it.
        """
        self = cls(files)
        for path in files:
            if path.suffix == ".safetensors":
                for name, (spec, _) in read_header(path)[0].items():
                    self.specs[name], self._where[name] = spec, path
            else:
                for name, tensor in self._unpickled(path).items():
                    self.specs[name], self._where[name] = (tensor.dtype, tuple(tensor.shape)), path
        strange = {str(dtype) for dtype, _ in self.specs.values()} - {str(dtype) for dtype in DTYPE_NAMES}
        if strange:
            raise StoreFormatError("tensors of a dtype that hf_flash cannot carry", where=files[0].parent, got=sorted(strange))
        return self

    @classmethod
    def open_folder(cls, folder: Path) -> Checkpoint:
        """Open the weights in a folder as transformers would choose them."""
        return cls.open(weight_files(folder))

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, memory-mapped."""
        path = self._where[name]
        if path.suffix != ".safetensors":
            return self._unpickled(path)[name]
        with safe_open(path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    def _unpickled(self, path: Path) -> dict[str, torch.Tensor]:
        if path not in self._pickles:
            self._pickles[path] = _load_pickle(path)
        return self._pickles[path]

    def release(self) -> None:
        """Let go of open pickles, of which old ones lie in memory whole. They are opened again when a tensor is asked for."""
        self._pickles.clear()

    def origin(self) -> dict[str, str]:
        """Where it comes from, and a fingerprint that changes whenever the weights may have changed.

        A Hub snapshot is named by its commit, and by the folder in it where it is not at the top; a local one by path, sizes,
        times, headers and samples of the contents.
        """
        folder = self.files[0].parent
        found = find_snapshot(folder)
        source, revision = (found.name, found.commit) if found else (folder.name, "")
        digest = hashlib.sha256(f"{FORMAT_VERSION}\n{source}\n{revision or folder.resolve()}\n".encode())
        for path in sorted(self.files):
            state = path.stat()
            digest.update(f"{path.name} {state.st_size} {0 if revision else state.st_mtime_ns}\n".encode())
            digest.update(b"" if revision else _samples(path, state.st_size))
        digest.update(json.dumps([(n, str(d), list(s)) for n, (d, s) in sorted(self.specs.items())]).encode())
        return {"source": source, "revision": revision, "fingerprint": digest.hexdigest()[:32]}


@dataclass(frozen=True)
class Snapshot:
    """A folder in the Hub's cache: which cache, the repository and the folder in it as one name, the commit."""

    cache: Path
    name: str
    commit: str


def find_snapshot(folder: Path) -> Snapshot | None:
    """What a folder is in the Hub's cache, if it is one."""
    match = _SNAPSHOT.fullmatch(str(folder))
    if match is None:
        return None
    parts = [match["repo"].replace("--", "/"), *(part for part in [(match["inside"] or "").replace("\\", "/")] if part)]
    return Snapshot(Path(match["cache"]), "/".join(parts), match["commit"])


def _samples(path: Path, size: int) -> bytes:
    """Some KiB from all over a file: other weights differ there, even under the same size and time."""
    with open(path, "rb") as file:
        parts = []
        for i in range(_SAMPLES):
            file.seek(size * i // _SAMPLES)
            parts.append(file.read(256))
    return b"".join(parts)


def _load_pickle(path: Path) -> dict[str, torch.Tensor]:
    try:
        mapped = zipfile.is_zipfile(path)
        if not mapped:
            logger.warning("hf_flash: %s is an old pickle that cannot be memory-mapped: it is read into memory whole", path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except FileNotFoundError as error:
        raise StoreMissingError("a file of the checkpoint is not there", where=path, hint="download it again") from error
    except Exception as error:
        raise StoreFormatError(
            "not a readable PyTorch checkpoint",
            where=path,
            got=str(error).splitlines()[0],
            hint="the file is damaged or incomplete: download it again",
        ) from error
    tensors = (
        {name: value for name, value in state.items() if isinstance(value, torch.Tensor)} if isinstance(state, dict) else {}
    )
    if not tensors:
        raise StoreFormatError("no tensors in a PyTorch checkpoint", where=path, expected="a dictionary of tensors")
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a checkpoint folder, in the order of preference that transformers has."""
    for name in _WEIGHTS:
        path = folder / name
        if path.exists():
            if not name.endswith(".json"):
                return [path]
            shards = listed_files(path)
            missing = [shard.name for shard in shards if not shard.exists()]
            if missing:
                raise StoreMissingError(
                    "shards that the index lists are not there",
                    where=path,
                    got=", ".join(missing),
                    hint="download the checkpoint again",
                )
            return shards
    raise StoreMissingError("no weights in the folder", where=folder, expected=" or ".join(_WEIGHTS))


def resolve_folder(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
    subfolder: str = "",
    config_only: bool = False,
) -> Path:
    """The local folder of a checkpoint, downloaded from the Hub if `source` is a repository's name.

    Safetensors weights are preferred; pickles are downloaded only where there are none. `subfolder`: where in the repository
    or folder it is. `config_only` fetches nothing else.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder / subfolder
    if folder.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(source)):
        raise ConfigError("neither a folder nor the name of a Hub repository", got=str(source))
    where = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    inside = f"{subfolder.strip('/')}/" if subfolder.strip("/") else ""

    def download(allow: list[str], ignore: list[str]) -> Path:
        allow, ignore = [inside + pattern for pattern in allow], [inside + pattern for pattern in ignore]
        found = huggingface_hub.snapshot_download(str(source), allow_patterns=allow, ignore_patterns=ignore, **where)
        return Path(found) / inside

    try:
        if config_only:
            return download(["config.json"], [])
        small = ["*.json", "*.txt", "*.model", "*.md", "*.jinja", "LICENSE*"]
        others = ["*/*", "*.*.safetensors", "pytorch_model.*.bin"]  # subfolders and variants
        for weights in ("model*.safetensors", "pytorch_model*.bin"):
            found = download([*small, weights], others)
            if any(found.glob(weights)):
                break
        return found
    except (
        HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError, ConnectionError,
    ) as error:  # fmt: skip
        raise StoreMissingError(
            "no such folder, and no such repository or revision on the Hub, or the Hub cannot be reached",
            where=source,
            got=str(error).splitlines()[0],
            hint="check the name, the connection, and `token` for a private repository",
        ) from error
