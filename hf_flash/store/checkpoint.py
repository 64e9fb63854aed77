"""Plain checkpoints: a folder, a Hub repository or a list of files, seen as named tensors that stay on disk until used.

It reads what transformers reads: `model.safetensors` or `pytorch_model.bin`, single or sharded. Safetensors are read in pieces
and never mapped; pickles are opened with `weights_only`, and memory-mapped.
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
from hf_flash.base.files import StoredFile, absolute, check_inside, exists, is_plain_name, listed_files, reading
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
    """Tensors by name over one or more files."""

    files: list[Path]
    specs: dict[str, TensorSpec] = field(default_factory=dict)
    _where: dict[str, tuple[Path, int]] = field(default_factory=dict)  # file and byte
    _states: dict[Path, tuple[int, int]] = field(default_factory=dict)  # of the files, when they were opened
    _pickles: dict[Path, dict[str, torch.Tensor]] = field(default_factory=dict)

    @classmethod
    def open(cls, files: list[Path]) -> Checkpoint:
        """Open weight files: all safetensors or all pickles.

        Raises:
            StoreMissingError, StoreFormatError: with the file and what is wrong with it.
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
        """Open the weights in a folder as transformers would choose them."""
        return cls.open(weight_files(folder))

    def tensors_by_file(self) -> dict[Path, list[str]]:
        """The names of the tensors in each file, in the order of the file."""
        found: dict[Path, list[str]] = {path: [] for path in self.files}
        for name in sorted(self.specs, key=lambda name: self._where[name][1]):
            found[self._where[name][0]].append(name)
        return found

    def place(self, name: str) -> tuple[Path, int]:
        """The file that holds a tensor, and the byte where it begins there.

        Raises:
            StoreFormatError: it is pickled, so that it cannot be read where it lies.
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
        """Whether a tensor is no pickle."""
        return bool(self._where) and self._where[name][0].suffix == ".safetensors"

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, in memory; memory-mapped if it is pickled."""
        path, offset = self._where[name]
        if path.suffix != ".safetensors":
            return self._unpickled(path)[name]
        with StoredFile(path) as file:
            return read_tensor(file, self.specs[name], offset)

    def in_memory(self, name: str) -> torch.Tensor:
        """One tensor, contiguous, in memory even if it is pickled."""
        tensor = self.tensor(name)
        return tensor if self._where[name][0].suffix == ".safetensors" else copy_to_memory(tensor)

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """One tensor in pieces of some MiB, in its own order, which share a buffer."""
        path, offset = self._where[name]
        if path.suffix != ".safetensors":
            yield self._unpickled(path)[name]
            return
        with StoredFile(path) as file:
            yield from read_pieces(file, self.specs[name], offset)

    def rows(self, name: str) -> Rows | torch.Tensor:
        """One matrix whose rows are read by slices when they are asked for."""
        path, offset = self._where[name]
        if path.suffix != ".safetensors":
            return self._unpickled(path)[name]
        return Rows(StoredFile(path), self.specs[name], offset)

    def check_unchanged(self) -> None:
        """Refuse files that were written to or replaced since they were opened.

        Raises:
            RepackError: with the file.
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
        """Let go of open pickles, of which old ones lie in memory whole. They are opened again when a tensor is asked for."""
        self._pickles.clear()

    def origin(self) -> dict[str, str]:
        """Say where it comes from: `source`, `revision`, and a `fingerprint` that differs whenever the weights may differ.

        The fingerprint is made of sizes, headers and samples of the contents. A Hub snapshot adds repository and commit, and
        the folder in it where it is not at the top; a local folder adds its path and the times of its files.
        """
        folder = self.files[0].parent
        found = find_snapshot(folder)
        source, revision = (found.name, found.commit) if found else (folder.name, "")
        source = source.encode("utf-8", "replace").decode()  # a name of a file system may have bytes that are no text
        digest = hashlib.sha256(f"{FORMAT_VERSION}\n{source}\n".encode() + os.fsencode(f"{revision or folder.resolve()}\n"))
        for path in sorted(self.files):
            size, time = _state(path)
            digest.update(os.fsencode(f"{path.name} {size} {0 if revision else time}\n"))
            digest.update(_samples(path))
        digest.update(json.dumps([(n, str(d), list(s)) for n, (d, s) in sorted(self.specs.items())]).encode())
        return {"source": source, "revision": revision, "fingerprint": digest.hexdigest()[:32]}

    def identity(self, fingerprint: str, unit_ns: int = 1) -> str:
        """A text that changes with every write to the files, even one between the samples of the fingerprint.

        Args:
            fingerprint: as [`origin`] has it.
            unit_ns: the unit that times are rounded down to. Some copies keep times to the second only.
        """
        states = [f"{path.name} {size} {time // unit_ns}" for path, (size, time) in sorted(self._states.items())]
        return hashlib.sha256(os.fsencode("\n".join([fingerprint, *states]))).hexdigest()[:32]


def _state(path: Path) -> tuple[int, int]:
    """Size and time of last modification in ns. Not the inode, which some network file systems make up anew."""
    with reading(path):
        found = os.stat(path)
    return found.st_size, found.st_mtime_ns


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


def _samples(path: Path) -> bytes:
    """Some KiB from all over a file: other weights differ there, even under the same size and time."""
    with StoredFile(path) as file:
        starts = [file.nbytes * i // _SAMPLES for i in range(_SAMPLES)]
        return b"".join(file.read(min(256, file.nbytes - start), start) for start in starts)


def _load_pickle(path: Path) -> dict[str, torch.Tensor]:
    StoredFile(path).close()  # what cannot be opened, or is no regular file, is said so
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
    """The weight files of a checkpoint folder, in the order of preference that transformers has."""
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
    """The weight files that transformers found for a checkpoint. It takes the names in an index as they are; here they stay in
    the checkpoint's folder, and there is no pickle among those of a safetensors index.

    Args:
        folder: what `from_pretrained` was called with: a folder, or a repository, whose files lie in the Hub's cache.

    Raises:
        StoreFormatError: with what is wrong.
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
                if path.name in {listed.name for listed in listed_files(index)}:  # an error where it is listed
                    raise StoreFormatError("a pickle out of a safetensors index", where=index, got=path.name)
    if len(paths) > 1 or paths[0].name not in _WEIGHTS:  # out of an index
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
    """The local folder of a checkpoint, downloaded from the Hub if `source` is a repository's name.

    Safetensors weights are preferred; pickles are downloaded only where there are none. `subfolder`: where in the repository
    or folder it is. `config_only` fetches nothing else but what was measured of a mixture's routers.
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
            got=str(error).splitlines()[0],
            hint="check the name, the connection, and `token` for a private repository",
        ) from error
