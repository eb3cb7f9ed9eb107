"""What values a unit reads, as a histogram, and the codes of 8 bits that suit them. T tokens, K inputs, B bins."""

import math
from typing import Literal

import torch
from torch import Tensor

from penstock.compress.methods.grid import fit_grid
from penstock.errors import CalibrationUnfit
from penstock.kernels import InputCodes
from penstock.quant import Scheme

Observer = Literal["min-max", "percentile", "mse"]
"""Which values the codes cover: all; a share of them; as many as leave the least squared error"""

_NUM_BINS = 1 << 16
_ROWS = 256


class ValueRange:
    """A histogram whose bins double in width when a value lies beyond them: its memory and its error stay bounded."""

    def __init__(self) -> None:
        self.least = self.greatest = 0.0
        """Zero included: codes have to hold it"""
        self._bound = 0.0
        """Bins reach from minus to plus this, a power of two"""
        self._counts = torch.zeros(_NUM_BINS, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Count values ``x`` [T, K]. Raises ``CalibrationUnfit`` if one is not a number."""
        low, high = (value.item() for value in x.aminmax())
        reach = max(-low, high)
        if not math.isfinite(reach):
            raise CalibrationUnfit("the model computes infinite values on the calibration texts; give other ones")
        self.least, self.greatest = min(self.least, low), max(self.greatest, high)
        if self._bound == 0.0 and reach > 0.0:
            self._bound = 2.0 ** math.ceil(math.log2(reach))
        while reach > self._bound:
            self._widen()
        # A bin of one call counts in float32, which ends at 2 ** 24.
        for part in torch.split(x.float(), _ROWS) if self._bound else ():
            self._counts += torch.histc(part, _NUM_BINS, -self._bound, self._bound)

    def _widen(self) -> None:
        quarter = _NUM_BINS // 4
        pairs = self._counts.view(-1, 2).sum(1)
        self._counts.zero_()[quarter:-quarter] = pairs
        self._bound *= 2

    def codes(self, observer: Observer, *, symmetric: bool, percentile: float) -> InputCodes:
        """Return what to round such values to; with ``percentile``, that share of them, in percent, is in range."""
        scheme = Scheme(bits=8, symmetric=symmetric)
        centres = ((torch.arange(_NUM_BINS, dtype=torch.float64) + 0.5) / (_NUM_BINS / 2) - 1) * self._bound
        centres = centres.clamp(self.least, self.greatest)
        if observer == "mse":
            grid = fit_grid(centres.float().unsqueeze(0), scheme, self._counts.float(), search=True)
        else:
            ends = [self.least, self.greatest]
            if observer == "percentile":
                ends = self._percentile(centres, percentile / 100, symmetric=symmetric)
            grid = fit_grid(torch.tensor([ends]), scheme)
        return InputCodes(grid.scales.item(), int(grid.zeros.item()) - scheme.middle)

    def _percentile(self, centres: Tensor, share: float, *, symmetric: bool) -> list[float]:
        """Return the least and the greatest of the values that stay; what goes does so from both ends alike."""
        if symmetric:
            magnitudes, order = centres.abs().sort()
            below = self._counts[order].cumsum(0)
            reach = magnitudes[int((below < share * below[-1]).sum())].item()
            return [-reach, reach]
        below, rest = self._counts.cumsum(0), (1 - share) / 2
        first, last = (int((below < part * below[-1]).sum()) for part in (rest, 1 - rest))
        return [centres[first].item(), centres[last].item()]
