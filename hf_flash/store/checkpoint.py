"""Plain checkpoints: a folder, a Hub repository or a list of files, seen as named tensors that stay on disk until used.

The files are those that transformers reads: `model.safetensors` or `pytorch_model.bin`, single or sharded. Safetensors are read
in pieces and never mapped; pickles are opened with `weights_only`, and memory-mapped.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import zipfile
from collections.abc import Iterator, Sequence
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

from hf_flash.base.buffers import copy_to_memory
from hf_flash.base.files import StoredFile, absolute, check_inside, exists, is_plain_name, listed_files, nearest, reading
from hf_flash.errors import ConfigError, RepackError, StoreFormatError, StoreMissingError
from hf_flash.store.names import FORMAT_VERSION, ROUTING_FILE
from hf_flash.store.safetensors_files import DTYPE_NAMES, Rows, TensorSpec, read_header, read_pieces, read_tensor

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
    """Tensors by name, in one or more weight files."""

    files: list[Path]
    specs: dict[str, TensorSpec] = field(default_factory=dict)
    _where: dict[str, tuple[Path, int]] = field(default_factory=dict)  # file, and byte where the data begins
    _states: dict[Path, tuple[int, int]] = field(default_factory=dict)  # size and time when opened
    _pickles: dict[Path, dict[str, torch.Tensor]] = field(default_factory=dict)

    @classmethod
    def open(cls, files: list[Path]) -> Checkpoint:
        """Open weight files: all safetensors or all pickles.

        Raises:
            StoreMissingError, StoreFormatError: a file is missing or not valid; the message names it and the fault.
        """
        self = cls([absolute(path) for path in files])
        for path in self.files:
            self._states[path] = _state(path)
            if path.suffix == ".safetensors":
                for name, (spec, offset) in read_header(path)[0].items():
                    self.specs[name], self._where[name] = spec, (path, offset)
            else:
                for name, tensor in self._unpickled(path).items():
                    self.specs[name], self._where[name] = (tensor.dtype, tuple(tensor.shape)), (path, 0)
        strange = {str(dtype) for dtype, _ in self.specs.values()} - {str(dtype) for dtype in DTYPE_NAMES}
        if strange:
            raise StoreFormatError("tensors of a dtype that hf_flash cannot carry", where=files[0].parent, got=sorted(strange))
        return self

    @classmethod
    def open_folder(cls, folder: Path) -> Checkpoint:
        """Open the weight files in a folder that transformers would choose."""
        return cls.open(weight_files(folder))

    def tensors_by_file(self) -> dict[Path, list[str]]:
        """Return the names of the tensors in each file, in the order of the file."""
        found: dict[Path, list[str]] = {path: [] for path in self.files}
        for name in sorted(self.specs, key=lambda name: self._where[name][1]):
            found[self._where[name][0]].append(name)
        return found

    def place(self, name: str) -> tuple[Path, int]:
        """Return the file that holds a tensor, and the byte where it begins there.

        Raises:
            StoreFormatError: the tensor is pickled, so it cannot be read in place.
        """
        path, offset = self._where[name]
        if path.suffix != ".safetensors":
            raise StoreFormatError(
                "experts are read where they lie, which takes safetensors files",
                where=path,
                expected="*.safetensors",
                got=path.name,
                hint="load the checkpoint with transformers, and save it: save_pretrained writes safetensors",
            )
        return path, offset

    def is_safetensors(self, name: str) -> bool:
        """Tell whether a tensor lies in a safetensors file."""
        return bool(self._where) and self._where[name][0].suffix == ".safetensors"

    def tensor(self, name: str) -> torch.Tensor:
        """Return one tensor in memory, or memory-mapped if it is pickled."""
        path, offset = self._where[name]
        if path.suffix != ".safetensors":
            return self._unpickled(path)[name]
        with StoredFile(path) as file:
            return read_tensor(file, self.specs[name], offset)

    def in_memory(self, name: str) -> torch.Tensor:
        """Return one tensor, contiguous and in memory, even if it is pickled."""
        tensor = self.tensor(name)
        return tensor if self._where[name][0].suffix == ".safetensors" else copy_to_memory(tensor)

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """Yield one tensor as flat pieces of some MiB, in order. They share a buffer. A pickled tensor comes whole."""
        path, offset = self._where[name]
        if path.suffix != ".safetensors":
            yield self._unpickled(path)[name]
            return
        with StoredFile(path) as file:
            yield from read_pieces(file, self.specs[name], offset)

    def rows(self, name: str) -> Rows | torch.Tensor:
        """Return one matrix whose rows are read when it is sliced."""
        path, offset = self._where[name]
        if path.suffix != ".safetensors":
            return self._unpickled(path)[name]
        return Rows(StoredFile(path), self.specs[name], offset)

    def check_unchanged(self) -> None:
        """Refuse files that were written to or replaced since they were opened.

        Raises:
            RepackError: a file changed; the message names it.
        """
        for path, before in self._states.items():
            if not exists(path) or _state(path) != before:
                raise RepackError(
                    "the source changed while it was read",
                    where=path,
                    expected="the size and time it had when it was opened",
                    hint="wait until nobody writes it, then run it again: nothing was made of it",
                )

    def _unpickled(self, path: Path) -> dict[str, torch.Tensor]:
        if path not in self._pickles:
            self._pickles[path] = _load_pickle(path)
        return self._pickles[path]

    def release(self) -> None:
        """Drop open pickles; old ones lie in memory whole. They are opened again when one of their tensors is requested."""
        self._pickles.clear()

    def origin(self) -> dict[str, str]:
        """Return its `source` and `revision`, and a `fingerprint` that differs whenever the weights may differ.

        The fingerprint covers sizes, headers and samples of the contents. For a Hub snapshot it also covers the repository, the
        commit and any subfolder; for a local folder, its path and the times of its files.
        """
        folder = self.files[0].parent
        found = find_snapshot(folder)
        source, revision = (found.name, found.commit) if found else (folder.name, "")
        source = source.encode("utf-8", "replace").decode()  # a file name may have bytes that are not text
        digest = hashlib.sha256(f"{FORMAT_VERSION}\n{source}\n".encode() + os.fsencode(f"{revision or folder.resolve()}\n"))
        for path in sorted(self.files):
            size, time = _state(path)
            digest.update(os.fsencode(f"{path.name} {size} {0 if revision else time}\n"))
            digest.update(_samples(path))
        digest.update(json.dumps([(n, str(d), list(s)) for n, (d, s) in sorted(self.specs.items())]).encode())
        return {"source": source, "revision": revision, "fingerprint": digest.hexdigest()[:32]}

    def identity(self, fingerprint: str, unit_ns: int = 1) -> str:
        """Return a hash that changes with every write to the files, even a write between the samples of the fingerprint.

        Args:
            fingerprint: from [`origin`].
            unit_ns: the unit in ns that file times are rounded down to. Some copies keep times only to the second.
        """
        states = [f"{path.name} {size} {time // unit_ns}" for path, (size, time) in sorted(self._states.items())]
        return hashlib.sha256(os.fsencode("\n".join([fingerprint, *states]))).hexdigest()[:32]


def _state(path: Path) -> tuple[int, int]:
    """Return a file's size in bytes and modification time in ns. Not its inode: some network file systems invent new ones."""
    with reading(path):
        found = os.stat(path)
    return found.st_size, found.st_mtime_ns


@dataclass(frozen=True)
class Snapshot:
    """A folder in the Hub's cache: the cache, the repository and any subfolder as one name, and the commit."""

    cache: Path
    name: str
    commit: str


def find_snapshot(folder: Path) -> Snapshot | None:
    """Return the snapshot that a folder belongs to, or `None` if it does not lie in the Hub's cache."""
    match = _SNAPSHOT.fullmatch(str(folder))
    if match is None:
        return None
    parts = [match["repo"].replace("--", "/"), *(part for part in [(match["inside"] or "").replace("\\", "/")] if part)]
    return Snapshot(Path(match["cache"]), "/".join(parts), match["commit"])


def _samples(path: Path) -> bytes:
    """Read some KiB from all over a file: other weights differ there, even with the same size and time."""
    with StoredFile(path) as file:
        starts = [file.nbytes * i // _SAMPLES for i in range(_SAMPLES)]
        return b"".join(file.read(min(256, file.nbytes - start), start) for start in starts)


def _load_pickle(path: Path) -> dict[str, torch.Tensor]:
    StoredFile(path).close()  # raises our error if it cannot be opened or is not a regular file
    try:
        mapped = zipfile.is_zipfile(path)
        if not mapped:
            logger.warning("hf_flash: %s is an old pickle that cannot be memory-mapped: it is read into memory whole", path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        raise StoreFormatError(
            "not a readable PyTorch checkpoint",
            where=path,
            got=(str(error).splitlines() or [type(error).__name__])[0],
            hint="the file is damaged or incomplete: download it again",
        ) from error
    tensors = (
        {str(name): value for name, value in state.items() if isinstance(value, torch.Tensor)}
        if isinstance(state, dict)
        else {}
    )
    if not tensors:
        raise StoreFormatError("no tensors in a PyTorch checkpoint", where=path, expected="a dictionary of tensors")
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """Find the weight files of a checkpoint folder, in the order of preference that transformers has."""
    for name in _WEIGHTS:
        path = folder / name
        if exists(path):
            if not name.endswith(".json"):
                return [path]
            shards = listed_files(path)
            missing = [shard.name for shard in shards if not exists(shard)]
            if missing:
                raise StoreMissingError(
                    "shards that the index lists are not there",
                    where=path,
                    got=", ".join(missing),
                    hint="download the checkpoint again",
                )
            return shards
    raise StoreMissingError("no weights in the folder", where=folder, expected=" or ".join(_WEIGHTS))


def given_files(folder: str, files: Sequence[str]) -> list[Path]:
    """Check the weight files that transformers found for a checkpoint, and return their paths.

    transformers does not check the names in an index. Here they must stay in the checkpoint's folder, and a safetensors index
    must not list pickles.

    Args:
        folder: what `from_pretrained` was called with: a folder, or a repository, whose files lie in the Hub's cache.
        files: the files that transformers found.

    Raises:
        StoreFormatError: a file is outside the folder, or is a pickle from a safetensors index.
    """
    paths, base = [Path(file) for file in files], Path(folder)
    if not folder or not base.is_dir():
        base = next((path.parent for path in paths if find_snapshot(path.parent)), paths[0].parent)
    for path in paths:
        name = path.relative_to(base).as_posix() if path.is_relative_to(base) else str(path)
        if not is_plain_name(name):
            raise StoreFormatError(
                "the index lists a file outside the checkpoint's folder",
                where=base,
                expected="names of files in it",
                got=ascii(str(path)),
                hint="do not load it, unless you know who made it",
            )
        if path.suffix != ".safetensors":
            for index in path.parent.glob("model.safetensors.index*.json"):
                if path.name in {listed.name for listed in listed_files(index)}:  # `listed_files` raises
                    raise StoreFormatError("a pickle out of a safetensors index", where=index, got=path.name)
    if len(paths) > 1 or paths[0].name not in _WEIGHTS:  # they come from an index
        check_inside(base, paths)
    return paths


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
    """Return the local folder of a checkpoint, downloaded from the Hub if `source` is the name of a repository.

    Safetensors weights are preferred; pickles are downloaded only if there are none.

    Args:
        source: a folder, or the name of a repository.
        revision, token, cache_dir, local_files_only: for the Hub, as in `from_pretrained`.
        subfolder: the folder inside `source` that holds the checkpoint.
        config_only: download only config.json and the measurements of a mixture's routers.

    Raises:
        ConfigError: `source` is neither a folder nor the name of a repository.
        StoreMissingError: the repository or revision does not exist, or the Hub cannot be reached.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder / subfolder
    if folder.exists():
        raise ConfigError("a file, and not the folder of a model", where=source, hint="name the folder that it is in")
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", str(source)):
        raise StoreMissingError("no such folder", where=source, hint=nearest(folder, Path.is_dir) or "check the name")
    where = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    inside = f"{subfolder.strip('/')}/" if subfolder.strip("/") else ""

    def download(allow: list[str], ignore: list[str]) -> Path:
        allow, ignore = [inside + pattern for pattern in allow], [inside + pattern for pattern in ignore]
        found = huggingface_hub.snapshot_download(str(source), allow_patterns=allow, ignore_patterns=ignore, **where)
        return Path(found) / inside

    try:
        if config_only:
            return download(["config.json", ROUTING_FILE], [])
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
            got=str(error).splitlines()[0].removeprefix("Got: "),
            hint=nearest(folder, Path.is_dir) or "check the name, the connection, and `token` for a private repository",
        ) from error
