"""Feed-forwards of more tokens than are computed at once."""

import pytest
import torch

from penstock.kernels import CPUOps, Ops, ReferenceOps
from penstock.models.parts import GatedMLP
from tests.kernels.backends import needs_native

E, F = 24, 40


@pytest.mark.parametrize("ops", [ReferenceOps(), pytest.param(CPUOps(), marks=needs_native)], ids=["reference", "cpu"])
@pytest.mark.parametrize("num_tokens", [512, 513, 1100])
def test_long_steps_are_their_tokens(ops: Ops, num_tokens: int) -> None:
    torch.manual_seed(0)
    gate, up, down = torch.randn(F, E), torch.randn(F, E), torch.randn(E, F)
    mlp = GatedMLP(ops.prepare_gated_linear(gate, up, None, None), ops.prepare_linear(down, None))
    x, added = torch.randn(num_tokens, E), torch.randn(num_tokens, E)
    expected = torch.cat([mlp(part, None) for part in x.split(100)])  # type: ignore[no-untyped-call]
    torch.testing.assert_close(mlp(x, None), expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(mlp(x, added.clone()), expected + added, atol=1e-4, rtol=1e-5)
