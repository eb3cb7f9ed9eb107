"""AWQ: inputs with large activations get finer steps, and ranges are clipped where that errs less.

Lin et al., "AWQ: Activation-aware Weight Quantization" (2023). Scaling input k of a weight by s_k and what produces it
by 1 / s_k changes nothing but how the weight rounds. Both searches here minimize the error of the products themselves,
which the second moments of the inputs give without running the model: |(W - Q) X|^2 = tr((W - Q) H (W - Q)^T).
N outputs, K inputs, J inputs of a group, B groups.
"""

import torch
from torch import Tensor

from penstock.compress.methods.grid import Grid, decode, encode, fit_grid, group_size, grouped, round_to_grid
from penstock.quant import QuantizedWeight, Scheme, dequantize

_NUM_EXPONENTS = 20
_CLIPS = torch.linspace(1.1, 0.5, 25).tolist()


def product_error(delta: Tensor, hessian: Tensor) -> float:
    """Return |delta X|^2 for a change ``delta`` [N, K] of a weight, ``hessian`` [K, K] being X X^T."""
    return float((delta @ hessian).mul_(delta).sum())


def search_scales(
    weight: Tensor, hessian: Tensor, magnitudes: Tensor, scheme: Scheme, *, shared_by: int = 1, width: int | None = None
) -> Tensor:
    """Return the scales [K] by which to multiply the inputs of ``weight`` [N, K]: powers of ``magnitudes``.

    magnitudes    [K] mean absolute calibration inputs
    shared_by     runs of ``width`` inputs are repeated so often by what produces them, as grouped queries repeat
                  values; scales are the same in each repetition
    Ones where no exponent is better than none.
    """
    if shared_by > 1:
        assert width is not None
        runs = magnitudes.view(-1, shared_by, width)
        magnitudes = runs.mean(1, keepdim=True).expand_as(runs).flatten()
    best, least = torch.ones_like(magnitudes), torch.inf
    for step in range(_NUM_EXPONENTS):
        scales = magnitudes.clamp(min=1e-4) ** (step / _NUM_EXPONENTS)
        scales = scales / (scales.max() * scales.min()).sqrt()
        scaled = weight * scales
        rounded = dequantize(round_to_grid(scaled, fit_grid(scaled, scheme), scheme)) / scales
        error = product_error(rounded - weight, hessian)
        if error < least:
            best, least = scales, error
    return best


def awq(weight: Tensor, hessian: Tensor, scheme: Scheme) -> QuantizedWeight:
    """Return ``weight`` [N, K], scaled already, rounded to clipped ranges.

    Each group's range is the one whose own products err least; ``hessian`` [K, K] is that of the scaled inputs.
    """
    num_inputs = weight.shape[1]
    group = group_size(scheme, num_inputs)
    groups_NBJ = grouped(weight, scheme)
    moments_BJJ = _diagonal_blocks(hessian, group)
    full = fit_grid(weight, scheme)
    best_scales, best_zeros = full.scales.clone(), full.zeros.clone()
    least = torch.full_like(best_scales, torch.inf)
    for clip in _CLIPS:
        trial = fit_grid(weight * clip, scheme)
        scales, zeros = trial.scales.unsqueeze(-1), trial.zeros.unsqueeze(-1)
        delta_BNJ = decode(encode(groups_NBJ, scales, zeros, scheme), scales, zeros).sub_(groups_NBJ).transpose(0, 1)
        errors = torch.bmm(delta_BNJ, moments_BJJ).mul_(delta_BNJ).sum(-1).T
        better = errors < least
        least = torch.where(better, errors, least)
        best_scales = torch.where(better, trial.scales, best_scales)
        best_zeros = torch.where(better, trial.zeros, best_zeros)
    return round_to_grid(weight, Grid(best_scales, best_zeros), scheme)


def _diagonal_blocks(hessian: Tensor, group: int) -> Tensor:
    """Return [B, J, J]: the second moments of each group's inputs among themselves."""
    num_inputs = len(hessian)
    num_groups = -(-num_inputs // group)
    blocks = hessian.new_zeros(num_groups, group, group)
    for b in range(num_groups):
        own = hessian[b * group : (b + 1) * group, b * group : (b + 1) * group]
        blocks[b, : len(own), : len(own)] = own
    return blocks
