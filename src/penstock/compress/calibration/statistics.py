"""What is kept of the inputs that a unit reads. T tokens, K inputs."""

import torch
from torch import Tensor

_PANEL = 512
"""Inputs whose second moments with all later ones are one product"""


class InputStatistics:
    """Moments and ranges of one unit's inputs, summed over calibration tokens."""

    def __init__(self, num_inputs: int) -> None:
        self.num_tokens = 0
        self.greatest = torch.zeros(num_inputs)
        """[K] of each input's magnitude"""
        self._magnitudes = torch.zeros(num_inputs)
        self._moments = torch.zeros(num_inputs, num_inputs)

    def add(self, x: Tensor) -> None:
        """Count inputs ``x`` [T, K]."""
        x = x.float()
        self.num_tokens += len(x)
        magnitudes = x.abs()
        if len(x):
            torch.maximum(self.greatest, magnitudes.amax(0), out=self.greatest)
        self._magnitudes += magnitudes.sum(0)
        # The upper triangle alone, in panels: the lower one is the same.
        for start in range(0, x.shape[1], _PANEL):
            end = start + _PANEL
            self._moments[start:end, start:].addmm_(x[:, start:end].T, x[:, start:])

    @property
    def magnitudes(self) -> Tensor:
        """[K] float32: mean magnitude of each input."""
        return self._magnitudes / max(self.num_tokens, 1)

    @property
    def hessian(self) -> Tensor:
        """[K, K] float32: mean of x x^T, half the second derivative of a product's squared error."""
        upper = self._moments.triu()
        upper += upper.triu(1).T
        return upper.div_(max(self.num_tokens, 1))
