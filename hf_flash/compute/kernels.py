"""Calls of the compiled part that compute, to be made only where there is a `library()`.

    TokenKernel      one token and the rows of some neurons, multiplied where they lie; runtime/token_step.py does the same with
                     window and reads in one call
    TokensKernel     the same for several tokens, each with neurons of its own
    Product          a quantized matrix, to be multiplied with tokens
    linear           a matrix that stays in memory times a few tokens
    quantize         a matrix becomes a quantized one
    copy_rows        scattered rows, or a part of them, to scattered places; gather: a part of scattered units to one place
    count_uses       which neurons some tokens use

[`supports`] says whether it knows a layout of units.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch

from hf_flash.base.arrays import Ids
from hf_flash.compute import library as native
from hf_flash.compute.activation import Activation
from hf_flash.compute.library import (
    DTYPES,
    ActivationFunction,
    CopyJob,
    LinearJob,
    ProductJob,
    QuantizeJob,
    RowLayout,
    TokenJob,
    TokensJob,
)
from hf_flash.store.unit import Role, UnitLayout

Biases = Mapping[Role, torch.Tensor | None]
"""Of a layer's projections, by part: [d_ff] in the dtype of compute, `down` [d_model]."""

_ROLES: Final = (("up", "down"), ("gate", "up", "down"))  # of the parts of a unit, in their order
_SHARED: Final = 1 << 18  # products that waking another thread is worth
_WORTH_QUANTIZING: Final = 1 << 14  # weights that waking another thread is worth
_WORTH_COPYING: Final = 1 << 18  # bytes that waking another thread is worth
_TOKENS: Final = 1024  # that `TokensKernel` takes at a time: for more, its room would grow
EVERY_COLUMN: Final = slice(None)
_TILE_BYTES: Final = 512  # of a row that are copied together (TILE_BYTES of native.h)


def supports(layout: UnitLayout) -> bool:
    """Whether the compiled part can compute with units of this layout, as they lie in memory.

    With an activation that it knows (`Activation.code`) it computes layers whole; with others it does the products.
    """
    return layout.roles in _ROLES and layout.dtype in DTYPES


def row_layout(layout: UnitLayout, alone: Role | None = None) -> RowLayout:
    """A layout as the compiled part wants it. `alone`: the one part that is multiplied with x."""
    gate = layout.offset("gate") if alone is None and "gate" in layout.roles else -1
    return RowLayout(layout.row_bytes, gate, layout.offset(alone or "up"), layout.offset("down"), layout.width)


def activation_function(activation: Activation | None) -> ActivationFunction:
    """An activation as the compiled part wants it. `None`: products stay as they are."""
    if activation is None:
        return ActivationFunction()
    return ActivationFunction(activation.level, activation.code, activation.of_both)


def address_of(tensor: torch.Tensor | None) -> int | None:
    """Where a tensor's numbers are in memory; `None` without one."""
    return None if tensor is None else tensor.data_ptr()


class TokenRoom:
    """What a few tokens need beside their neurons; all layers of a model share it.

    Args:
        neurons: the most that they use: those of the widest layer.
        d_model: width.
    """

    tokens: Final = 16  # at most, in one call (MOST_TOKENS of step.c)
    reads: Final = 1024  # missing neurons, at most, that the compiled part reads by itself

    def __init__(self, neurons: int, d_model: int) -> None:
        self.neurons = neurons
        self.hidden = torch.empty(neurons, dtype=torch.float32, device="cpu")
        self.hidden_of_several = torch.empty(self.tokens, neurons, dtype=torch.float32, device="cpu")  # or 16 bits
        self.x_f32 = np.empty(d_model, dtype=np.float32)
        self.active, self.ids, self.rows = (np.empty(neurons, dtype=np.int64) for _ in range(3))
        self.resident_at, self.missing_at = (np.empty(neurons, dtype=np.int64) for _ in range(2))
        self.incoming, self.pieces = (np.empty(2 * self.reads, dtype=np.int64) for _ in range(2))
        self.offsets, self.first = (np.empty(self.reads + 1, dtype=np.int64) for _ in range(2))
        self.used_by_any, self.places = np.empty(neurons, dtype=np.uint8), np.empty(neurons, dtype=np.int64)
        self.several = TokensRoom(self.tokens, neurons)

    @classmethod
    def nbytes(cls, neurons: int, d_model: int) -> int:
        return (53 + 4 * cls.tokens) * neurons + 4 * d_model + 48 * cls.reads + 16 + TokensRoom.nbytes(cls.tokens, neurons)


class TokensRoom:
    """Room for those hidden values of several tokens that are not zero.

    Args:
        tokens: the most in a call.
        neurons: the most that they use.
    """

    def __init__(self, tokens: int, neurons: int) -> None:
        sizes = (4 * tokens * neurons, 2 * tokens * neurons, 4 * tokens)
        self._keep = [torch.empty(size, dtype=torch.uint8, device="cpu") for size in sizes]
        self.values, self.row_of, self.count = (part.data_ptr() for part in self._keep)

    @staticmethod
    def nbytes(tokens: int, neurons: int) -> int:
        return 6 * tokens * neurons + 4 * tokens


class TokenKernel:
    """The arithmetic of one token over rows of a matrix, wherever they lie.

    `up`, as often as it takes, makes hidden values. Where the compiled part does not know the activation, it makes products
    with the part that decides (`UnitLayout.deciding`), and with a gate `gated_up` follows. At the end `down`.

    Args:
        neurons: the most in one call.
        layout: of the rows, one that is supported.
        activation: one that the compiled part knows, or `None`.
    """

    def __init__(self, neurons: int, layout: UnitLayout, activation: Activation | None) -> None:
        self._library, self._function = native.loaded(), activation_function(activation)
        self.room = TokenRoom(neurons, layout.width)
        self._all_positions: Ids = np.arange(neurons)
        self._job = TokenJob()
        self._layout = row_layout(layout, None if activation else layout.deciding)
        self._multiplied: Role = "up" if activation else layout.deciding
        self._gated = row_layout(layout, "up") if layout.deciding == "gate" and activation is None else None
        self._products = torch.zeros(0 if self._gated is None else neurons, dtype=torch.float32, device="cpu")

    @staticmethod
    def nbytes(neurons: int, layout: UnitLayout) -> int:
        return (12 if layout.deciding == "gate" else 8) * neurons + TokenRoom.nbytes(neurons, layout.width)

    def set(self, x: torch.Tensor, biases: Biases, matrix: torch.Tensor, rows: Ids, ids: Ids) -> None:
        """Set the token and the neurons that the next calls work on.

        Args:
            x: [1, width] in the dtype of compute, contiguous.
            biases: of the layer.
            matrix: [any, numbers of a row], contiguous.
            rows, ids: [n] rows of `matrix`, and the neurons in them.
        """
        rows, ids = np.ascontiguousarray(rows), np.ascontiguousarray(ids)
        self._keep = x, biases, matrix, rows, ids
        room = self.room
        self._job = TokenJob(
            layout=self._layout, x=x.data_ptr(), matrix=matrix.data_ptr(), gate_bias=address_of(biases.get("gate")),
            bias=address_of(biases[self._multiplied]), rows=rows.ctypes.data, ids=ids.ctypes.data,
            hidden=room.hidden.data_ptr(), x_f32=room.x_f32.ctypes.data, active=room.active.ctypes.data, n=len(rows),
            activation=self._function, dtype=DTYPES[x.dtype], threads=native.threads(),
        )  # fmt: skip

    def up(self, positions: Ids | None = None) -> None:
        """Hidden values of some neurons.

        Args:
            positions: in `rows`; `None`: all.
        """
        positions = self._all_positions[: self._job.n] if positions is None else positions
        self._job.positions, self._job.todo = positions.ctypes.data, len(positions)
        self._call(self._library.hf_up)  # type: ignore[union-attr]

    def gated_up(self, bias: torch.Tensor | None) -> torch.Tensor:
        """Products with the up part, float32 [n], beside those of `up` with the gate. `bias` [d_ff] is of the up part."""
        assert self._gated is not None
        job, found = self._job, self._products[: self._job.n]
        kept = job.layout, job.bias, job.hidden
        job.layout, job.bias, job.hidden = self._gated, address_of(bias), found.data_ptr()
        self.up()
        job.layout, job.bias, job.hidden = kept
        return found

    @property
    def hidden(self) -> torch.Tensor:
        """float32 [n], to be read and changed between `up` and `down`."""
        return self.room.hidden[: self._job.n]

    def down(self, out: torch.Tensor) -> None:
        """Add hidden values times down projections to `out`, float32 [1, width], in the order of `rows`."""
        self._job.out = out.data_ptr()
        self._call(self._library.hf_down)  # type: ignore[union-attr]

    def _call(self, function: Any) -> None:
        function(ctypes.byref(self._job))


class TokensKernel:
    """The arithmetic of several tokens, each of which has hidden values of its own that are not zero.

    The sums are those of [`TokenKernel`], in the same order: beside others or alone, on any number of threads, with AVX-512 and
    without, a token gets the same bits.

    Args:
        layout: of the rows, one that is supported.
        tokens: how many.
        neurons: the most in one call.
        avx512: whether AVX-512 may be used.
    """

    def __init__(self, layout: UnitLayout, tokens: int, neurons: int, *, avx512: bool = True) -> None:
        self._layout, self._avx512 = layout, avx512
        self._threads, self._most = native.threads(), min(tokens, _TOKENS)
        self._room, self._every = TokensRoom(self._most, neurons), np.arange(neurons)
        self._packed = torch.empty(self._threads * neurons * _TILE_BYTES, dtype=torch.uint8, device="cpu")

    def hidden(
        self, x: torch.Tensor, used: torch.Tensor | None, biases: Biases, rows: Ids, ids: Ids, activation: Activation
    ) -> torch.Tensor:
        """Hidden values, [tokens, n] in the dtype of compute; zero for neurons that a token does not use.

        Args:
            x: [tokens, width] in the dtype of compute, contiguous.
            used: bool [tokens, d_ff], contiguous: which neurons each token uses; `None`: all.
            biases: of the layer.
            rows, ids: [n] addresses of units, in the dtype of compute, and the neurons that they are of.
            activation: one that the compiled part knows.
        """
        return self._up(
            x, used, rows, ids, activation=activation_function(activation),
            gate_bias=address_of(biases.get("gate")), bias=address_of(biases["up"]),
        )  # fmt: skip

    def product(self, x: torch.Tensor, bias: torch.Tensor | None, rows: Ids, ids: Ids, role: Role) -> torch.Tensor:
        """x times a part of every neuron, and the bias of that part [d_ff]: [tokens, n] in the dtype of compute."""
        return self._up(x, None, rows, ids, layout=row_layout(self._layout, role), bias=address_of(bias))

    def _up(self, x: torch.Tensor, used: torch.Tensor | None, rows: Ids, ids: Ids, **fields: Any) -> torch.Tensor:
        """`fields` of the job: what is multiplied, and what is done with the products."""
        rows, ids = np.ascontiguousarray(rows), np.ascontiguousarray(ids)
        hidden = torch.empty(len(x), len(rows), dtype=x.dtype, device="cpu")
        for at in range(0, len(x), self._most):
            job = self._job(hidden[at : at + self._most], rows)
            for name, value in fields.items():
                setattr(job, name, value)
            job.x, job.ids, job.positions, job.todo = x[at:].data_ptr(), ids.ctypes.data, self._every.ctypes.data, len(rows)
            if used is not None:
                job.used, job.d_ff = used[at:].data_ptr(), used.shape[1]
            native.loaded().hf_several_up(ctypes.byref(job))  # type: ignore[union-attr]
        return hidden

    def down(self, hidden: torch.Tensor, rows: Ids, out: torch.Tensor, *, at_most: float = 1.0) -> torch.Tensor | None:
        """Add hidden times the down projections to each token's `out`, neuron by neuron, over the values that are not zero.

        Args:
            hidden: [tokens, n] in the dtype of compute, contiguous.
            rows: [n] addresses of units.
            out: float32 [tokens, width], contiguous.
            at_most: share of the hidden values that may count.

        Returns:
            The tokens that are left to be done, since more of their values count: a slice of `hidden`. `None`: none are.
        """
        rows = np.ascontiguousarray(rows)
        for at in range(0, len(hidden), self._most):
            job = self._job(hidden[at : at + self._most], rows)
            job.out = out[at:].data_ptr()
            if native.loaded().hf_several_nonzero(ctypes.byref(job)) > at_most * job.tokens * job.n:  # type: ignore[union-attr]
                return hidden[at:]
            native.loaded().hf_several_down(ctypes.byref(job))  # type: ignore[union-attr]
        return None

    def _job(self, hidden: torch.Tensor, rows: Ids) -> TokensJob:
        room = self._room
        return TokensJob(
            layout=row_layout(self._layout), rows=rows.ctypes.data, hidden=hidden.data_ptr(),
            values=room.values, row_of=room.row_of, count=room.count, packed=self._packed.data_ptr(),
            n=len(rows), tokens=len(hidden), dtype=DTYPES[hidden.dtype], threads=self._threads, no_avx512=not self._avx512,
        )  # fmt: skip


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, avx512: bool = True) -> torch.Tensor:
    """`x @ weight.T + bias`, accumulated in fp32 and rounded once.

    A token gets the same bits beside others and alone, on any number of threads, with AVX-512 and without.

    Args:
        x: [..., columns], contiguous. All in one dtype of `DTYPES`.
        weight: [rows, columns], contiguous. bias: [rows].
        avx512: whether AVX-512 may be used.

    Returns:
        [..., rows].

    Raises:
        MemoryError: there is none for `x` in fp32.
    """
    rows, columns = weight.shape
    out = torch.empty((*x.shape[:-1], rows), dtype=x.dtype, device="cpu")
    job = LinearJob(
        weight=weight.data_ptr(), bias=address_of(bias), x=x.data_ptr(), out=out.data_ptr(), rows=rows, columns=columns,
        tokens=x.numel() // columns, out_stride=rows, dtype=DTYPES[x.dtype], weight_dtype=DTYPES[x.dtype],
        threads=native.threads(), no_avx512=not avx512,
    )  # fmt: skip
    if not native.loaded().hf_linear(ctypes.byref(job)):  # type: ignore[union-attr]
        raise MemoryError(f"no memory for {x.numel()} numbers")
    return out


def quantize(w: torch.Tensor, bits: int, group: int) -> dict[str, torch.Tensor]:
    """Quantize the rows of a matrix; predictors/low_bit.py: `quantize_rows` says how, and has torch's way to the same bits.

    Args:
        w: [rows, columns] in a dtype of `DTYPES`, the numbers of a row side by side, and rows as far apart as they are.

    Returns:
        As `quantize_rows` does.
    """
    (rows, columns), groups = w.shape, w.shape[1] // group
    codes: Any = ((rows, columns // 2), torch.uint8) if bits == 4 else ((rows, columns), torch.int8)
    names = ("scales", "zeros") if bits == 4 else ("scales",)
    out = {"codes": torch.empty(codes[0], dtype=codes[1], device="cpu")}
    out |= {name: torch.empty(rows, groups, dtype=torch.bfloat16, device="cpu") for name in names}
    out |= {"error": torch.empty(rows, dtype=torch.float32, device="cpu")}
    job = QuantizeJob(
        weights=w.data_ptr(), rows=rows, columns=columns, group=group, row_bytes=w.stride(0) * w.element_size(), bits=bits,
        dtype=DTYPES[w.dtype], threads=native.threads() if w.numel() >= _WORTH_QUANTIZING else 1,
        **{name: part.data_ptr() for name, part in out.items()},
    )  # fmt: skip
    native.loaded().hf_quantize(ctypes.byref(job))  # type: ignore[union-attr]
    return out


def copy_rows(source: torch.Tensor, rows: Ids, target: torch.Tensor, places: Ids, columns: slice = EVERY_COLUMN) -> None:
    """`target[places, columns] = source[rows, columns]`, of contiguous matrices as wide."""
    first, last, _ = columns.indices(source.shape[1])
    size = source.element_size()
    _copy(addresses(source, rows) + first * size, addresses(target, places) + first * size, (last - first) * size)


def count_uses(before: torch.Tensor) -> tuple[Ids, Ids]:
    """Count, for each neuron, the tokens whose pre-activation is above zero.

    Args:
        before: [tokens, n] in a dtype of `DTYPES`, contiguous.

    Returns:
        int64 [n] how many, and int64 [n] the number of the last of them, from 1 on; 0: none.
    """
    tokens, neurons = before.shape
    uses, last = np.zeros(neurons, dtype=np.int64), np.zeros(neurons, dtype=np.int64)
    native.loaded().hf_count_uses(  # type: ignore[union-attr]
        before.data_ptr(), tokens, neurons, DTYPES[before.dtype], uses.ctypes.data, last.ctypes.data
    )
    return uses, last


def gather(rows: Ids, layout: UnitLayout, role: Role, target: torch.Tensor) -> torch.Tensor:
    """A part of units at addresses `rows` [n], one after the other: [n, width] at the beginning of `target`, contiguous."""
    gathered = target.view(-1)[: len(rows) * layout.width].view(len(rows), layout.width)
    _copy(rows + layout.offset(role), addresses(gathered, np.arange(len(rows))), layout.width * target.element_size())
    return gathered


def _copy(source: Ids, target: Ids, size: int) -> None:
    """Copy `size` bytes from each address to another."""
    count = native.threads() if len(source) * size >= _WORTH_COPYING else 1
    job = CopyJob(source.ctypes.data, target.ctypes.data, len(source), size, count)
    native.loaded().hf_copy(ctypes.byref(job))  # type: ignore[union-attr]


def addresses(matrix: torch.Tensor, rows: Ids) -> Ids:
    """Where rows of a contiguous matrix are in memory, as [`TokensKernel`] wants them."""
    return np.asarray(matrix.data_ptr() + rows * (matrix.shape[1] * matrix.element_size()))


class Product:
    """A quantized matrix times tokens, each of them on its own.

    Args:
        codes: int8 [rows, columns], or uint8 [rows, columns / 2] with `zeros`.
        scales, zeros: bfloat16 [rows, groups], in 8 bits one group; 32 columns or a multiple in a group of 4 bits.
        vnni: whether AVX-512 VNNI may be used.
    """

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, *, vnni: bool = True) -> None:
        self._keep, self._library = (codes, scales, zeros), native.loaded()
        self._rows, columns, groups = len(codes), codes.shape[1], 1
        if zeros is not None:
            columns, groups = 2 * columns, scales.shape[1]
        self._columns, self._groups, self._room = columns, groups, 2 * (64 + (columns + 63 & ~63)) + 8 * groups  # bytes a token
        self._job = ProductJob(
            codes=codes.data_ptr(), scales=scales.data_ptr(), zeros=address_of(zeros),
            rows=self._rows, columns=columns, group=columns // groups, bits=8 if zeros is None else 4,
            no_vnni=not vnni,
        )  # fmt: skip

    def __call__(self, x: torch.Tensor, shift: torch.Tensor | None = None) -> torch.Tensor:
        """float32 [tokens, rows], from `x` float32 or bfloat16 [tokens, columns]; `shift` float32 [rows] is added."""
        out = torch.empty(x.shape[0], self._rows, dtype=torch.float32, device="cpu")
        self._job.active = None
        self._run(x, out, shift)
        return out

    def active(
        self,
        x: torch.Tensor,
        shift: torch.Tensor,
        *,
        shift_scale: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        first: Product | None = None,
    ) -> torch.Tensor:
        """Where the sums are not at or below zero, bool [tokens, rows].

        Args:
            x: float32 or bfloat16 [tokens, columns], or what `first` takes.
            shift: float32 [rows], added to the sums; `shift_scale` float32 [tokens] is multiplied with it before.
            bias: [rows], added after that.
            first: another matrix, which `x` goes through before.
        """
        active = torch.empty(x.shape[0], self._rows, dtype=torch.bool, device="cpu")
        self._job.active = active.data_ptr()
        self._run(x, None, shift, shift_scale, bias, first)
        return active

    def _run(
        self,
        x: torch.Tensor,
        out: torch.Tensor | None,
        shift: torch.Tensor | None,
        shift_scale: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        first: Product | None = None,
    ) -> None:
        assert self._library is not None
        x, job, own_bytes = x.contiguous(), self._job, len(x) * self._room
        room_bytes = own_bytes if first is None else own_bytes + len(x) * first._room
        room = torch.empty(room_bytes, dtype=torch.uint8, device="cpu")
        if first is not None:
            between = torch.empty(len(x), first._rows, dtype=torch.float32, device="cpu")
            first._set(x, between, room.data_ptr() + own_bytes)
            x = between
        self._set(x, out, room.data_ptr())
        job.shift, job.shift_scale, job.bias = (address_of(part) for part in (shift, shift_scale, bias))
        job.bias_dtype = 0 if bias is None else DTYPES[bias.dtype]
        job.first = None if first is None else ctypes.addressof(first._job)
        job.threads = native.threads() if len(x) * self._rows * self._columns >= _SHARED else 1
        self._library.hf_multiply(ctypes.byref(job))

    def _set(self, x: torch.Tensor, out: torch.Tensor | None, room: int) -> None:
        """Input, output, and the address of room for x as multiples of a step."""
        job, tokens = self._job, len(x)
        job.x, job.dtype, job.tokens = x.data_ptr(), DTYPES[x.dtype], tokens
        job.out = address_of(out)
        job.x_codes = room  # first: vectors of it lie within cache lines
        job.x_step = room + 2 * tokens * (64 + (self._columns + 63 & ~63))
        job.x_sum = job.x_step + 4 * tokens * self._groups
