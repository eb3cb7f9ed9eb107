"""T tokens, K inputs, N outputs."""

import torch.nn.functional as F
from torch import Tensor


class ReferenceLinear:
    """A weight as the checkpoint has it."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Keep ``weight`` [N, K] and ``bias`` [N] as they are."""
        self._weight = weight
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """Return [T, N] from ``x`` [T, K]."""
        return F.linear(x, self._weight, self._bias)
