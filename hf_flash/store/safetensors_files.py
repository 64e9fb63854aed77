"""Safetensors files: their headers, checked before anything else is read or allocated, and their tensors, read piece by piece.

This reader is stricter than the safetensors library, never laxer (tests/store/test_hostile_store.py compares them): a header
has at most `TEXT_BYTES`, a tensor at most 64 dimensions and one of the dtypes below, a number at most 18 digits; no key comes
twice, and a tensor's entry has exactly its three keys.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from hf_flash.base.arrays import Bytes, runs
from hf_flash.base.buffers import aligned_empty
from hf_flash.base.files import DIGITS, TEXT_BYTES, StoredFile, parse_json
from hf_flash.errors import StoreFormatError

DTYPES: Final[dict[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "BOOL": torch.bool,
}
DTYPE_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}
PIECE_BYTES: Final = 4 << 20  # read at a time
TensorSpec = tuple[torch.dtype, tuple[int, ...]]
_ENTRY: Final = {"dtype", "shape", "data_offsets"}
_LARGE_BYTES: Final = 1 << 18
_MOST_DIMS: Final = 64


def nbytes_of(spec: TensorSpec) -> int:
    """Return the bytes of a tensor."""
    return spec[0].itemsize * math.prod(spec[1])


def read_header(path: Path) -> tuple[dict[str, tuple[TensorSpec, int]], dict[str, str]]:
    """Read the header of a safetensors file.

    Returns:
        The dtype, shape and absolute byte offset of each tensor by name, and the metadata.

    Raises:
        StoreMissingError, StoreReadError: the file cannot be opened or read.
        StoreFormatError: it is not a valid safetensors file, or has tensors of a dtype that hf_flash cannot carry.
    """
    with StoredFile(path) as file:
        text = _header_text(file)
        try:
            header = _parsed(text, path)
            return _checked(header, len(text), file.nbytes, path)
        except _Wrong as error:
            raise _invalid(path, str(error)) from error


def header_digest(path: Path) -> str:
    """Return the hash of a header. In our files the header holds the CRC-32 of the data, so the hash identifies the file."""
    with StoredFile(path) as file:
        return hashlib.sha256(_header_text(file)).hexdigest()[:32]


def data_offset(file: StoredFile) -> int:
    """Return the byte where a safetensors file's data begins."""
    return 8 + len(_header_text(file))


class _Wrong(Exception):
    """What is wrong with a header."""


def _invalid(path: Path, got: str) -> StoreFormatError:
    hint = "the file is damaged or incomplete: download or repack it again"
    return StoreFormatError("not a valid safetensors file", where=path, got=got, hint=hint)


def _header_text(file: StoredFile) -> bytes:
    if file.nbytes < 8:
        raise _invalid(file.path, f"{file.nbytes} bytes")
    size = int.from_bytes(file.read(8, 0), "little")
    if size > min(TEXT_BYTES, file.nbytes - 8):
        raise _invalid(file.path, f"a header of {size} bytes in a file of {file.nbytes}; {TEXT_BYTES} are allowed")
    return file.read(size, 8)


def _parsed(text: bytes, path: Path) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise _Wrong("a key that comes twice")
        return found

    def whole(digits: str) -> int:
        if len(digits) > DIGITS or digits.startswith("-"):
            raise _Wrong(f"the number {digits[:24]}")
        return int(digits)

    def refused(text: str) -> None:
        raise _Wrong(f"the number {text[:24]}")

    if not text.startswith(b"{"):
        raise _Wrong(f"a header that begins with {text[:8]!r}")
    try:
        header = parse_json(text, path, object_pairs_hook=once, parse_int=whole, parse_float=refused, parse_constant=refused)
    except StoreFormatError as error:
        raise _Wrong(f"a header that is no JSON: {error.__cause__}"[:200]) from error
    assert isinstance(header, dict)  # it begins with a brace
    return header


def _checked(
    header: dict[str, Any], size: int, file_bytes: int, path: Path
) -> tuple[dict[str, tuple[TensorSpec, int]], dict[str, str]]:
    meta = header.pop("__metadata__", None)
    meta = {} if meta is None else meta
    if not isinstance(meta, dict) or not all(isinstance(value, str) for value in meta.values()):
        raise _Wrong("metadata that is not all text")
    for text in (*header, *meta, *meta.values()):
        if not text.isascii():
            _check_text(text)
    for name, info in header.items():
        _check_entry(name, info)
    unknown = {info["dtype"] for info in header.values()} - DTYPES.keys()
    if unknown:
        raise StoreFormatError("tensors of a dtype that hf_flash cannot carry", where=path, got=sorted(unknown)[:10])
    end = 0
    for name, info in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = info["data_offsets"]
        if start != end:
            raise _Wrong(f"{name!r} begins at {start}, the one before ends at {end}")
        needed = nbytes_of((DTYPES[info["dtype"]], info["shape"]))
        if stop - start != needed:
            raise _Wrong(f"{name!r} has {stop - start} bytes, its shape and dtype need {needed}")
        end = stop
    if 8 + size + end != file_bytes:
        raise _Wrong(f"{file_bytes} bytes, the header says {8 + size + end}")
    return {
        name: ((DTYPES[info["dtype"]], tuple(info["shape"])), 8 + size + info["data_offsets"][0])
        for name, info in header.items()
    }, meta


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _Wrong("text that is not Unicode") from error


def _check_entry(name: str, info: object) -> None:
    """Refuse a tensor's entry that lacks its keys, or whose shape and offsets are not whole numbers."""
    if not isinstance(info, dict) or info.keys() != _ENTRY or not isinstance(info["dtype"], str):
        raise _Wrong(f"an entry {name!r} without dtype, shape and data_offsets")
    shape, offsets = info["shape"], info["data_offsets"]
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(value) is int for value in numbers):
            raise _Wrong(f"{name!r} with a shape or offsets that are no whole numbers")
    if len(shape) > _MOST_DIMS or len(offsets) != 2:
        raise _Wrong(f"{name!r} with {len(shape)} dimensions and {len(offsets)} offsets")


# --- tensors ------------------------------------------------------------------------------------------------------------


def new_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Make an uninitialised tensor in memory. A large one gets its own pages, which return to the system when it is freed."""
    if nbytes_of((dtype, shape)) < _LARGE_BYTES:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return aligned_empty(shape, dtype)


def as_bytes(tensor: torch.Tensor) -> Bytes:
    """Return a view of a contiguous tensor's memory, uint8 [n]."""
    found: Bytes = tensor.view(-1).view(torch.uint8).numpy() if tensor.numel() else np.empty(0, np.uint8)
    return found


def read_tensor(file: StoredFile, spec: TensorSpec, offset: int) -> torch.Tensor:
    """Read a whole tensor into memory."""
    tensor = new_tensor(spec[1], spec[0])
    file.read_into(as_bytes(tensor), offset)
    return tensor


def read_pieces(file: StoredFile, spec: TensorSpec, offset: int) -> Iterator[torch.Tensor]:
    """Yield a tensor as flat pieces of some MiB, in order. All pieces share one buffer."""
    count, step = math.prod(spec[1]), PIECE_BYTES // spec[0].itemsize
    buffer = new_tensor((min(count, step),), spec[0])
    for at in range(0, count, step):
        piece = buffer[: min(step, count - at)]
        file.read_into(as_bytes(piece), offset + at * spec[0].itemsize)
        yield piece


class Rows:
    """A matrix in a file. Slicing it reads the requested rows and no others.

    Args:
        columns: which columns to return.
        place: the row of the file that holds each row; `None`: rows are in the order of the file.
    """

    def __init__(
        self,
        file: StoredFile,
        spec: TensorSpec,
        offset: int,
        columns: slice = slice(None),
        place: npt.NDArray[np.int32] | None = None,
    ) -> None:
        self.dtype, (self._count, self._width) = spec
        self._file, self._offset, self._place = file, offset, place
        self._columns = range(self._width)[columns]
        self.shape = torch.Size((self._count, len(self._columns)))

    @property
    def nbytes(self) -> int:
        """Bytes of its rows, counting only the columns that it returns."""
        return self.shape.numel() * self.dtype.itemsize

    def __getitem__(self, ids: slice) -> torch.Tensor:
        start, stop, _ = ids.indices(self._count)
        out = new_tensor((max(0, stop - start), len(self._columns)), self.dtype)
        whole = len(self._columns) == self._width
        step = max(1, PIECE_BYTES // (self._width * self.dtype.itemsize))
        for at in range(start, stop, step):
            part = out[at - start : at - start + step]
            if whole and self._place is None:
                self._read(at, part)
            else:
                part.copy_(self._rows(at, at + len(part))[:, self._columns.start : self._columns.stop])
        return out

    def pieces(self, rows: int) -> Iterator[torch.Tensor]:
        """Yield the matrix, `rows` rows at a time. A piece is a view into a buffer that the next piece overwrites."""
        buffer = new_tensor((min(rows, self._count), self._width), self.dtype)
        for at in range(0, self._count, rows):
            part = buffer[: self._count - at]
            if self._place is None:
                self._read(at, part)
            else:
                part = self.gather(self._place[at : at + rows], part)
            yield part[:, self._columns.start : self._columns.stop]

    def _rows(self, start: int, stop: int) -> torch.Tensor:
        buffer = new_tensor((stop - start, self._width), self.dtype)
        if self._place is None:
            self._read(start, buffer)
            return buffer
        return self.gather(self._place[start:stop], buffer)

    def gather(self, rows: npt.NDArray[np.integer[Any]], buffer: torch.Tensor) -> torch.Tensor:
        """Read whole rows of the file in any order. `buffer` has room for all of them: neighbours are read together."""
        order = np.argsort(rows, kind="stable")
        ascending = rows[order]
        for begin, end in runs(ascending):
            self._read(int(ascending[begin]), buffer[begin:end])
        back = np.empty(len(rows), np.int64)
        back[order] = np.arange(len(rows))
        return buffer[torch.from_numpy(back)]

    def _read(self, row: int, out: torch.Tensor) -> None:
        self._file.read_into(as_bytes(out), self._offset + row * self._width * self.dtype.itemsize)
