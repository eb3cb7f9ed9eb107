"""T tokens, K inputs, N outputs; weights in oneDNN's blocked layout."""

import torch
from torch import Tensor

_LEAST_ELEMENTS = 2**18
"""Below this a call's fixed cost outweighs what packing saves."""
_TYPICAL_TOKENS = 64
"""What oneDNN picks a layout for; it computes with any number."""


def is_worth_packing(weight: Tensor) -> bool:
    """Whether ``PackedLinear`` takes ``weight`` and beats a plain product with it."""
    return weight.dtype is torch.float32 and weight.numel() >= _LEAST_ELEMENTS and _has_onednn()


def _has_onednn() -> bool:
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available


class PackedLinear:
    """A weight laid out once for the vector unit, which a plain product does at every call."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Pack a copy of ``weight`` [N, K]; keep ``bias`` [N] as it is."""
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _TYPICAL_TOKENS)
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """Return [T, N] from ``x`` [T, K]."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return out
