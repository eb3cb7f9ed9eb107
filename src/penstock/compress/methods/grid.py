"""The integers that a weight may become: scales and zeros of groups of inputs, and rounding to them.

N outputs, K inputs, J inputs of a group, B = ceil(K / J) groups. A code c stands for scale * (c - zero).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.quant import QuantizedWeight, Scheme

MIN_SCALE = 2.0**-17
"""Scales are bfloat16 numbers from here on, which float16 holds exactly too: one code form fits every layout."""

_SHRINKS = torch.linspace(1.1, 0.4, 36).tolist()
"""Tried as multiples of the scale that covers a group. Above one, because a symmetric grid's last code on the positive
side is half a step short of the greatest value."""


_WEIGHTS = 1 << 19
"""Weights searched at a time: few enough for a cache near the core to hold them through all trials, and enough for
each thread to have more to do than to wait for the others"""


@dataclass(frozen=True, slots=True)
class Grid:
    """Scales and zeros [N, B] float32, zeros being whole numbers."""

    scales: Tensor
    zeros: Tensor

    def per_input(self, group: int, num_inputs: int) -> "Grid":
        """Return the same [N, K], for each weight its own."""
        return Grid(*(x.repeat_interleave(group, 1)[:, :num_inputs] for x in (self.scales, self.zeros)))


def group_size(scheme: Scheme, num_inputs: int) -> int:
    """Return J for a weight with so many inputs."""
    return min(scheme.group or num_inputs, num_inputs)


def last_code(scheme: Scheme) -> int:
    """Return the greatest code."""
    return (1 << scheme.bits) - 1


def fit_grid(weight: Tensor, scheme: Scheme, importance: Tensor | None = None, *, search: bool = False) -> Grid:
    """Return the grid that covers each group of ``weight`` [N, K].

    With ``search``, the one among narrower ones with the least squared error, in which input k counts
    ``importance`` [K] times.
    """
    low, high = _ranges(weight, scheme)
    grid = _cover(low, high, scheme)
    if not search:
        return grid
    rows = max(1, _WEIGHTS // weight.shape[1])
    if len(weight) > rows:
        starts = range(0, len(weight), rows)
        parts = [fit_grid(weight[start : start + rows], scheme, importance, search=True) for start in starts]
        return Grid(torch.cat([part.scales for part in parts]), torch.cat([part.zeros for part in parts]))
    groups_NBJ = grouped(weight, scheme)
    weights_BJ = torch.ones(1) if importance is None else grouped(importance.unsqueeze(0), scheme)[0]
    least = torch.full_like(grid.scales, torch.inf)
    best_scales, best_zeros = grid.scales.clone(), grid.zeros.clone()
    for shrink in _SHRINKS:
        trial = _cover(low * shrink, high * shrink, scheme)
        scales, zeros = trial.scales.unsqueeze(-1), trial.zeros.unsqueeze(-1)
        error = decode(encode(groups_NBJ, scales, zeros, scheme), scales, zeros).sub_(groups_NBJ).square_()
        loss = error.mul_(weights_BJ).sum(-1)
        better = loss < least
        least = torch.where(better, loss, least)
        best_scales = torch.where(better, trial.scales, best_scales)
        best_zeros = torch.where(better, trial.zeros, best_zeros)
    return Grid(best_scales, best_zeros)


def encode(values: Tensor, scales: Tensor, zeros: Tensor, scheme: Scheme) -> Tensor:
    """Return the nearest codes, as floats; scales and zeros broadcast."""
    return (values / scales).add_(zeros).round_().clamp_(0, last_code(scheme))


def decode(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Return what ``codes`` stand for."""
    return (codes - zeros) * scales


def round_to_grid(weight: Tensor, grid: Grid, scheme: Scheme) -> QuantizedWeight:
    """Return each weight [N, K] as the nearest code."""
    num_inputs = weight.shape[1]
    wide = grid.per_input(group_size(scheme, num_inputs), num_inputs)
    return as_codes(encode(weight, wide.scales, wide.zeros, scheme), grid, scheme)


def as_codes(codes: Tensor, grid: Grid, scheme: Scheme) -> QuantizedWeight:
    """Return ``codes`` [N, K] of any dtype in the form that is stored and run."""
    zeros = None if scheme.symmetric else grid.zeros.to(torch.uint8)
    return QuantizedWeight(
        scheme=scheme, codes=codes.to(torch.uint8), scales=grid.scales.bfloat16().contiguous(), zeros=zeros
    )


def grouped(weight: Tensor, scheme: Scheme) -> Tensor:
    """Return ``weight`` [N, K] as [N, B, J], zeros behind the last input: they are on every grid and cost nothing."""
    group = group_size(scheme, weight.shape[1])
    return F.pad(weight, (0, -weight.shape[1] % group)).view(len(weight), -1, group)


def _ranges(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Return the least and greatest value [N, B] of each group, zero included."""
    groups_NBJ = grouped(weight, scheme)
    low, high = groups_NBJ.amin(-1).clamp(max=0), groups_NBJ.amax(-1).clamp(min=0)
    if scheme.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    return low, high


def _cover(low: Tensor, high: Tensor, scheme: Scheme) -> Grid:
    scales = ((high - low) / last_code(scheme)).bfloat16().float().clamp(min=MIN_SCALE)
    if scheme.symmetric:
        return Grid(scales, torch.full_like(scales, scheme.middle))
    return Grid(scales, (-low / scales).round_().clamp_(0, last_code(scheme)))
