"""T tokens, K inputs, N outputs, F feed-forward width."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.kernels.linear.quantization import InputCodes, Stacked, WeightCodes

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
"""Hendrycks and Gimpel, "Gaussian Error Linear Units" (2016), and three that come near it."""


class ReferenceLinear:
    """A weight as the checkpoint has it."""

    def __init__(
        self,
        weight: Tensor | Stacked | WeightCodes,
        bias: Tensor | None,
        *,
        exact: bool = True,
        activation: str | None = None,
    ) -> None:
        """Keep ``weight`` [N, K] and ``bias`` [N] as they are, which is exact whether asked for or not.

        ``activation`` is one of ``ACTIVATIONS``.
        """
        weight = weight.joined() if isinstance(weight, Stacked) else weight
        self.weight = weight if isinstance(weight, Tensor) else dequantize(weight)
        self._bias = bias
        self._activation = None if activation is None else ACTIVATIONS[activation]

    def __call__(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """Return [T, N] from ``x`` [T, K], plus ``added`` [T, N]."""
        out = F.linear(x, self.weight, self._bias)
        if self._activation is not None:
            out = self._activation(out)
        return out if added is None else out + added


class ReferenceGatedLinear:
    """Two projections of which one gates the other: Shazeer, "GLU Variants Improve Transformer" (2020)."""

    def __init__(
        self,
        gate: Tensor | WeightCodes,
        up: Tensor | WeightCodes,
        gate_bias: Tensor | None,
        up_bias: Tensor | None,
        *,
        activation: str = "silu",
    ) -> None:
        """Keep weights [F, K] and biases [F] as they are; ``activation`` is ``silu`` or ``gelu_tanh``."""
        self._activation = ACTIVATIONS[activation]
        self._gate = ReferenceLinear(gate, gate_bias)
        self._up = ReferenceLinear(up, up_bias)

    def __call__(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """Return activation(gate(x)) * up(x) [T, F] from ``x`` [T, K], plus ``added`` [T, F]."""
        out = self._activation(self._gate(x)) * self._up(x)
        return out if added is None else out + added


def dequantize(weight: WeightCodes) -> Tensor:
    """Return [N, K] float32: what codes stand for."""
    form, (_, num_inputs) = weight.form, weight.shape
    zeros = torch.full_like(weight.scales, 2 ** (form.bits - 1)) if weight.zeros is None else weight.zeros.float()
    scales, zeros = (x.repeat_interleave(form.group, 1)[:, :num_inputs] for x in (weight.scales, zeros))
    return (weight.codes.float() - zeros) * scales


def round_activations(x: Tensor, inputs: InputCodes | None = None) -> Tensor:
    """Return ``x`` [T, K] rounded as ``inputs`` say, or each token's values to a 127th of its greatest magnitude.

    In float64.
    """
    if inputs is not None:
        codes = (x / inputs.scale + inputs.zero).round().clamp(-128, 127)
        return (codes.double() - inputs.zero) * inputs.scale
    greatest, most = x.abs().amax(-1, keepdim=True).clamp(min=1e-30), torch.tensor(127.0)
    return (x * (most / greatest)).round().double() * (greatest / most).double()  # 127 / x would be 127 * (1 / x)
