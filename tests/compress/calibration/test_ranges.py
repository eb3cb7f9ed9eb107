"""Ranges of values, and the codes that suit them, against all values at once."""

import pytest
import torch

from penstock.compress.calibration.ranges import ValueRange
from penstock.errors import CalibrationUnfit
from penstock.kernels import InputCodes
from penstock.kernels.linear.reference import round_activations


def _seen(x: torch.Tensor) -> ValueRange:
    seen = ValueRange()
    # Small values first, so that bins have to widen.
    for part in torch.split(x[x.abs().amax(1).argsort()], 7):
        seen.add(part)
    return seen


def _skewed() -> torch.Tensor:
    torch.manual_seed(0)
    x = torch.nn.functional.silu(torch.randn(400, 50) * 2)
    x[5, 7] = 300.0
    return x


def _error(x: torch.Tensor, codes: InputCodes) -> float:
    return float((round_activations(x, codes) - x.double()).square().mean())


@pytest.mark.parametrize("symmetric", [True, False])
def test_all_values_fit(symmetric: bool) -> None:
    x = _skewed()
    codes = _seen(x).codes("min-max", symmetric=symmetric, percentile=99.0)
    assert (round_activations(x, codes) - x).abs().max() <= codes.scale * 1.01
    assert codes.scale == pytest.approx((300 if symmetric else 150) / 127.5, rel=1e-2)
    assert (codes.zero == 0) is symmetric


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9])
def test_a_percentile_leaves_out_as_many_as_it_says(percentile: float, symmetric: bool) -> None:
    x = _skewed()
    codes = _seen(x).codes("percentile", symmetric=symmetric, percentile=percentile)
    low, high = ((end - codes.zero) * codes.scale for end in (-128, 127))
    outside = ((x < low - codes.scale) | (x > high + codes.scale)).float().mean().item()
    assert outside <= (100 - percentile) / 100 + 1e-3
    inside = ((x > low * 0.9) & (x < high * 0.9)).float().mean().item()
    assert inside <= percentile / 100 + 1e-3
    assert _seen(x).codes("percentile", symmetric=symmetric, percentile=100).scale == pytest.approx(
        _seen(x).codes("min-max", symmetric=symmetric, percentile=100).scale, rel=0.02
    )


def test_the_least_squared_error_is_less_than_that_of_all_values() -> None:
    torch.manual_seed(0)
    x = torch.randn(2000, 64) ** 3
    seen = _seen(x)
    errors = {
        observer: _error(x, seen.codes(observer, symmetric=True, percentile=99.0))
        for observer in ("min-max", "percentile", "mse")
    }
    assert errors["mse"] < errors["min-max"] * 0.9
    assert errors["mse"] < errors["percentile"]


def test_nothing_but_zeros_has_codes() -> None:
    seen = _seen(torch.zeros(20, 3))
    for observer in ("min-max", "percentile", "mse"):
        codes = seen.codes(observer, symmetric=False, percentile=99.0)
        assert codes.scale > 0
        assert not round_activations(torch.zeros(1, 3), codes).any()


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_no_number_is_refused(value: float) -> None:
    with pytest.raises(CalibrationUnfit, match="infinite"):
        ValueRange().add(torch.tensor([[0.0, value]]))
