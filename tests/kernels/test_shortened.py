"""bfloat16 weights in 12 bits each: none of them is changed, whatever they are."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from penstock.kernels import ReferenceOps
from penstock.kernels.linear.cpu import PackedLinear
from tests.kernels.backends import instruction_sets, needs_native, using
from tests.kernels.test_linear import as_read, between_poison

pytestmark = needs_native

ISAS = [isa for isa in instruction_sets() if isa != "portable"]
N, K = 70, 512
ROWS_IN_PANELS = 96
"""N up to whole panels of the widest vectors"""


def like_trained() -> Tensor:
    return torch.randn(N, K).bfloat16()


def with_outliers() -> Tensor:
    """Return weights of which some are far from the others, among them what is hardest to keep."""
    weight = like_trained()
    odd = [0.0, -0.0, 1e-40, -1e-40, 1e-38, 3e38, -3e38, 1e-20, -1e20, 2.0**-14, 2.0**14]
    places = torch.randperm(N * K)[: len(odd)]
    weight.view(-1)[places] = torch.tensor(odd).bfloat16()
    weight[3] *= 2.0**-3
    weight[:, 5] *= 2.0**3
    return weight


def with_zeros() -> Tensor:
    weight = like_trained()
    weight[torch.rand(N, K) < 0.5] = 0
    weight[40:] = 0
    return weight


def of_all_sizes() -> Tensor:
    """Return weights whose exponents are all there are."""
    bits = torch.randint(-(2**15), 2**15, (N, K), dtype=torch.int16)
    weight = bits.view(torch.bfloat16)
    return torch.where(weight.isfinite(), weight, 1.0)


KINDS: dict[Callable[[], Tensor], bool] = {
    like_trained: True,
    with_outliers: True,
    with_zeros: True,
    of_all_sizes: False,
}
"""Weights, and whether they are shortened"""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("isa", ISAS)
def test_rows_have_the_same_bits(isa: str, kind: Callable[[], Tensor]) -> None:
    torch.manual_seed(0)
    weight = kind()
    with using(isa, 3):
        packed = PackedLinear(weight, None)
        rows = packed.embed(torch.arange(N))
    assert torch.equal(rows.view(torch.int32), weight.float().view(torch.int32))
    most = 1.6 if KINDS[kind] else 2
    assert packed.num_bytes <= most * ROWS_IN_PANELS * K


@pytest.mark.parametrize("kind", [like_trained, with_outliers, with_zeros])
@pytest.mark.parametrize("isa", ISAS)
def test_products_are_exact_and_the_same_for_any_number_of_rows(isa: str, kind: Callable[[], Tensor]) -> None:
    torch.manual_seed(0)
    # Numbers of which one alone decides the sum would hide the others.
    weight = kind().clamp(-1e3, 1e3)
    x = torch.randn(60, K)
    with using(isa, 3):
        packed = PackedLinear(weight, None)
        together = packed(between_poison(x))
        for num_rows in (1, 2, 3, 5, 13, 14, 29):
            assert torch.equal(packed(between_poison(x[:num_rows])), together[:num_rows])
    expected = as_read(x, isa, torch.bfloat16) @ weight.double().T
    torch.testing.assert_close(together.double(), expected, atol=2e-3, rtol=1e-5)


@pytest.mark.parametrize("isa", ISAS)
def test_gates_and_what_they_multiply_are_shortened(isa: str) -> None:
    torch.manual_seed(0)
    gate, up = with_outliers().clamp(-9, 9), like_trained()
    x = torch.randn(5, K) / 16
    with using(isa, 2):
        packed = PackedLinear(gate, None, up, None)
        out = packed(x)
    expected = ReferenceOps().prepare_gated_linear(gate.double(), up.double(), None, None)(
        as_read(x, isa, torch.bfloat16)
    )
    torch.testing.assert_close(out.double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("isa", ISAS)
def test_what_is_not_a_number_stays_so(isa: str) -> None:
    weight = torch.ones(N, K).bfloat16()
    weight[1, 7], weight[2, 9] = torch.nan, torch.inf
    with using(isa, 1):
        out = PackedLinear(weight, None)(torch.ones(1, K))[0]
    assert out[1].isnan()
    assert out[2] == torch.inf
    assert out[0] == out[3] == K
