"""Every way to multiply by a weight against the reference."""

import pytest
import torch

from penstock.kernels.linear.cpu import PackedLinear
from penstock.kernels.linear.reference import ReferenceLinear


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("num_inputs", "num_outputs"), [(1, 1), (3, 7), (64, 65), (257, 31), (256, 768)])
@pytest.mark.parametrize("num_tokens", [1, 2, 31, 33, 200])
def test_packed_equals_the_reference(num_tokens: int, num_inputs: int, num_outputs: int, with_bias: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(num_outputs, num_inputs)
    bias = torch.randn(num_outputs) if with_bias else None
    x = torch.randn(num_tokens, num_inputs)
    torch.testing.assert_close(PackedLinear(weight, bias)(x), ReferenceLinear(weight, bias)(x), atol=1e-4, rtol=1e-5)
