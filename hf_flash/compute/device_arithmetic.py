"""`DeviceArithmetic`: blocks of neurons on a device, by torch's own operators, in matrices of the compute dtype.

Rows are gathered in the order of their ids, so that a sum has the same order wherever the rows lie. A device's library chooses
the order of a sum by the shape of the product. So shapes follow from the call alone, and results do not depend on what is in
memory. A product takes:

    one token                the neurons of a block that it uses
    several, each its own    all neurons of a block; those that no token uses are zeros, and are not read
    several, all neurons     all neurons of a block

The last product is summed in fp32, over all blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F

from hf_flash.base.arrays import Ids, count_uses
from hf_flash.compute.activation import Activation
from hf_flash.compute.arithmetic import Arithmetic, OneToken, SeveralTokens, Values, block_rows, last_uses
from hf_flash.compute.kernels import EVERY_COLUMN, Biases
from hf_flash.compute.transfers import upload
from hf_flash.store.unit import Role, UnitLayout


class DeviceArithmetic(Arithmetic):
    """The arithmetic on a device. The matrices passed to it must be on that device.

    rows      [two blocks, unit.numbers] streamed neurons
    gathered  [a block, unit.numbers] rows picked from a window

    Args:
        d_ff: neurons of the widest layer.
        unit: the layout of a neuron, in the compute dtype.
        activation: the activation of all layers.
        device: the device that holds the matrices and computes.
    """

    def __init__(self, d_ff: int, unit: UnitLayout, activation: Activation, device: torch.device) -> None:
        self.unit, self.activation, self.device = unit, activation, device
        block = block_rows(d_ff, 2)
        self.rows = torch.empty(_BUFFERS * block, unit.numbers, dtype=unit.dtype, device=device)
        self.gathered = torch.empty(block, unit.numbers, dtype=unit.dtype, device=device)
        self.wide = torch.empty(1, dtype=torch.float32, device="cpu")  # nothing is widened here
        self.nbytes = self.size(d_ff, unit)

    @staticmethod
    def size(d_ff: int, unit: UnitLayout) -> int:
        """Bytes that the buffers take, together with temporary copies: one block, and one part of a block in fp32."""
        return block_rows(d_ff, 2) * ((_BUFFERS + 2) * unit.row_bytes + 4 * unit.width)  # a block is picked on the way

    def matrix(self, rows: int) -> torch.Tensor:
        return torch.empty(rows, self.unit.numbers, dtype=self.unit.dtype, device=self.device)

    def matrices(self, rows: Sequence[int]) -> list[torch.Tensor]:
        """Allocated in one piece, because a device's allocator rounds sizes up."""
        return list(torch.split(self.matrix(sum(rows)), list(rows)))

    def release(self) -> None:
        self.rows = self.gathered = self.rows.new_empty((0, self.unit.numbers))

    def one_token(
        self, x: torch.Tensor, biases: Biases, matrix: torch.Tensor, rows: Ids, ids: Ids, *, one_block: bool
    ) -> OneToken:
        return _Token(self, x, biases, matrix, rows, ids)

    def several_tokens(self, x: torch.Tensor, selected: torch.Tensor | None, union: int, biases: Biases) -> SeveralTokens:
        return _Tokens(self, x, selected, biases)

    def copy_rows(
        self, source: torch.Tensor, chosen: Ids, target: torch.Tensor, places: Ids, columns: slice = EVERY_COLUMN
    ) -> None:
        for at in range(0, len(chosen), len(self.gathered)):
            part = slice(at, at + len(self.gathered))
            picked = source[:, columns].index_select(0, upload(chosen[part], self.device))
            target[:, columns].index_copy_(0, upload(places[part], self.device), picked)

    def count_uses(self, before: torch.Tensor) -> tuple[Ids, Ids]:
        active = self.activation.active(before).cpu().numpy()
        return count_uses(active), last_uses(active)

    def bundles(self, matrix: torch.Tensor, rows: Ids) -> torch.Tensor:
        """At most a block of rows of a matrix, [n, unit.numbers]: a view if they are consecutive, else gathered.

        Products of the same shape give the same bits either way, because both begin at an aligned address.
        """
        first, count = int(rows[0]), len(rows)
        if self.unit.row_bytes % _ALIGNMENT == 0 and np.array_equal(rows, np.arange(first, first + count)):
            return matrix[first : first + count]
        return torch.index_select(matrix, 0, upload(rows, self.device), out=self.gathered[:count])

    def hidden(self, x: torch.Tensor, biases: Biases, bundles: torch.Tensor, ids: torch.Tensor) -> Values:
        """Everything before the last product, for every token and every neuron.

        Args:
            x: [tokens, d] in the compute dtype.
            bundles: [n, unit.numbers], the bundles of neurons `ids` [n].
        """

        def product(role: Role) -> torch.Tensor:
            bias = biases[role]
            return F.linear(x, bundles[:, self.unit.columns(role)], None if bias is None else bias.index_select(0, ids))

        before = product(self.unit.deciding)
        return Values(before, self.activation.hidden(before, product("up") if self.unit.deciding == "gate" else None))

    def add_down(self, hidden: torch.Tensor, bundles: torch.Tensor, out: torch.Tensor) -> None:
        """Add hidden values [tokens, n] times the down part of `bundles` [n, unit.numbers] to `out`, float32 [tokens, d]."""
        down = bundles[:, self.unit.columns("down")]
        if _sums_in_fp32(self.device, self.unit.dtype):
            out.add_(torch.mm(hidden, down, out_dtype=torch.float32))
        else:
            out.addmm_(hidden.float(), down.float())


_ALIGNMENT: Final = 256  # bytes; a library may choose a kernel by the alignment of a matrix, up to this
_BUFFERS: Final = 2  # as in runtime/stream.py: one is filled while the other is computed


@lru_cache
def _sums_in_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device multiplies 16-bit matrices into fp32 without widening them: CUDA, since torch 2.8."""
    if device.type != "cuda" or dtype == torch.float32:
        return False
    some = torch.zeros(16, 16, dtype=dtype, device=device)
    try:
        torch.mm(some, some, out_dtype=torch.float32)
    except (RuntimeError, TypeError):
        return False
    return True


class _Token:
    """One token's products with a block of neurons."""

    def __init__(
        self, arithmetic: DeviceArithmetic, x: torch.Tensor, biases: Biases, matrix: torch.Tensor, rows: Ids, ids: Ids
    ) -> None:
        self._arithmetic, self._x, self._biases, self._matrix = arithmetic, x, biases, matrix
        self._rows, self._ids = rows, ids

    def multiply_present(self, present: Ids, missing: Ids) -> None:
        """Does nothing: a device multiplies all rows in the time that it takes to launch a product of some."""

    def finish(self, out: torch.Tensor) -> None:
        arithmetic = self._arithmetic
        for at in range(0, len(self._ids), len(arithmetic.gathered)):
            part = slice(at, at + len(arithmetic.gathered))
            bundles = arithmetic.bundles(self._matrix, self._rows[part])
            values = arithmetic.hidden(self._x, self._biases, bundles, upload(self._ids[part], arithmetic.device))
            arithmetic.add_down(values.hidden, bundles, out)


class _Tokens:
    """Several tokens, one block of consecutive neurons after another."""

    scattered, together = False, EVERY_COLUMN

    def __init__(self, arithmetic: DeviceArithmetic, x: torch.Tensor, selected: torch.Tensor | None, biases: Biases) -> None:
        self._arithmetic, self._x, self._biases = arithmetic, x, biases
        self._selected = None if selected is None else upload(selected.numpy(), arithmetic.device)

    def add(self, matrix: torch.Tensor, rows: Ids, ids: Ids, out: torch.Tensor) -> Values | None:
        arithmetic, device = self._arithmetic, self._arithmetic.device
        if self._selected is None:
            bundles = arithmetic.bundles(matrix, rows)
            values = arithmetic.hidden(self._x, self._biases, bundles, upload(ids, device))
            arithmetic.add_down(values.hidden, bundles, out)
            return values
        block, d_ff = len(arithmetic.gathered), self._selected.shape[1]
        first = int(ids[0]) // block * block
        every = torch.arange(first, min(first + block, d_ff), dtype=torch.int64, device=device)
        bundles = arithmetic.gathered[: len(every)].zero_()
        bundles.index_copy_(0, upload(ids - first, device), matrix.index_select(0, upload(rows, device)))
        hidden = arithmetic.hidden(self._x, self._biases, bundles, every).hidden
        mine = self._selected[:, first : first + len(every)]
        arithmetic.add_down(hidden.masked_fill(~mine, 0.0), bundles, out)
        return None

    def add_streamed(self, matrix: torch.Tensor, rows: Ids, places: Ids, ids: Ids, out: torch.Tensor) -> Values | None:
        return self.add(matrix, rows, ids, out)
