"""The arithmetic of a block of neurons: up, activation, down (the order of blocks is in runtime/stream.py).

One token (decoding) and several tokens are computed differently, each in the fastest way that rounds as the stock model does.
No way depends on where the rows of a block lie, so results are bit-identical whatever is resident.

    compiled, one token
             The compiled part multiplies rows where they lie (kernels.py). Each output element is one fp32 sum in id order.
             The down projection does not touch the rows of neurons whose hidden value is zero.
    compiled, several tokens, each with few neurons of its own
             The compiled part multiplies each row with the tokens that use it: up takes a share of the rows at a time, which
             stays in a core's cache while the tokens go by; down takes a tile of columns at a time. A token gets the same
             bits as alone.
    compiled, several tokens that use all neurons
             Up is the fastest product of whole matrices (dense.py), rounded as in the stock layer. Down is as above, over the
             hidden values that are not zero: where these are few, that is several times faster than the whole product.
             Activations without zeros have whole products for down, too.
    torch, one token
             Up: gather rows in id order, `F.linear` in the compute dtype. Down: `embedding_bag`, which reads only the rows
             of neurons that are really non-zero and accumulates in fp32. Each row is viewed as two half rows in two bags, so
             that two threads share the work while every output element is one sum in id order, rounded once. A call of
             several blocks in 16 bits would be rounded once per block: there the rows of non-zero neurons are widened and
             the sum over all blocks is kept in fp32.
    torch, several tokens; also down where most hidden values are not zero
             Rows are widened to fp32 and both products are fp32 GEMMs that accumulate over blocks; the hidden activations are
             rounded to the compute dtype in between, as the stock layer does. (fp16 GEMM is an order of magnitude slower
             on CPUs, and bf16 would round every partial sum.)

A layer with a gate has hidden = activation(gate x) * (up x). A token is multiplied with up only where the activation of the
gate is not zero. The compiled part computes the activations that it knows (`Activation.code`); torch computes the others.
torch also computes the whole layer for several tokens, each with few neurons of its own, if their activation is unknown.

n = neurons in the block, d = d_model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from hf_flash.base.arrays import Ids, Mask, count_uses
from hf_flash.base.buffers import aligned_empty
from hf_flash.compute import dense
from hf_flash.compute import library as native
from hf_flash.compute.activation import Activation
from hf_flash.compute.kernels import (
    EVERY_COLUMN,
    Biases,
    TokenKernel,
    TokenRoom,
    TokensKernel,
    addresses,
    copy_rows,
    gather,
    supports,
)
from hf_flash.compute.kernels import count_uses as count_uses_above_zero
from hf_flash.store.unit import Role, UnitLayout

_BAGS: Final = 2
_NO_COLUMN: Final = slice(0)
_DENSE: Final = 0.5  # above this share of all token-neuron products, a GEMM that computes all of them is faster


def block_rows(d_ff: int, tokens: int) -> int:
    """Neurons in a block. It depends on the shape alone, because it fixes the order of summation.

    A block of one token is twice as large, since only one part of its rows is gathered at a time.
    """
    rows = min(1024, max(64, d_ff // 4), d_ff)
    return min(2 * rows, d_ff) if tokens == 1 else rows


def last_uses(active: Mask) -> Ids:
    """The last token that uses each neuron, counted from 1; 0 if none does. `active` is bool [tokens, n]."""
    found: Ids = np.where(active.any(axis=0), len(active) - np.argmax(active[::-1], axis=0), 0)
    return found


class OneToken(Protocol):
    """One token's products with a block of neurons.

    A caller that still waits for some of the rows may call `multiply_present` first; `finish` does the rest.
    """

    def multiply_present(self, present: Ids, missing: Ids) -> None:
        """Multiply the rows at positions `present` while those at positions `missing` are being read."""
        ...

    def finish(self, out: torch.Tensor) -> None:
        """Add the block's contribution to `out`, float32 [1, d]. Every row must be in memory by now."""
        ...


class Values(NamedTuple):
    """Pre-activations of the deciding part, and hidden values, of every token and every neuron of a block: both [tokens, n]
    in the compute dtype."""

    before: torch.Tensor
    hidden: torch.Tensor


class SeveralTokens(Protocol):
    """The tokens of a call, to be multiplied with one block of neurons after another.

    Attributes:
        scattered: whether a block may consist of any neurons, since each is multiplied with the tokens that use it.
        together: the columns of a bundle that must be in one matrix for all neurons of a streamed block.
    """

    scattered: bool
    together: slice

    def add(self, matrix: torch.Tensor, rows: Ids, ids: Ids, out: torch.Tensor) -> Values | None:
        """Add the contribution of a block of neurons to `out`, float32 [tokens, d].

        Args:
            matrix: [any, unit.numbers], contiguous; its rows `rows` [n] are the bundles of neurons `ids` [n].

        Returns:
            The values, if they were computed for every token and every neuron; else `None`.
        """
        ...

    def add_streamed(self, matrix: torch.Tensor, rows: Ids, places: Ids, ids: Ids, out: torch.Tensor) -> Values | None:
        """The same for bundles at addresses `places` (`kernels.addresses`). Their columns `together` are in rows `rows` of
        `matrix`, ascending."""
        ...


class Arithmetic:
    """The arithmetic by torch, and the buffers that all layers of a model share, allocated once.

    rows     [block of one token, unit.numbers] streamed neurons, compute dtype; page-aligned, a target of reads: one block
             of one token, or two blocks of several tokens, one being read while the other is computed
    gathered [block of several, unit.numbers] rows picked from a window, compute dtype
    wide     [block of several, unit.numbers] float32; the same memory as `gathered` when computing in float32

    Args:
        d_ff: neurons of the widest layer.
        unit: the layout of a neuron, in the compute dtype.
        activation: the activation of all layers.
    """

    device = torch.device("cpu")  # the device that computes
    step_kernel: TokenKernel | None = None  # set where the compiled part can take tokens through a layer in one call

    def __init__(self, d_ff: int, unit: UnitLayout, activation: Activation) -> None:
        self.unit, self.activation = unit, activation
        shape = (block_rows(d_ff, 2), unit.numbers)
        self.rows = aligned_empty((block_rows(d_ff, 1), unit.numbers), unit.dtype)
        self.gathered = aligned_empty(shape, unit.dtype)
        self.wide = self.gathered if unit.dtype == torch.float32 else aligned_empty(shape, torch.float32)
        self.nbytes = self.size(d_ff, unit)

    @classmethod
    def knows(cls, unit: UnitLayout) -> bool:
        """Whether this arithmetic can compute layers of such units on this machine, at this moment."""
        return True

    @staticmethod
    def size(d_ff: int, unit: UnitLayout) -> int:
        """The most bytes that the buffers for layers of this shape take, with either arithmetic on the CPU."""
        wide = 0 if unit.dtype == torch.float32 else 4 * unit.numbers
        rows = block_rows(d_ff, 1) * unit.row_bytes + block_rows(d_ff, 2) * (unit.row_bytes + wide)
        return rows + TokenKernel.nbytes(d_ff, unit)

    def matrix(self, rows: int) -> torch.Tensor:
        """Memory for the bundles of `rows` neurons, [rows, unit.numbers]: the matrix of a window."""
        return aligned_empty((rows, self.unit.numbers), self.unit.dtype)

    def matrices(self, rows: Sequence[int]) -> list[torch.Tensor]:
        """The matrices of several windows."""
        return [self.matrix(count) for count in rows]

    def release(self) -> None:
        """Give device memory back. Nothing can be computed afterwards."""

    def one_token(
        self, x: torch.Tensor, biases: Biases, matrix: torch.Tensor, rows: Ids, ids: Ids, *, one_block: bool
    ) -> OneToken:
        """Prepare one block of a call of one token.

        Args:
            x: [1, d] in the compute dtype, contiguous.
            matrix: [any, unit.numbers], contiguous; its rows `rows` [n] are, or will be, the bundles of neurons `ids` [n].
            one_block: whether this block is the whole call.
        """
        return _TorchToken(self, x, biases, matrix, rows, ids, one_block)

    def several_tokens(self, x: torch.Tensor, selected: torch.Tensor | None, union: int, biases: Biases) -> SeveralTokens:
        """Prepare a call of several tokens.

        Args:
            x: [tokens, d] in the compute dtype, contiguous.
            selected: bool [tokens, d_ff], which neurons each token uses; `None`: all.
            union: how many neurons are used by at least one of them.
        """
        return _TorchTokens(self, x, selected, biases)

    def copy_rows(
        self, source: torch.Tensor, chosen: Ids, target: torch.Tensor, places: Ids, columns: slice = EVERY_COLUMN
    ) -> None:
        """`target[places, columns] = source[chosen, columns]`, some rows at a time through a buffer."""
        source, target = source[:, columns], target[:, columns]
        step, room = len(self.gathered), self.gathered.view(-1)
        for at in range(0, len(chosen), step):
            part = torch.from_numpy(chosen[at : at + step])
            buffer = room[: len(part) * source.shape[1]].view(len(part), source.shape[1])
            picked = torch.index_select(source, 0, part, out=buffer)
            target.index_copy_(0, torch.from_numpy(places[at : at + step]), picked)

    def count_uses(self, before: torch.Tensor) -> tuple[Ids, Ids]:
        """How many tokens use each neuron, and the last token that does, counted from 1, or 0; both int64 [n].

        Args:
            before: pre-activations of the deciding part, [tokens, n] in the compute dtype.
        """
        active = self.activation.active(before).numpy()
        return count_uses(active), last_uses(active)


class CompiledArithmetic(Arithmetic):
    """The arithmetic by the compiled part: whole layers if it knows the activation, else the products alone."""

    def __init__(self, d_ff: int, unit: UnitLayout, activation: Activation) -> None:
        super().__init__(d_ff, unit, activation)
        self._is_whole = activation.code is not None  # whether the compiled part does a layer from end to end
        self._kernel = TokenKernel(d_ff, unit, activation if self._is_whole else None)
        self.step_kernel = self._kernel if self._is_whole else None

    @classmethod
    def knows(cls, unit: UnitLayout) -> bool:
        return native.library() is not None and supports(unit)

    def one_token(
        self, x: torch.Tensor, biases: Biases, matrix: torch.Tensor, rows: Ids, ids: Ids, *, one_block: bool
    ) -> OneToken:
        self._kernel.set(x, biases, matrix, rows, ids)
        return _CompiledToken(self._kernel, x.dtype, biases, None if self._is_whole else self.activation)

    def several_tokens(self, x: torch.Tensor, selected: torch.Tensor | None, union: int, biases: Biases) -> SeveralTokens:
        if selected is None:
            return _CompiledAll(self, x, biases)
        if not self._is_whole:
            return super().several_tokens(x, selected, union, biases)
        if len(x) > TokenRoom.tokens and np.count_nonzero(selected.numpy()) > _DENSE * len(x) * union:
            return super().several_tokens(x, selected, union, biases)
        return _CompiledTokens(self, x, selected, biases, union)

    def copy_rows(
        self, source: torch.Tensor, chosen: Ids, target: torch.Tensor, places: Ids, columns: slice = EVERY_COLUMN
    ) -> None:
        if len(chosen):
            copy_rows(source, chosen, target, places, columns)

    def count_uses(self, before: torch.Tensor) -> tuple[Ids, Ids]:
        above_zero = self._is_whole and not self.activation.level
        return count_uses_above_zero(before) if above_zero else super().count_uses(before)


ARITHMETICS: Final[tuple[type[Arithmetic], ...]] = (CompiledArithmetic, Arithmetic)
"""The fastest first. A layer is computed by the first that knows its units."""


def arithmetic_for(d_ff: int, unit: UnitLayout, activation: Activation) -> Arithmetic:
    """The fastest arithmetic that can compute such layers on this machine; see [`Arithmetic`] for the arguments."""
    return next(kind for kind in ARITHMETICS if kind.knows(unit))(d_ff, unit, activation)


class _CompiledToken:
    """One token by the compiled part. `activation` is set only if the compiled part does not know it."""

    def __init__(self, kernel: TokenKernel, dtype: torch.dtype, biases: Biases, activation: Activation | None) -> None:
        self._kernel, self._dtype, self._biases, self._activation = kernel, dtype, biases, activation
        self._left: Ids | None = None

    def multiply_present(self, present: Ids, missing: Ids) -> None:
        self._left = missing
        self._kernel.up(present)

    def finish(self, out: torch.Tensor) -> None:
        kernel = self._kernel
        if self._left is None or len(self._left):
            kernel.up(self._left)
        if self._activation is not None:
            kernel.hidden.copy_(self._hidden(self._activation))
        kernel.down(out)

    def _hidden(self, activation: Activation) -> torch.Tensor:
        """Hidden values in the compute dtype, [n], rounded where the stock layer rounds."""
        deciding = self._kernel.hidden.to(self._dtype)
        if "gate" not in self._biases:
            return activation.hidden(deciding)
        return activation.hidden(deciding, self._kernel.gated_up(self._biases["up"]).to(self._dtype))


class _CompiledTokens:
    """Several tokens by the compiled part, each with its own neurons only."""

    scattered, together = True, _NO_COLUMN

    def __init__(self, arithmetic: Arithmetic, x: torch.Tensor, selected: torch.Tensor, biases: Biases, union: int) -> None:
        self._x, self._selected, self._biases, self._activation = x, selected.contiguous(), biases, arithmetic.activation
        self._kernel = TokensKernel(arithmetic.unit, len(x), min(union, len(arithmetic.gathered)))

    def add(self, matrix: torch.Tensor, rows: Ids, ids: Ids, out: torch.Tensor) -> None:
        self.add_streamed(matrix, rows, addresses(matrix, rows), ids, out)

    def add_streamed(self, matrix: torch.Tensor, rows: Ids, places: Ids, ids: Ids, out: torch.Tensor) -> None:
        hidden = self._kernel.hidden(self._x, self._selected, self._biases, places, ids, self._activation)
        self._kernel.down(hidden, places, out)


class _CompiledAll:
    """Several tokens that use all neurons: whole products for up; down over the non-zero hidden values, unless most are."""

    scattered = True

    def __init__(self, arithmetic: Arithmetic, x: torch.Tensor, biases: Biases) -> None:
        self._arithmetic, self._x, self._biases = arithmetic, x, biases
        unit, activation = arithmetic.unit, arithmetic.activation
        self._kernel = TokensKernel(unit, len(x), len(arithmetic.gathered))
        self._few = dense.few(len(x), x.dtype)
        self._is_sparse = self._few or activation.zeros
        multiplied = _NO_COLUMN if self._few else slice(0, unit.columns("down").start)
        self.together = multiplied if self._is_sparse else EVERY_COLUMN

    def add(self, matrix: torch.Tensor, rows: Ids, ids: Ids, out: torch.Tensor) -> Values:
        buffer = self._arithmetic.gathered[: len(rows)]
        self._arithmetic.copy_rows(matrix, rows, buffer, np.arange(len(rows)), self.together)
        return self._add(buffer, addresses(matrix, rows), ids, out)

    def add_streamed(self, matrix: torch.Tensor, rows: Ids, places: Ids, ids: Ids, out: torch.Tensor) -> Values:
        return self._add(matrix[int(rows[0]) : int(rows[-1]) + 1], places, ids, out)

    def _add(self, bundles: torch.Tensor, places: Ids, ids: Ids, out: torch.Tensor) -> Values:
        """`bundles`: [n, numbers of a unit], in which only the columns `together` are filled."""
        unit = self._arithmetic.unit
        before = self._product(unit.deciding, bundles, places, ids)
        up = self._product("up", bundles, places, ids) if unit.deciding == "gate" else None
        hidden = self._arithmetic.activation.hidden(before, up)
        if not self._is_sparse:
            dense.add_product(hidden, bundles[:, unit.columns("down")], out, self._arithmetic.wide)
            return Values(before, hidden)
        left = self._kernel.down(hidden, places, out, at_most=1.0 if self._few else _DENSE)
        if left is not None:
            weight = gather(places, unit, "down", self._arithmetic.gathered)
            dense.add_product(left, weight, out[-len(left) :], self._arithmetic.wide)
        return Values(before, hidden)

    def _product(self, role: Role, bundles: torch.Tensor, places: Ids, ids: Ids) -> torch.Tensor:
        """The product of x with one part, plus its bias, [tokens, n] in the compute dtype."""
        if self._few:
            return self._kernel.product(self._x, self._biases[role], places, ids, role)
        bias = self._biases[role]
        bias = None if bias is None else torch.index_select(bias, 0, torch.from_numpy(ids))
        weight = bundles[:, self._arithmetic.unit.columns(role)]
        return dense.multiply(self._x, weight, bias, self._arithmetic.wide)


class _TorchToken:
    """One token by torch."""

    def __init__(
        self,
        arithmetic: Arithmetic,
        x: torch.Tensor,
        biases: Biases,
        matrix: torch.Tensor,
        rows: Ids,
        ids: Ids,
        one_block: bool,
    ) -> None:
        self._arithmetic, self._x, self._biases, self._one_block = arithmetic, x, biases, one_block
        self._rows, self._ids = rows, ids
        self._parts = matrix.view(-1, x.shape[1])  # each part of a bundle is a row
        self._roles = arithmetic.unit.roles

    def multiply_present(self, present: Ids, missing: Ids) -> None:
        """Does nothing: `finish` gathers all rows in one step."""

    def finish(self, out: torch.Tensor) -> None:
        if "gate" in self._roles:  # both products gather into one buffer, but their results are separate
            hidden = self._arithmetic.activation.hidden(self._product("gate"), self._product("up"))
        else:
            hidden = self._arithmetic.activation.hidden(self._product("up"))
        active = hidden[0].nonzero()[:, 0].numpy()
        if len(active):
            self._add_down(hidden[0], active, out)

    def _product(self, role: Role) -> torch.Tensor:
        """The product of x with one part, plus its bias, [1, n]."""
        bias = self._biases[role]
        bias = None if bias is None else torch.index_select(bias, 0, torch.from_numpy(self._ids))
        return F.linear(self._x, self._gather(role, self._rows), bias)

    def _gather(self, role: Role, rows: Ids) -> torch.Tensor:
        """One part of some bundles, [rows, d], in a buffer that the next call overwrites."""
        places = torch.from_numpy(len(self._roles) * rows + self._roles.index(role))
        room = self._arithmetic.gathered.view(-1, self._x.shape[1])
        return torch.index_select(self._parts, 0, places, out=room[: len(rows)])

    def _add_down(self, hidden: torch.Tensor, active: Ids, out: torch.Tensor) -> None:
        """Add hidden [n] times the down part of the bundles at positions `active`."""
        d = self._x.shape[1]
        rows = self._rows[active]  # by numpy: with cold caches, a small operator costs a tenth of torch's
        if not self._one_block and self._x.dtype != torch.float32:
            wide = self._arithmetic.wide.view(-1, d)[: len(active)].copy_(self._gather("down", rows))
            out.addmm_(hidden[torch.from_numpy(active)].float()[None], wide)
            return
        bags = 1 if d % _BAGS else _BAGS
        first = bags * (len(self._roles) * rows + self._roles.index("down"))  # counted in rows of d / bags numbers
        places = torch.from_numpy(first + np.arange(bags)[:, None])  # [bags, active]
        weights = torch.index_select(hidden, 0, torch.from_numpy(np.concatenate([active] * bags))).view(bags, -1)
        sums = F.embedding_bag(places, self._parts.reshape(-1, d // bags), per_sample_weights=weights, mode="sum")
        out += sums.view(1, d)


class _TorchTokens:
    """Several tokens by torch: every token is multiplied with every neuron of a block."""

    scattered, together = False, EVERY_COLUMN

    def __init__(self, arithmetic: Arithmetic, x: torch.Tensor, selected: torch.Tensor | None, biases: Biases) -> None:
        self._arithmetic, self._selected, self._biases = arithmetic, selected, biases
        self._x = x.float().contiguous()  # [tokens, d]

    def add(self, matrix: torch.Tensor, rows: Ids, ids: Ids, out: torch.Tensor) -> Values:
        buffers, unit, which = self._arithmetic, self._arithmetic.unit, torch.from_numpy(ids)
        wide = buffers.wide[: len(rows)]
        gathered = torch.index_select(matrix, 0, torch.from_numpy(rows), out=buffers.gathered[: len(rows)])
        if wide.data_ptr() != gathered.data_ptr():
            wide.copy_(gathered)

        def product(role: Role) -> torch.Tensor:
            bias = self._biases[role]
            bias = None if bias is None else torch.index_select(bias, 0, which).float()
            return F.linear(self._x, wide[:, unit.columns(role)], bias).to(matrix.dtype)

        before = product(unit.deciding)
        hidden = buffers.activation.hidden(before, product("up") if unit.deciding == "gate" else None).float()  # [tokens, n]
        if self._selected is not None:
            hidden.masked_fill_(~self._selected[:, which], 0.0)
        out.addmm_(hidden, wide[:, unit.columns("down")])
        return Values(before, hidden)

    def add_streamed(self, matrix: torch.Tensor, rows: Ids, places: Ids, ids: Ids, out: torch.Tensor) -> Values:
        return self.add(matrix, rows, ids, out)
