"""GPTQ: rounding one input after another, the others making up for the error.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2022). Inputs go
from the one that matters most to the least ("act-order"), each keeping the group it has in the stored weight, whose
grid is fitted beforehand ("static groups"): the order then costs nothing at run time. N outputs, K inputs.
"""

import structlog
import torch
from torch import Tensor

from penstock.compress.methods.grid import as_codes, decode, encode, fit_grid, group_size
from penstock.errors import CalibrationUnfit
from penstock.quant import QuantizedWeight, Scheme

_log = structlog.get_logger(__name__)

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
        part, factor = weight[:, start:end], upper[start:end, start:end]
        errors = torch.empty_like(part)
        for i in range(end - start):
            column, scale, zero = part[:, i], scales[:, start + i], zeros[:, start + i]
            codes[:, start + i] = encode(column, scale, zero, scheme)
            errors[:, i] = (column - decode(codes[:, start + i], scale, zero)) / factor[i, i]
            part[:, i + 1 :].addr_(errors[:, i], factor[i, i + 1 :], alpha=-1)
        weight[:, end:].addmm_(errors, upper[start:end, end:], alpha=-1)
    return as_codes(codes[:, order.argsort()], grid, scheme)


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Return the upper Cholesky factor [K, K] of the damped inverse."""
    mean = hessian.diagonal().mean()
    share = damping
    while share <= _MOST_DAMPING:
        damped = hessian.clone()
        damped.diagonal().add_(share * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            upper: Tensor = factor
            if not failed and upper.isfinite().all():
                return upper
        _log.warning("hessian_damped_more", damping=share, next=share * 10)
        share *= 10
    raise CalibrationUnfit(
        "the calibration data's second moments are not positive definite even when damped; give more, or more varied, "
        "calibration texts"
    )
