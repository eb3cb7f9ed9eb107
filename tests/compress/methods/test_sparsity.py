"""Zeros on one matrix: where they are, how many, and what products with calibration inputs lose."""

import pytest
import torch
from torch import Tensor

from penstock.compress.methods.sparsegpt import sparsegpt
from penstock.compress.methods.sparsity import Sparsity, magnitude
from penstock.compress.methods.wanda import wanda

SPARSITIES = [Sparsity(0.5), Sparsity(0.3), Sparsity(0.5, 4), Sparsity(0.75, 8), Sparsity(2 / 3, 3)]


def _problem(num_outputs: int = 24, num_inputs: int = 288) -> tuple[Tensor, Tensor, Tensor]:
    """Return a weight, correlated inputs with some loud channels, and their second moments."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(num_outputs, num_inputs, generator=random) * 0.05
    mixing = torch.randn(num_inputs, num_inputs, generator=random) * 0.1 + torch.eye(num_inputs)
    inputs = torch.randn(600, num_inputs, generator=random) @ mixing
    inputs[:, ::17] *= 12
    return weight, inputs, inputs.T @ inputs


@pytest.mark.parametrize("sparsity", SPARSITIES, ids=str)
def test_there_are_as_many_zeros_as_asked_and_each_method_loses_less(sparsity: Sparsity) -> None:
    weight, inputs, hessian = _problem()
    losses = []
    for result in (magnitude(weight, sparsity), wanda(weight, hessian, sparsity), sparsegpt(weight, hessian, sparsity)):
        zeros = result == 0
        if sparsity.run is not None:
            in_runs = zeros.view(24, -1, sparsity.run).sum(-1)
            assert (in_runs == round(sparsity.share * sparsity.run)).all()
        assert float(zeros.float().mean()) == pytest.approx(sparsity.share, abs=0.005)
        losses.append(float((inputs @ (result - weight).T).square().sum()))
    assert losses[2] < losses[1] * 0.8 < losses[0] * 0.64


def test_magnitude_and_wanda_leave_what_is_not_zero_as_it_was() -> None:
    weight, _, hessian = _problem()
    for result in (magnitude(weight, Sparsity(0.5)), wanda(weight, hessian, Sparsity(0.5))):
        assert torch.equal(result, weight.where(result != 0, 0))
    # Wanda compares within an output.
    assert ((wanda(weight, hessian, Sparsity(0.5)) == 0).sum(1) == 144).all()


def _eliminate_one_by_one(weight: Tensor, hessian: Tensor, sparsity: Sparsity, damping: float) -> Tensor:
    """SparseGPT as its derivation has it: after each input, the inverse of what is left is made anew."""
    weight, num_inputs = weight.clone(), weight.shape[1]
    hessian = hessian + torch.eye(num_inputs) * damping * hessian.diagonal().mean()
    run, zero = sparsity.run, torch.zeros_like(weight, dtype=torch.bool)
    assert run is not None
    for k in range(num_inputs):
        if k % run == 0:
            # What input i would cost once those before it are gone.
            costs = torch.stack([1 / hessian[i:, i:].inverse()[0, 0] for i in range(k, k + run)])
            order = (weight[:, k : k + run].square() * costs).argsort(1)
            zero[:, k : k + run].scatter_(1, order[:, : round(sparsity.share * run)], True)
        inverse = hessian[k:, k:].inverse()
        dropped = weight[:, k].where(zero[:, k], 0)
        weight[:, k:] -= torch.outer(dropped / inverse[0, 0], inverse[0])
    return weight.masked_fill(zero, 0)


def test_sparsegpt_in_blocks_equals_elimination_one_by_one() -> None:
    weight, _, hessian = _problem(num_inputs=144)
    weight, hessian = weight.double(), hessian.double()
    for sparsity in (Sparsity(0.5, 4), Sparsity(2 / 3, 3)):
        expected = _eliminate_one_by_one(weight, hessian, sparsity, 0.01)
        torch.testing.assert_close(sparsegpt(weight, hessian, sparsity), expected)


def test_inputs_that_were_never_used_go_first() -> None:
    weight, inputs, _ = _problem()
    inputs[:, 10:20] = 0
    hessian = inputs.T @ inputs
    for result in (wanda(weight, hessian, Sparsity(0.5)), sparsegpt(weight, hessian, Sparsity(0.5))):
        assert (result[:, 10:20] == 0).all()


@pytest.mark.parametrize("pattern", ["2", "2:", "0:4", "4:4", "5:4", "-2:4", "a:b", "2:4:8"])
def test_what_is_no_pattern_is_not_read_as_one(pattern: str) -> None:
    assert Sparsity.read_pattern(pattern) is None


def test_a_pattern_says_how_many_stay() -> None:
    assert Sparsity.read_pattern("2:4") == Sparsity(0.5, 4)
    assert Sparsity.read_pattern("1:4") == Sparsity(0.75, 4)
