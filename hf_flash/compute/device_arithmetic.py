"""`DeviceArithmetic`: blocks of neurons on a device, by torch's own operators, in matrices of the dtype of compute.

Rows are gathered in the order of their ids, so that a sum has one order wherever they lie. What decides how a device's library
sums up is the shape of a product; so shapes follow from the call alone, and results do not depend on what is in memory:

    one token                the neurons of a block that it uses
    several, each its own    all neurons of a block; those that nobody uses are zeros, and are not read
    several, all neurons     all neurons of a block

The last product is summed up in fp32, over all blocks.
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
    """The arithmetic of a device. Matrices that it is given are there.

    rows      [two blocks, unit.numbers] streamed neurons
    gathered  [a block, unit.numbers] rows picked from a window

    Args:
        d_ff: neurons of the widest layer.
        unit: what a neuron is, in the dtype of compute.
        activation: of all layers.
        device: which.
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
        """What the buffers take, in bytes, and a widened block of one part."""
        return block_rows(d_ff, 2) * ((_BUFFERS + 2) * unit.row_bytes + 4 * unit.width)  # one more is picked on the way

    def matrix(self, rows: int) -> torch.Tensor:
        return torch.empty(rows, self.unit.numbers, dtype=self.unit.dtype, device=self.device)

    def matrices(self, rows: Sequence[int]) -> list[torch.Tensor]:
        """In one piece: a device's allocator rounds up."""
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
        """Rows of a matrix, at most a block of them, [n, unit.numbers]: gathered, or where they lie if they are side by side.

        Either way products of the same shape give the same bits: both begin where a device's fast ones may.
        """
        first, count = int(rows[0]), len(rows)
        if self.unit.row_bytes % _ALIGNMENT == 0 and np.array_equal(rows, np.arange(first, first + count)):
            return matrix[first : first + count]
        return torch.index_select(matrix, 0, upload(rows, self.device), out=self.gathered[:count])

    def hidden(self, x: torch.Tensor, biases: Biases, bundles: torch.Tensor, ids: torch.Tensor) -> Values:
        """What comes before the last product, of every token and every neuron.

        Args:
            x: [tokens, d] in the dtype of compute.
            bundles: [n, unit.numbers] of neurons `ids` [n].
        """

        def product(role: Role) -> torch.Tensor:
            bias = biases[role]
            return F.linear(x, bundles[:, self.unit.columns(role)], None if bias is None else bias.index_select(0, ids))

        before = product(self.unit.deciding)
        return Values(before, self.activation.hidden(before, product("up") if self.unit.deciding == "gate" else None))

    def add_down(self, hidden: torch.Tensor, bundles: torch.Tensor, out: torch.Tensor) -> None:
        """Add hidden values [tokens, n] times the last part of bundles [n, unit.numbers] to `out`, float32 [tokens, d]."""
        down = bundles[:, self.unit.columns("down")]
        if _sums_in_fp32(self.device, self.unit.dtype):
            out.add_(torch.mm(hidden, down, out_dtype=torch.float32))
        else:
            out.addmm_(hidden.float(), down.float())


_ALIGNMENT: Final = 256  # bytes: where a matrix begins may decide which of its products a library takes, up to here
_BUFFERS: Final = 2  # as in runtime/stream.py: one is filled while the other is computed


@lru_cache
def _sums_in_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device multiplies 16 bits to fp32 without widening them: CUDA, since torch 2.8."""
    if device.type != "cuda" or dtype == torch.float32:
        return False
    some = torch.zeros(16, 16, dtype=dtype, device=device)
    try:
        torch.mm(some, some, out_dtype=torch.float32)
    except (RuntimeError, TypeError):
        return False
    return True


class _Token:
    """A block's share of one token."""

    def __init__(
        self, arithmetic: DeviceArithmetic, x: torch.Tensor, biases: Biases, matrix: torch.Tensor, rows: Ids, ids: Ids
    ) -> None:
        self._arithmetic, self._x, self._biases, self._matrix = arithmetic, x, biases, matrix
        self._rows, self._ids = rows, ids

    def multiply_present(self, present: Ids, missing: Ids) -> None:
        """Nothing: a device multiplies them all in the time that it takes to ask for some."""

    def finish(self, out: torch.Tensor) -> None:
        arithmetic = self._arithmetic
        for at in range(0, len(self._ids), len(arithmetic.gathered)):
            part = slice(at, at + len(arithmetic.gathered))
            bundles = arithmetic.bundles(self._matrix, self._rows[part])
            values = arithmetic.hidden(self._x, self._biases, bundles, upload(self._ids[part], arithmetic.device))
            arithmetic.add_down(values.hidden, bundles, out)


class _Tokens:
    """Several tokens, block of neighbours after block."""

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
