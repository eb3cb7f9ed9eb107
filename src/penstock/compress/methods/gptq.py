"""GPTQ: rounding one input after another, the others making up for the error.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2022). Inputs go
from the one that matters most to the least ("act-order"), each keeping the group it has in the stored weight, whose
grid is fitted beforehand ("static groups"): the order then costs nothing at run time. N outputs, K inputs.
"""

import torch
from torch import Tensor

from penstock.compress.methods.grid import as_codes, decode, encode, fit_grid, group_size
from penstock.errors import CalibrationUnfit
from penstock.quant import QuantizedWeight, Scheme
from penstock.telemetry import get_logger

_log = get_logger(__name__)

BLOCK = 128
"""Inputs between two updates of all that follow"""
_MOST_DAMPING = 1.0


def gptq(
    weight: Tensor, hessian: Tensor, scheme: Scheme, *, act_order: bool = True, damping: float = 0.01
) -> QuantizedWeight:
    """Return codes of ``weight`` [N, K] that leave its products with calibration inputs as they were, nearly.

    hessian    [K, K] float32, sum or mean of x x^T over calibration tokens
    damping    share of the mean diagonal added to the diagonal; ten times more as long as that is not positive definite
    Without ``act_order`` inputs go as they come, and a group's grid is fitted when its turn comes, errors included.
    Raises ``CalibrationUnfit`` if no damping helps.
    """
    weight, hessian = weight.clone(), hessian.clone()
    never_used = hessian.diagonal() == 0
    importance = hessian.diagonal().clone()
    # What no calibration token ever used is rounded by itself, and moves nothing else.
    hessian.diagonal()[never_used] = importance.mean().clamp(min=1e-30)
    num_inputs = weight.shape[1]
    group = group_size(scheme, num_inputs)
    grid = fit_grid(weight, scheme, importance, search=True)
    order = importance.argsort(descending=True, stable=True) if act_order else torch.arange(num_inputs)
    wide = grid.per_input(group, num_inputs)
    scales, zeros = wide.scales[:, order].contiguous(), wide.zeros[:, order].contiguous()
    weight = weight[:, order].contiguous()
    upper = inverse_factor(hessian[order][:, order], damping)
    codes = torch.empty_like(weight)
    # A group that begins anew needs everything before it done.
    block = BLOCK if act_order or scheme.group is None else group
    for start in range(0, num_inputs, block):
        end = min(start + block, num_inputs)
        if not act_order and scheme.group is not None:
            own = fit_grid(weight[:, start:end], scheme, importance[start:end], search=True)
            grid.scales[:, start // group], grid.zeros[:, start // group] = own.scales[:, 0], own.zeros[:, 0]
            scales[:, start:end], zeros[:, start:end] = own.scales, own.zeros
        # Inputs first: what is rounded at a time, and what follows it, then lies in a row of memory.
        part, part_scales, part_zeros = (x[:, start:end].T.contiguous() for x in (weight, scales, zeros))
        factor, errors, part_codes = upper[start:end, start:end], torch.empty_like(part), torch.empty_like(part)
        for i in range(end - start):
            part_codes[i] = encode(part[i], part_scales[i], part_zeros[i], scheme)
            errors[i] = (part[i] - decode(part_codes[i], part_scales[i], part_zeros[i])).div_(factor[i, i])
            part[i + 1 :].addr_(factor[i, i + 1 :], errors[i], alpha=-1)
        codes[:, start:end] = part_codes.T
        weight[:, end:].addmm_(errors.T, upper[start:end, end:], alpha=-1)
    return as_codes(codes[:, order.argsort()], grid, scheme)


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Return the upper Cholesky factor [K, K] of the damped inverse.

    It is the inverse of an upper triangle R with R R^T the damped Hessian, which is the Cholesky factor of the Hessian
    with its inputs in reverse, reversed again.
    """
    mean = hessian.diagonal().mean()
    share = damping
    while share <= _MOST_DAMPING:
        damped = hessian.flip(0, 1)
        damped.diagonal().add_(share * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper = _invert_triangle(lower.flip(0, 1))
            if upper.isfinite().all():
                return upper
        _log.warning("hessian_damped_more", damping=share, next=share * 10)
        share *= 10
    raise CalibrationUnfit(
        "the calibration data's second moments are not positive definite even when damped; give more, or more varied, "
        "calibration texts"
    )


def _invert_triangle(upper: Tensor) -> Tensor:
    """Return the inverse of an upper triangle [K, K], by halves: most of it is products of dense quarters."""
    size = len(upper)
    if size <= BLOCK:
        inverse: Tensor = torch.linalg.solve_triangular(upper, torch.eye(size, dtype=upper.dtype), upper=True)
        return inverse
    half, inverse = size // 2, torch.zeros_like(upper)
    inverse[:half, :half] = _invert_triangle(upper[:half, :half])
    inverse[half:, half:] = _invert_triangle(upper[half:, half:])
    inverse[:half, half:] = -inverse[:half, :half] @ upper[:half, half:] @ inverse[half:, half:]
    return inverse
