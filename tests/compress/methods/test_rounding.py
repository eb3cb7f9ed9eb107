"""Each method on one matrix: what its products with calibration inputs lose."""

import pytest
import torch
from torch import Tensor

from penstock.compress.methods.awq import awq, product_error, search_scales
from penstock.compress.methods.gptq import gptq
from penstock.compress.methods.grid import fit_grid, group_size, last_code, round_to_grid
from penstock.compress.methods.rtn import rtn
from penstock.compress.methods.smoothquant import smoothing_scales
from penstock.errors import CalibrationUnfit
from penstock.quant import Scheme, dequantize

SCHEMES = [
    Scheme(bits=bits, group=group, symmetric=symmetric)
    for bits in (3, 4, 8)
    for group in (None, 32)
    for symmetric in (True, False)
]


def _problem(num_outputs: int = 24, num_inputs: int = 96, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return a weight, correlated inputs with some loud channels, and their second moments."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_outputs, num_inputs, generator=random) * 0.05
    mixing = torch.randn(num_inputs, num_inputs, generator=random) * 0.3 + torch.eye(num_inputs)
    inputs = torch.randn(512, num_inputs, generator=random) @ mixing
    inputs[:, ::17] *= 12
    return weight, inputs, inputs.T @ inputs


def _loss(weight: Tensor, rounded: Tensor, inputs: Tensor) -> float:
    return float((inputs @ (rounded - weight).T).square().sum())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_codes_are_the_nearest_points_of_a_grid_that_covers_the_weight(scheme: Scheme) -> None:
    weight, _, _ = _problem()
    codes = rtn(weight, scheme)
    assert codes.codes.max() <= last_code(scheme)
    wide = codes.scales.float().repeat_interleave(group_size(scheme, 96), 1)[:, :96]
    # Half a step; at the ends half a step more, by which a zero, or a symmetric grid's last code, is off; and what 255
    # scales of 8 bits of mantissa may fall short.
    assert ((dequantize(codes) - weight).abs() <= 1.5 * wide).all()
    assert (dequantize(codes) - weight).abs().mean() <= 0.3 * wide.mean()
    assert torch.equal(codes.scales.float(), codes.scales.half().float())


def test_groups_need_not_divide_the_inputs() -> None:
    weight, _, hessian = _problem(num_inputs=80)
    scheme = Scheme(bits=4, group=32, symmetric=False)
    for codes in (rtn(weight, scheme), gptq(weight, hessian, scheme), awq(weight, hessian, scheme)):
        assert codes.scales.shape == (24, 3)
        assert (dequantize(codes) - weight).abs().max() < 0.07


def test_searched_grids_err_no_more_than_covering_ones() -> None:
    weight, _, hessian = _problem()
    importance = hessian.diagonal()
    scheme = Scheme(bits=3, group=32)
    errors = [
        (dequantize(round_to_grid(weight, fit_grid(weight, scheme, importance, search=search), scheme)) - weight)
        .square()
        .mul(importance)
        .sum()
        for search in (False, True)
    ]
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("act_order", [True, False])
def test_gptq_loses_less_than_rounding(scheme: Scheme, act_order: bool) -> None:
    weight, inputs, hessian = _problem()
    rounded = _loss(weight, dequantize(rtn(weight, scheme)), inputs)
    assert _loss(weight, dequantize(gptq(weight, hessian, scheme, act_order=act_order)), inputs) < rounded * 0.7


def _eliminate_one_by_one(weight: Tensor, hessian: Tensor, codes_of: Scheme, damping: float) -> Tensor:
    """GPTQ as its derivation has it: after each input, the inverse of what is left is made anew."""
    weight, hessian = weight.double(), hessian.double()
    importance = hessian.diagonal().clone()
    grid = fit_grid(weight.float(), codes_of, importance.float(), search=True)
    wide = grid.per_input(group_size(codes_of, weight.shape[1]), weight.shape[1])
    hessian = hessian + torch.eye(len(hessian)) * damping * importance.mean()
    left = importance.argsort(descending=True, stable=True).tolist()
    result = torch.empty_like(weight)
    while left:
        k, inverse = left[0], hessian[left][:, left].inverse()
        codes = (weight[:, k] / wide.scales[:, k] + wide.zeros[:, k]).round().clamp(0, last_code(codes_of))
        result[:, k] = (codes - wide.zeros[:, k]) * wide.scales[:, k]
        weight[:, left] -= torch.outer((weight[:, k] - result[:, k]) / inverse[0, 0], inverse[0])
        left = left[1:]
    return result


@pytest.mark.parametrize("scheme", [Scheme(bits=4, group=32, symmetric=False), Scheme(bits=3)], ids=str)
def test_gptq_in_blocks_equals_elimination_one_by_one(scheme: Scheme) -> None:
    weight, _, hessian = _problem(num_inputs=288)
    expected = _eliminate_one_by_one(weight, hessian, scheme, 0.01)
    result = dequantize(gptq(weight.double(), hessian.double(), scheme))
    # A value in the middle between two codes may go either way, and what follows with it.
    same = (result - expected).abs() < 1e-6
    assert same.float().mean() > 0.99
    assert product_error(result - weight, hessian) == pytest.approx(
        product_error(expected.float() - weight, hessian), rel=0.01
    )


def test_inputs_that_were_never_used_are_rounded_by_themselves() -> None:
    weight, inputs, _ = _problem()
    inputs[:, 10] = 0
    scheme = Scheme(bits=4, group=32)
    result = dequantize(gptq(weight, inputs.T @ inputs, scheme))
    assert (result[:, 10] - weight[:, 10]).abs().max() < 0.05


def test_moments_of_few_tokens_are_damped_until_they_can_be_inverted() -> None:
    weight, inputs, _ = _problem()
    few = inputs[:5]
    scheme = Scheme(bits=4)
    result = dequantize(gptq(weight, few.T @ few, scheme, damping=1e-9))
    assert result.isfinite().all()
    assert _loss(weight, result, few) < _loss(weight, dequantize(rtn(weight, scheme)), few)


def test_moments_that_are_no_moments_are_refused() -> None:
    weight, _, hessian = _problem()
    with pytest.raises(CalibrationUnfit, match="not positive definite"):
        gptq(weight, hessian - 2 * torch.eye(96) * hessian.diagonal().max() * 50, Scheme(bits=4))


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_awq_loses_less_than_rounding_by_scales_and_by_clipping(bits: int, symmetric: bool) -> None:
    weight, inputs, hessian = _problem()
    scheme = Scheme(bits=bits, group=32, symmetric=symmetric)
    plain = _loss(weight, dequantize(rtn(weight, scheme)), inputs)
    scales = search_scales(weight, hessian, inputs.abs().mean(0), scheme)
    scaled = weight * scales
    only_scaled = _loss(weight, dequantize(rtn(scaled, scheme)) / scales, inputs)
    clipped = _loss(weight, dequantize(awq(scaled, hessian / scales.outer(scales), scheme)) / scales, inputs)
    assert only_scaled < plain * 0.9
    assert clipped < only_scaled


def _search_by_running(weight: Tensor, inputs: Tensor, scheme: Scheme) -> Tensor:
    """AWQ as its paper has it, products computed: the best of 20 powers, then the best of 10 clippings a group."""
    weight, inputs = weight.double(), inputs.double()
    group, codes = scheme.group or weight.shape[1], last_code(scheme)

    def rounded(w: Tensor) -> Tensor:
        groups = w.view(len(w), -1, group)
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scale = ((high - low) / codes).clamp(min=1e-9)
        zero = (-low / scale).round().clamp(0, codes)
        return (((groups / scale).round() + zero).clamp(0, codes) - zero).mul(scale).view(w.shape)

    exact, least, best = inputs @ weight.T, float("inf"), torch.ones(weight.shape[1]).double()
    for step in range(20):
        scales = inputs.abs().mean(0) ** (step / 20)
        scales = scales / (scales.max() * scales.min()).sqrt()
        error = float((inputs @ (rounded(weight * scales) / scales).T - exact).square().sum())
        if error < least:
            least, best = error, scales
    scaled, read = weight * best, (inputs / best).view(len(inputs), -1, group)
    greatest = scaled.view(len(scaled), -1, group).abs().amax(-1)
    errors, choices = [], []
    for step in range(10):
        most = (greatest * (1 - step / 20)).repeat_interleave(group, 1)
        choices.append(rounded(scaled.clamp(-most, most)))
        delta = (choices[-1] - scaled).view(len(scaled), -1, group)
        errors.append(torch.einsum("tgk,ngk->tng", read, delta).square().sum(0))
    chosen = torch.stack(errors).argmin(0).repeat_interleave(group, 1)
    return torch.stack(choices).gather(0, chosen.unsqueeze(0))[0] / best


@pytest.mark.parametrize("bits", [3, 4])
def test_awq_lands_where_the_papers_search_does(bits: int) -> None:
    weight, inputs, hessian = _problem()
    scheme = Scheme(bits=bits, group=32, symmetric=False)
    expected = _loss(weight, _search_by_running(weight, inputs, scheme).float(), inputs)
    scales = search_scales(weight, hessian, inputs.abs().mean(0), scheme)
    ours = dequantize(awq(weight * scales, hessian / scales.outer(scales), scheme)) / scales
    assert _loss(weight, ours, inputs) <= 1.01 * expected


def test_scales_of_repeated_inputs_are_the_same() -> None:
    weight, inputs, hessian = _problem()
    scales = search_scales(weight, hessian, inputs.abs().mean(0), Scheme(bits=3, group=32), shared_by=3, width=16).view(
        2, 3, 16
    )
    assert torch.equal(scales[:, :1].expand_as(scales), scales)
    assert len(set(scales.flatten().tolist())) > 1


def test_the_error_of_products_comes_from_second_moments() -> None:
    weight, inputs, hessian = _problem()
    delta = torch.randn_like(weight)
    assert product_error(delta, hessian) == pytest.approx(float((inputs @ delta.T).square().sum()), rel=1e-4)


def test_smoothing_evens_out_what_each_token_is_rounded_by() -> None:
    weight, inputs, _ = _problem()
    scales = smoothing_scales(weight, inputs.abs().amax(0))
    smoothed = inputs / scales

    def rounded(x: Tensor) -> Tensor:
        step = x.abs().amax(-1, keepdim=True) / 127
        return (x / step).round() * step

    def loss(x: Tensor, w: Tensor) -> float:
        scheme = Scheme(bits=8)
        return float((rounded(x) @ dequantize(rtn(w, scheme)).T - inputs @ weight.T).square().sum())

    torch.testing.assert_close(smoothed @ (weight * scales).T, inputs @ weight.T)
    assert loss(smoothed, weight * scales) < 0.5 * loss(inputs, weight)
