"""Products of low rank: as near as any can be, and nearer where inputs are large."""

import pytest
import torch

from penstock.compress.methods.awq import product_error
from penstock.compress.methods.low_rank import low_rank


def _drawn() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(500, 24) @ torch.randn(24, 24) * torch.logspace(-1, 1, 24)
    return torch.randn(32, 24), x.T @ x / len(x)


@pytest.mark.parametrize("rank", [1, 7, 16])
def test_no_product_of_that_rank_is_nearer(rank: int) -> None:
    weight, hessian = _drawn()
    first, second = low_rank(weight, hessian, rank, damping=1e-8)
    assert (first.shape, second.shape) == ((rank, 24), (32, rank))
    found = product_error(second @ first - weight, hessian)
    # What the singular values beyond the rank stand for, by way of another root.
    whitened = weight.double() @ torch.linalg.cholesky(hessian.double())
    least = float(torch.linalg.svdvals(whitened)[rank:].square().sum())
    assert found == pytest.approx(least, rel=1e-3)
    left, singular, right = torch.linalg.svd(weight)
    plain = (left[:, :rank] * singular[:rank]) @ right[:rank]
    assert found < 0.9 * product_error(plain - weight, hessian)


def test_all_singular_values_give_the_matrix_itself() -> None:
    weight, hessian = _drawn()
    first, second = low_rank(weight, hessian, 24)
    torch.testing.assert_close(second @ first, weight, atol=1e-3, rtol=1e-3)


def test_inputs_that_no_token_took_do_no_harm() -> None:
    weight, hessian = _drawn()
    hessian[5], hessian[:, 5] = 0, 0
    first, second = low_rank(weight, hessian, 12)
    assert first.isfinite().all()
    assert second.isfinite().all()
