"""T tokens, K inputs, N outputs, F feed-forward width."""

import torch.nn.functional as F
from torch import Tensor


class ReferenceLinear:
    """A weight as the checkpoint has it."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Keep ``weight`` [N, K] and ``bias`` [N] as they are."""
        self._weight = weight
        self._bias = bias

    def __call__(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """Return [T, N] from ``x`` [T, K], plus ``added`` [T, N]."""
        out = F.linear(x, self._weight, self._bias)
        return out if added is None else out + added


class ReferenceGatedLinear:
    """Two projections of which one gates the other: Shazeer, "GLU Variants Improve Transformer" (2020), SwiGLU."""

    def __init__(self, gate: Tensor, up: Tensor, gate_bias: Tensor | None, up_bias: Tensor | None) -> None:
        """Keep weights [F, K] and biases [F] as they are."""
        self._gate = ReferenceLinear(gate, gate_bias)
        self._up = ReferenceLinear(up, up_bias)

    def __call__(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """Return silu(gate(x)) * up(x) [T, F] from ``x`` [T, K], plus ``added`` [T, F]."""
        out = F.silu(self._gate(x)) * self._up(x)
        return out if added is None else out + added
