"""Calls into the compiled part that compute. Make them only if `library()` is not `None`.

    TokenKernel      one token and the rows of some neurons, multiplied where they lie; runtime/token_step.py does the same with
                     window and reads in one call
    TokensKernel     the same for several tokens, each with neurons of its own
    Product          multiplies a quantized matrix with tokens
    linear           multiplies a matrix that stays in memory with a few tokens
    quantize         quantizes a matrix
    copy_rows        copies scattered rows, or some of their columns, to scattered rows
    gather           copies one part of scattered units to one place
    count_uses       counts the tokens that use each neuron

[`supports`] tells whether the compiled part knows a layout of units.
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
"""The biases of a layer's projections, by part: [d_ff] in the compute dtype; `down`: [d_model]."""

_ROLES: Final = (("up", "down"), ("gate", "up", "down"))  # the parts of a unit that are supported, in their order
_SHARED: Final = 1 << 18  # from so many products on, waking other threads pays
_WORTH_QUANTIZING: Final = 1 << 14  # from so many weights on, waking other threads pays
_WORTH_COPYING: Final = 1 << 18  # from so many bytes on, waking other threads pays
_TOKENS: Final = 1024  # tokens that `TokensKernel` takes at a time; more would need more room
EVERY_COLUMN: Final = slice(None)
_TILE_BYTES: Final = 512  # bytes of a row that are packed at a time (TILE_BYTES of native.h)


def supports(layout: UnitLayout) -> bool:
    """Whether the compiled part can compute with units of this layout where they lie in memory.

    If it knows the activation (`Activation.code`), it computes whole layers; otherwise only the products.
    """
    return layout.roles in _ROLES and layout.dtype in DTYPES


def row_layout(layout: UnitLayout, alone: Role | None = None) -> RowLayout:
    """A layout as a structure for the compiled part. `alone`: multiply x with this one part only."""
    gate = layout.offset("gate") if alone is None and "gate" in layout.roles else -1
    return RowLayout(layout.row_bytes, gate, layout.offset(alone or "up"), layout.offset("down"), layout.width)


def activation_function(activation: Activation | None) -> ActivationFunction:
    """An activation as a structure for the compiled part. `None`: products stay as they are."""
    if activation is None:
        return ActivationFunction()
    return ActivationFunction(activation.level, activation.code, activation.of_both)


def address_of(tensor: torch.Tensor | None) -> int | None:
    """The address of a tensor's first number; `None` if there is no tensor."""
    return None if tensor is None else tensor.data_ptr()


class TokenRoom:
    """Working memory for a call of a few tokens, shared by all layers of a model.

    Args:
        neurons: the most neurons that a call uses: those of the widest layer.
        d_model: the width of a layer.
    """

    tokens: Final = 16  # the most in one call (MOST_TOKENS of step.c)
    reads: Final = 1024  # the most missing neurons that the compiled part reads in one call

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
    """Working memory for the non-zero hidden values of several tokens.

    Args:
        tokens: the most tokens in a call.
        neurons: the most neurons in a call.
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

    First `up`, called once or for one subset of neurons after another, makes the hidden values. If the compiled part does not
    know the activation, `up` makes the products with the deciding part (`UnitLayout.deciding`) instead, and in a layer with a
    gate `gated_up` follows. Finally `down`.

    Args:
        neurons: the most neurons in one call.
        layout: the layout of the rows, a supported one.
        activation: the activation if the compiled part knows it, else `None`.
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
            x: [1, width] in the compute dtype, contiguous.
            biases: those of the layer.
            matrix: [any, numbers of a row], contiguous.
            rows, ids: [n] rows of `matrix`, and the ids of the neurons in them.
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
        """Compute the hidden values of some neurons.

        Args:
            positions: their positions in `rows`; `None`: all.
        """
        positions = self._all_positions[: self._job.n] if positions is None else positions
        self._job.positions, self._job.todo = positions.ctypes.data, len(positions)
        self._call(self._library.hf_up)  # type: ignore[union-attr]

    def gated_up(self, bias: torch.Tensor | None) -> torch.Tensor:
        """Products with the up part, float32 [n]; `hidden` keeps those with the gate. `bias` [d_ff] is of the up part."""
        assert self._gated is not None
        job, found = self._job, self._products[: self._job.n]
        kept = job.layout, job.bias, job.hidden
        job.layout, job.bias, job.hidden = self._gated, address_of(bias), found.data_ptr()
        self.up()
        job.layout, job.bias, job.hidden = kept
        return found

    @property
    def hidden(self) -> torch.Tensor:
        """The hidden values, float32 [n], which callers may read and change between `up` and `down`."""
        return self.room.hidden[: self._job.n]

    def down(self, out: torch.Tensor) -> None:
        """Add the down rows times their hidden values to `out`, float32 [1, width], in the order of `rows`."""
        self._job.out = out.data_ptr()
        self._call(self._library.hf_down)  # type: ignore[union-attr]

    def _call(self, function: Any) -> None:
        function(ctypes.byref(self._job))


class TokensKernel:
    """The arithmetic of several tokens, each of which has its own non-zero hidden values.

    The sums are those of [`TokenKernel`], in the same order: beside others or alone, on any number of threads, with AVX-512 and
    without, a token gets the same bits.

    Args:
        layout: the layout of the rows, a supported one.
        tokens: how many tokens.
        neurons: the most neurons in one call.
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
        """Hidden values, [tokens, n] in the compute dtype; zero for neurons that a token does not use.

        Args:
            x: [tokens, width] in the compute dtype, contiguous.
            used: bool [tokens, d_ff], contiguous: which neurons each token uses; `None`: all.
            biases: those of the layer.
            rows, ids: [n] addresses of units in the compute dtype, and the ids of their neurons.
            activation: one that the compiled part knows.
        """
        return self._up(
            x, used, rows, ids, activation=activation_function(activation),
            gate_bias=address_of(biases.get("gate")), bias=address_of(biases["up"]),
        )  # fmt: skip

    def product(self, x: torch.Tensor, bias: torch.Tensor | None, rows: Ids, ids: Ids, role: Role) -> torch.Tensor:
        """The product of x with one part of every neuron, plus the part's bias [d_ff]: [tokens, n] in the compute dtype."""
        return self._up(x, None, rows, ids, layout=row_layout(self._layout, role), bias=address_of(bias))

    def _up(self, x: torch.Tensor, used: torch.Tensor | None, rows: Ids, ids: Ids, **fields: Any) -> torch.Tensor:
        """`fields` of the job: the part that is multiplied, its biases, and the activation."""
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
        """Add the down rows times their non-zero hidden values to each token's `out`, neuron by neuron.

        Args:
            hidden: [tokens, n] in the compute dtype, contiguous.
            rows: [n] addresses of units.
            out: float32 [tokens, width], contiguous.
            at_most: the share of the hidden values that may be non-zero.

        Returns:
            `None` if all tokens are done; else the tokens that are left, from the first `_TOKENS` of which more values are
            non-zero: the end of `hidden`.
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
        x: [..., columns], contiguous. All tensors are in one dtype of `DTYPES`.
        weight: [rows, columns], contiguous. bias: [rows].
        avx512: whether AVX-512 may be used.

    Returns:
        [..., rows].

    Raises:
        MemoryError: there is not enough memory for `x` in fp32.
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
    """Quantize the rows of a matrix, to the same bits as `quantize_rows` in predictors/low_bit.py, which defines the result.

    Args:
        w: [rows, columns] in a dtype of `DTYPES`, each row contiguous, rows at any stride.
        bits: 8 or 4.
        group: columns that share a scale.

    Returns:
        The tensors of `quantize_rows`.
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
    """`target[places, columns] = source[rows, columns]`, for contiguous matrices of equal width and dtype."""
    first, last, _ = columns.indices(source.shape[1])
    size = source.element_size()
    _copy(addresses(source, rows) + first * size, addresses(target, places) + first * size, (last - first) * size)


def count_uses(before: torch.Tensor) -> tuple[Ids, Ids]:
    """Count, for each neuron, the tokens whose pre-activation is above zero, or NaN.

    Args:
        before: [tokens, n] in a dtype of `DTYPES`, contiguous.

    Returns:
        How many such tokens, int64 [n]; and the last of them, counted from 1, or 0 for none, int64 [n].
    """
    tokens, neurons = before.shape
    uses, last = np.zeros(neurons, dtype=np.int64), np.zeros(neurons, dtype=np.int64)
    native.loaded().hf_count_uses(  # type: ignore[union-attr]
        before.data_ptr(), tokens, neurons, DTYPES[before.dtype], uses.ctypes.data, last.ctypes.data
    )
    return uses, last


def gather(rows: Ids, layout: UnitLayout, role: Role, target: torch.Tensor) -> torch.Tensor:
    """Copy one part of the units at addresses `rows` [n] to the beginning of `target`, contiguous; returns it as [n, width]."""
    gathered = target.view(-1)[: len(rows) * layout.width].view(len(rows), layout.width)
    _copy(rows + layout.offset(role), addresses(gathered, np.arange(len(rows))), layout.width * target.element_size())
    return gathered


def _copy(source: Ids, target: Ids, size: int) -> None:
    """Copy `size` bytes from each address in `source` to its address in `target`."""
    count = native.threads() if len(source) * size >= _WORTH_COPYING else 1
    job = CopyJob(source.ctypes.data, target.ctypes.data, len(source), size, count)
    native.loaded().hf_copy(ctypes.byref(job))  # type: ignore[union-attr]


def addresses(matrix: torch.Tensor, rows: Ids) -> Ids:
    """The addresses of rows of a contiguous matrix, as [`TokensKernel`] takes them."""
    return np.asarray(matrix.data_ptr() + rows * (matrix.shape[1] * matrix.element_size()))


class Product:
    """The product of a quantized matrix with tokens. A token's result does not depend on the tokens beside it.

    Args:
        codes: int8 [rows, columns] in 8 bits, or uint8 [rows, columns / 2] in 4 bits, which have `zeros`.
        scales, zeros: bfloat16 [rows, groups]; one group in 8 bits, groups of a multiple of 32 columns in 4 bits.
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
        """The product, float32 [tokens, rows], of `x` float32 or bfloat16 [tokens, columns], plus `shift` float32 [rows]."""
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
        """Where the sums are above zero, or NaN: bool [tokens, rows].

        Args:
            x: float32 or bfloat16 [tokens, columns], or the input of `first`.
            shift: float32 [rows], added to the sums, after multiplication with `shift_scale`, float32 [tokens], if given.
            bias: [rows], added after that.
            first: another matrix, with which `x` is multiplied before.
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
        """Set the input, the output, and the address of the room for x as multiples of a step."""
        job, tokens = self._job, len(x)
        job.x, job.dtype, job.tokens = x.data_ptr(), DTYPES[x.dtype], tokens
        job.out = address_of(out)
        job.x_codes = room  # at the beginning, so that its vectors lie within cache lines
        job.x_step = room + 2 * tokens * (64 + (self._columns + 63 & ~63))
        job.x_sum = job.x_step + 4 * tokens * self._groups
