"""Calls of the compiled part."""

from __future__ import annotations

import ctypes
from typing import Any, Final

import numpy as np
import torch

from hf_flash.base.arrays import Ids
from hf_flash.compute.library import (
    DTYPES,
    Job,
    _Linear,
    _Matrix,
    _Rows,
    _Several,
    library,
    threads,
)

_SHARED: Final = 1 << 18  # products that waking another thread is worth


_WORTH_COPYING: Final = 1 << 18  # bytes that waking another thread is worth


_TOKENS: Final = 1024  # that `TokensKernel` takes at a time: for more, its room would grow


_LEAST_SHARE: Final = 16  # neurons, at least, that are counted together (UP_ROWS of _native.c)


_TILE_BYTES: Final = 512  # of a row that are copied together (TILE_BYTES of _native.c)


class TokenRoom:
    """What one token needs beside its neurons; all layers of a model share it.

    Args:
        neurons: the most that it uses.
        d_model: width.
    """

    reads: Final = 1024  # missing neurons, at most, that the compiled part reads by itself

    def __init__(self, neurons: int, d_model: int) -> None:
        self.neurons = neurons
        self.hidden, self.wide = torch.empty(neurons, dtype=torch.float32, device="cpu"), np.empty(d_model, dtype=np.float32)
        self.active, *self.ids = (np.empty(neurons, dtype=np.int64) for _ in range(5))
        self.pairs, self.parts = (np.empty(2 * self.reads, dtype=np.int64) for _ in range(2))
        self.offsets, self.first = (np.empty(self.reads + 1, dtype=np.int64) for _ in range(2))

    @classmethod
    def nbytes(cls, neurons: int, d_model: int) -> int:
        return 44 * neurons + 4 * d_model + 48 * cls.reads + 16


class TokenKernel:
    """The arithmetic of one token over rows of a matrix, wherever they lie: `up`, as often as it takes, then `down`.

    Args:
        neurons: the most in one call.
        d_model: width.
    """

    def __init__(self, neurons: int, d_model: int) -> None:
        self._library = library()
        self.room = TokenRoom(neurons, d_model)
        self._everything: Ids = np.arange(neurons)
        self._job = Job()

    @staticmethod
    def nbytes(neurons: int, d_model: int) -> int:
        return 8 * neurons + TokenRoom.nbytes(neurons, d_model)

    @property
    def compiled(self) -> bool:
        """Whether there is a `library()`."""
        return self._library is not None

    def fits(self, x: torch.Tensor) -> bool:
        """Whether this can compute with `x`."""
        return self.compiled and x.dtype in DTYPES and x.is_contiguous()

    def set(self, x: torch.Tensor, bias: torch.Tensor | None, matrix: torch.Tensor, rows: Ids, ids: Ids, *, relu: bool) -> None:
        """What the next calls are about.

        Args:
            x: [1, d] in the dtype of compute.
            bias: [d_ff] of the up projection.
            matrix: [any, 2 * d], contiguous.
            rows, ids: [n] rows of `matrix`, and the neurons in them.
            relu: whether hidden values below zero become zero.
        """
        rows, ids = np.ascontiguousarray(rows), np.ascontiguousarray(ids)
        self._keep = x, bias, matrix, rows, ids
        self._job = Job(
            x=x.data_ptr(), matrix=matrix.data_ptr(), bias=None if bias is None else bias.data_ptr(), rows=rows.ctypes.data,
            ids=ids.ctypes.data, hidden=self.room.hidden.data_ptr(), wide=self.room.wide.ctypes.data,
            active=self.room.active.ctypes.data,
            n=len(rows), d=x.shape[1], dtype=DTYPES[x.dtype], relu=relu, threads=threads(),
        )  # fmt: skip

    def up(self, which: Ids | None = None) -> None:
        """Hidden values of some neurons.

        Args:
            which: positions in `rows`; `None`: all.
        """
        which = self._everything[: self._job.n] if which is None else which
        self._job.which, self._job.todo = which.ctypes.data, len(which)
        self._call(self._library.hf_up)  # type: ignore[union-attr]  # `fits` was asked

    @property
    def hidden(self) -> torch.Tensor:
        """float32 [n], to be read and changed between `up` and `down`."""
        return self.room.hidden[: self._job.n]

    def down(self, out: torch.Tensor) -> None:
        """Add hidden values times down projections to `out`, float32 [1, d], in the order of `rows`."""
        self._job.out = out.data_ptr()
        self._call(self._library.hf_down)  # type: ignore[union-attr]

    def _call(self, function: Any) -> None:
        function(ctypes.byref(self._job))


class TokensKernel:
    """The arithmetic of several tokens that each use neurons of their own. To be made only where there is a `library()`.

    The sums are those of [`TokenKernel`], in the same order: beside others or alone, on any number of threads, with AVX-512 and
    without, a token gets the same bits.

    Args:
        x: [tokens, d] in the dtype of compute, contiguous.
        used: bool [tokens, d_ff], contiguous: which neurons each token uses.
        bias: [d_ff] of the up projection. Hidden values below zero become zero.
        neurons: the most in one call.
        narrow: do without AVX-512.
    """

    def __init__(
        self, x: torch.Tensor, used: torch.Tensor, bias: torch.Tensor | None, neurons: int, *, narrow: bool = False
    ) -> None:
        self._x, self._used, self._bias, self._narrow = x, used, bias, narrow
        self._threads, self._most = threads(), min(len(x), _TOKENS)
        room = (4 * neurons, 2 * neurons, 4 * -(-neurons // _LEAST_SHARE))  # a token's: hidden values, whose they are, how many
        self._room = [torch.empty(self._most * size, dtype=torch.uint8, device="cpu") for size in room]
        self._packed = torch.empty(self._threads * neurons * _TILE_BYTES, dtype=torch.uint8, device="cpu")

    def add(self, rows: Ids, ids: Ids, out: torch.Tensor) -> None:
        """Add to each token's `out` what the neurons give that it uses.

        Args:
            rows, ids: [n] addresses of bundles, [2 * d] in the dtype of compute, and the neurons that they are of.
            out: float32 [tokens, d], contiguous.
        """
        rows, ids = np.ascontiguousarray(rows), np.ascontiguousarray(ids)
        hidden, place, count = (part.data_ptr() for part in self._room)
        for at in range(0, len(self._x), self._most):
            x, used = self._x[at : at + self._most], self._used[at : at + self._most]
            job = _Several(
                x=x.data_ptr(), bias=None if self._bias is None else self._bias.data_ptr(), rows=rows.ctypes.data,
                ids=ids.ctypes.data, used=used.data_ptr(), hidden=hidden, out=out[at:].data_ptr(), place=place, count=count,
                packed=self._packed.data_ptr(), n=len(rows), d=x.shape[1], d_ff=used.shape[1], tokens=len(x),
                dtype=DTYPES[x.dtype], threads=self._threads, narrow=self._narrow,
            )  # fmt: skip
            library().hf_several(ctypes.byref(job))  # type: ignore[union-attr]


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, narrow: bool = False) -> torch.Tensor:
    """`x @ weight.T + bias`, accumulated in fp32 and rounded once. To be called only where there is a `library()`.

    A token gets the same bits beside others and alone, on any number of threads, with AVX-512 and without.

    Args:
        x: [..., columns], contiguous. All in one dtype of `DTYPES`.
        weight: [rows, columns], contiguous. bias: [rows].
        narrow: do without AVX-512.

    Returns:
        [..., rows].
    """
    rows, columns = weight.shape
    out = torch.empty((*x.shape[:-1], rows), dtype=x.dtype, device="cpu")
    job = _Linear(
        weight.data_ptr(), None if bias is None else bias.data_ptr(), x.data_ptr(), None, out.data_ptr(),
        rows, columns, x.numel() // columns, DTYPES[x.dtype], threads(), narrow,
    )  # fmt: skip
    if not library().hf_linear(ctypes.byref(job)):  # type: ignore[union-attr]
        raise MemoryError(f"no memory for {x.numel()} numbers")
    return out


def copy_rows(source: torch.Tensor, those: Ids, target: torch.Tensor, places: Ids) -> bool:
    """`target[places] = source[those]`, of contiguous matrices as wide. Returns whether there is a `library()` to do it."""
    compiled = library()
    if compiled is None:
        return False
    there, here, size = addresses(source, those), addresses(target, places), source.shape[1] * source.element_size()
    job = _Rows(there.ctypes.data, here.ctypes.data, len(there), size, threads() if len(there) * size >= _WORTH_COPYING else 1)
    compiled.hf_copy(ctypes.byref(job))
    return True


def addresses(matrix: torch.Tensor, rows: Ids) -> Ids:
    """Where rows of a contiguous matrix are in memory, as [`TokensKernel`] wants them."""
    return np.asarray(matrix.data_ptr() + rows * (matrix.shape[1] * matrix.element_size()))


class Product:
    """A quantized matrix times tokens, each of them on its own. To be made only where there is a `library()`.

    Args:
        codes: int8 [rows, columns], or uint8 [rows, columns / 2] with `zeros`.
        scales, zeros: bfloat16 [rows, groups], in 8 bits one group; 32 columns or a multiple in a group of 4 bits.
    """

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None) -> None:
        self._keep, self._library = (codes, scales, zeros), library()
        self._rows, columns, groups = len(codes), codes.shape[1], 1
        if zeros is not None:
            columns, groups = 2 * columns, scales.shape[1]
        self._columns, self._groups, self._room = columns, groups, 8 * groups + 2 * (columns + 15 & ~15)  # bytes a token
        self._matrix = _Matrix(
            codes=codes.data_ptr(), scales=scales.data_ptr(), zeros=None if zeros is None else zeros.data_ptr(),
            rows=self._rows, columns=columns, group=columns // groups, bits=8 if zeros is None else 4,
        )  # fmt: skip

    def __call__(self, x: torch.Tensor, plus: torch.Tensor | None = None) -> torch.Tensor:
        """float32 [tokens, rows], from `x` float32 or bfloat16 [tokens, columns]; `plus` float32 [rows] is added."""
        out = torch.empty(x.shape[0], self._rows, dtype=torch.float32, device="cpu")
        self._matrix.called = None
        self._run(x, out, plus)
        return out

    def called(
        self,
        x: torch.Tensor,
        plus: torch.Tensor,
        *,
        times: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        first: Product | None = None,
    ) -> torch.Tensor:
        """Where the sums are not at or below zero, bool [tokens, rows].

        Args:
            x: float32 or bfloat16 [tokens, columns], or what `first` takes.
            plus: float32 [rows], added to the sums; `times` float32 [tokens] says how often.
            bias: [rows], added after that.
            first: another matrix, which `x` goes through before.
        """
        called = torch.empty(x.shape[0], self._rows, dtype=torch.bool, device="cpu")
        self._matrix.called = called.data_ptr()
        self._run(x, None, plus, times, bias, first)
        return called

    def _run(
        self,
        x: torch.Tensor,
        out: torch.Tensor | None,
        plus: torch.Tensor | None,
        times: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        first: Product | None = None,
    ) -> None:
        assert self._library is not None
        x, matrix, own = x.contiguous(), self._matrix, len(x) * self._room
        room = torch.empty(own if first is None else own + len(x) * first._room, dtype=torch.uint8, device="cpu")
        if first is not None:
            between = torch.empty(len(x), first._rows, dtype=torch.float32, device="cpu")
            first._set(x, between, room.data_ptr() + own)
            x = between
        self._set(x, out, room.data_ptr())
        matrix.plus, matrix.times, matrix.bias = (None if part is None else part.data_ptr() for part in (plus, times, bias))
        matrix.bias_dtype = 0 if bias is None else DTYPES[bias.dtype]
        matrix.first = None if first is None else ctypes.addressof(first._matrix)
        matrix.threads = threads() if len(x) * self._rows * self._columns >= _SHARED else 1
        self._library.hf_multiply(ctypes.byref(matrix))

    def _set(self, x: torch.Tensor, out: torch.Tensor | None, room: int) -> None:
        """Input, output, and the address of room for x in steps."""
        matrix, tokens = self._matrix, len(x)
        matrix.x, matrix.dtype, matrix.tokens = x.data_ptr(), DTYPES[x.dtype], tokens
        matrix.out = None if out is None else out.data_ptr()
        matrix.step, matrix.sums = room, room + 4 * tokens * self._groups
        matrix.steps = room + 8 * tokens * self._groups
