"""The arithmetic of a block of neurons: up, activation, down (the order of blocks is in runtime/layer.py).

One token (decode) and several tokens are computed differently, each the fastest way that rounds as the stock model does.
Neither depends on where the rows of a block lie, so that results are bit-identical whatever is resident.

    one      the compiled part multiplies rows where they lie (compute/library.py). Sums are fp32, one for every output element, in id
             order; rows of neurons that turn out to be zero are not touched in the down projection.
    one, without the compiled part
             up: gather rows in id order, `F.linear` in the dtype of compute. down: `embedding_bag`, which reads only the rows
             of neurons that are really non-zero and accumulates in fp32. Each row is viewed as two half rows in two bags, so
             that two threads share the work while every output element is one sum in id order, rounded once. A call of
             several blocks in 16 bits would be rounded once a block: there the rows of non-zero neurons are widened and the
             sum over all blocks is kept in fp32.
    several, each with few neurons of its own
             the compiled part multiplies rows with the tokens that use them: up a share of the rows at a time, which stays in a
             core's cache while the tokens go by; down a tile of columns at a time. A token gets the same bits as alone.
    several, with (nearly) all neurons, or without the compiled part
             rows are widened to fp32 and both products are fp32 GEMMs that accumulate over blocks; the hidden activations are
             rounded to the dtype of compute in between, as the stock layer does. (fp16 GEMM is an order of magnitude slower
             on CPUs, and bf16 would round every partial sum.)

n = neurons in the block, d = d_model.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from hf_flash.base.arrays import Ids
from hf_flash.base.buffers import aligned_empty
from hf_flash.compute.kernels import TokenKernel, TokensKernel

_HALVES = 2
_DENSE = 0.5  # share of the products of tokens and neurons from which on making all of them in a GEMM is faster
Activation = Callable[[torch.Tensor], torch.Tensor]


def block_rows(d_ff: int, tokens: int) -> int:
    """Neurons worked on at a time. A function of the shape alone, because it fixes the order of summation.

    One token takes twice as many, since only the up half of their rows is gathered.
    """
    rows = min(1024, max(64, d_ff // 4), d_ff)
    return min(2 * rows, d_ff) if tokens == 1 else rows


class Scratch:
    """Buffers for one block, allocated once and shared by all layers of a model.

    rows     [block of one token, 2 * d_model] streamed neurons, dtype of compute; page-aligned, a target of reads: one block of
             one token, or two of several, of which one is read while the other is computed
    gathered [block of several, 2 * d_model] rows picked from a window, dtype of compute
    wide     [block of several, 2 * d_model] float32; the same memory as `gathered` when computing in float32
    kernel   the compiled arithmetic of one token
    """

    def __init__(self, d_ff: int, d_model: int, dtype: torch.dtype) -> None:
        shape = (block_rows(d_ff, 2), 2 * d_model)
        self.rows = aligned_empty((block_rows(d_ff, 1), 2 * d_model), dtype)
        self.gathered = aligned_empty(shape, dtype)
        self.wide = self.gathered if dtype == torch.float32 else aligned_empty(shape, torch.float32)
        self.kernel = TokenKernel(block_rows(d_ff, 1), d_model)
        self.nbytes = self.size(d_ff, d_model, dtype)

    @staticmethod
    def size(d_ff: int, d_model: int, dtype: torch.dtype) -> int:
        """What the buffers for layers of this shape take, in bytes."""
        wide = 0 if dtype == torch.float32 else 4
        rows = 2 * d_model * (block_rows(d_ff, 1) * dtype.itemsize + block_rows(d_ff, 2) * (dtype.itemsize + wide))
        return rows + TokenKernel.nbytes(block_rows(d_ff, 1), d_model)


class OneToken:
    """A block's share of one token: `up` for neurons that are there, `finish` for the others and everything after.

    Args:
        x: [1, d] in the dtype of compute.
        bias: [d_ff] of the up projection.
        matrix: [any, 2 * d], contiguous; `rows` [n] says where the bundles of neurons `ids` [n] are in it, or will be.
        one_block: whether this block is the whole call.
    """

    def __init__(
        self,
        scratch: Scratch,
        activation: Activation,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        matrix: torch.Tensor,
        rows: Ids,
        ids: Ids,
        *,
        one_block: bool,
    ) -> None:
        self._scratch, self._activation, self._one_block = scratch, activation, one_block
        self._x, self._bias, self._matrix, self._rows, self._ids = x, bias, matrix, rows, ids
        self._relu = is_relu(activation)
        self.compiled = scratch.kernel.fits(x)
        self._left: Ids | None = None
        if self.compiled:
            scratch.kernel.set(x, bias, matrix, rows, ids, relu=self._relu)

    def up(self, there: Ids, left: Ids) -> None:
        """Only if `compiled`: compute for positions `there` of `rows` while the rows of positions `left` are read."""
        self._left = left
        self._scratch.kernel.up(there)

    def finish(self, out: torch.Tensor) -> None:
        """Add what the block gives to `out`, float32 [1, d]. Every row must be there."""
        if not self.compiled:
            self._finish_in_torch(out)
            return
        kernel = self._scratch.kernel
        if self._left is None or len(self._left):
            kernel.up(self._left)
        if not self._relu:
            kernel.hidden.copy_(self._activation(kernel.hidden.to(self._x.dtype)))
        kernel.down(out)

    def _finish_in_torch(self, out: torch.Tensor) -> None:
        scratch, x, matrix, rows = self._scratch, self._x, self._matrix, self._rows
        n, d = len(rows), x.shape[1]
        bias = None if self._bias is None else torch.index_select(self._bias, 0, torch.from_numpy(self._ids))
        gathered = scratch.gathered.view(-1, d)  # [2 * block, d]
        up = torch.index_select(matrix.view(-1, d), 0, torch.from_numpy(2 * rows), out=gathered[:n])
        hidden = self._activation(F.linear(x, up, bias))[0]  # [n]
        active = hidden.nonzero()[:, 0].numpy()
        if len(active) == 0:
            return
        bags = 1 if d % _HALVES else _HALVES
        down = rows[active]  # in numpy: a small operator costs a tenth of one of torch when the caches are cold
        if not self._one_block and x.dtype != torch.float32:
            place = torch.from_numpy(2 * down + 1)  # of `matrix` seen as rows of d
            picked = torch.index_select(matrix.view(-1, d), 0, place, out=gathered[: len(active)])
            wide = scratch.wide.view(-1, d)[: len(active)].copy_(picked)
            out.addmm_(hidden[torch.from_numpy(active)].float()[None], wide)
        else:
            places = torch.from_numpy(2 * bags * down + bags + np.arange(bags)[:, None])  # [bags, active], of rows of d / bags
            weights = torch.index_select(hidden, 0, torch.from_numpy(np.concatenate([active] * bags))).view(bags, -1)
            sums = F.embedding_bag(places, matrix.view(-1, d // bags), per_sample_weights=weights, mode="sum")
            out += sums.view(1, d)


class SeveralTokens:
    """A call's tokens. `x` float32 [tokens, d] is there for those that are not `apart`.

    Args:
        x: [tokens, d] in the dtype of compute.
        selected: bool [tokens, d_ff], which neurons each token uses; `None`: all.
        union: how many neurons any of them uses.
        bias: [d_ff] of the up projection.
    """

    def __init__(
        self,
        scratch: Scratch,
        activation: Activation,
        x: torch.Tensor,
        selected: torch.Tensor | None,
        union: int,
        bias: torch.Tensor | None,
    ) -> None:
        self._scratch, self._activation, self._bias = scratch, activation, bias
        self._selected, self._kernel = selected, None
        if (
            selected is not None
            and scratch.kernel.fits(x)
            and is_relu(activation)
            and np.count_nonzero(selected.numpy()) <= _DENSE * len(x) * union
        ):
            self._kernel = TokensKernel(x, selected.contiguous(), bias, min(union, len(scratch.gathered)))
        else:
            self.x = x.float().contiguous()

    @property
    def apart(self) -> bool:
        """Whether every token is multiplied with its own neurons alone, by `add_apart`."""
        return self._kernel is not None

    def add_apart(self, places: Ids, ids: Ids, out: torch.Tensor) -> None:
        """Only if `apart`: add what a block of neurons gives to `out`, float32 [tokens, d].

        Args:
            places: addresses of their bundles (`native.addresses`).
        """
        assert self._kernel is not None
        self._kernel.add(places, ids, out)

    def add(self, matrix: torch.Tensor, rows: Ids, ids: Ids, out: torch.Tensor) -> torch.Tensor:
        """Add what a block of neurons gives to `out`, float32 [tokens, d], in a GEMM.

        Args:
            matrix: [any, 2 * d], contiguous; `rows` [n] says where the bundles of neurons `ids` [n] are in it.

        Returns:
            Pre-activations, [tokens, n] in the dtype of compute.
        """
        scratch, n, d, which = self._scratch, len(rows), self.x.shape[1], torch.from_numpy(ids)
        wide = scratch.wide[:n]
        gathered = torch.index_select(matrix, 0, torch.from_numpy(rows), out=scratch.gathered[:n])
        if wide.data_ptr() != gathered.data_ptr():
            wide.copy_(gathered)
        bias = None if self._bias is None else torch.index_select(self._bias, 0, which).float()
        before = F.linear(self.x, wide[:, :d], bias).to(matrix.dtype)
        hidden = self._activation(before).float()  # [tokens, n]
        if self._selected is not None:
            hidden.masked_fill_(~self._selected[:, which], 0.0)
        out.addmm_(hidden, wide[:, d:])
        return before


def is_relu(activation: Activation) -> bool:
    """Whether this is the activation that the compiled part knows."""
    return isinstance(activation, nn.ReLU) or activation in (F.relu, torch.relu)
