"""Rounding to nearest: what every other method is measured against."""

from torch import Tensor

from penstock.compress.methods.grid import fit_grid, round_to_grid
from penstock.quant import QuantizedWeight, Scheme


def rtn(weight: Tensor, scheme: Scheme) -> QuantizedWeight:
    """Return ``weight`` [N, K] with each value rounded to the grid that covers its group."""
    return round_to_grid(weight, fit_grid(weight, scheme), scheme)
