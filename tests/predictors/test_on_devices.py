"""Low-bit matrices as a device has them: the product of what they stand for, a token at a time."""

from __future__ import annotations

import pytest
import torch

from hf_flash.predictors import low_bit
from hf_flash.predictors.low_bit import DeviceMatrix, quantize_rows, widen


@pytest.mark.parametrize(("bits", "group"), [(8, 96), (4, 32), (4, 6)])
@pytest.mark.parametrize("at_a_time", [1, 96 * 5, 1 << 20])
def test_it_multiplies_as_the_numbers_that_it_stands_for(
    bits: int, group: int, at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(low_bit, "_WIDENED", at_a_time)
    torch.manual_seed(0)
    weight, x, shift = torch.randn(37, 96), torch.randn(5, 96), torch.randn(37)
    packed = quantize_rows(weight, bits, group)
    codes, scales, zeros = packed["codes"], packed["scales"], packed.get("zeros")
    matrix = DeviceMatrix(codes, scales, zeros, torch.device("cpu"))
    wanted = x.double() @ widen(codes, scales, zeros).double().T
    torch.testing.assert_close(matrix(x).double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(matrix(x, shift).double(), wanted + shift, rtol=1e-5, atol=1e-5)
    assert torch.equal(matrix(x)[2:3], matrix(x[2:3])), "the tokens beside it change a token"
    assert matrix.nbytes == sum(part.nbytes for part in (codes, scales, zeros) if part is not None)
    codes.zero_()
    assert not torch.equal(matrix(x), torch.zeros(5, 37)), "it has a copy"
