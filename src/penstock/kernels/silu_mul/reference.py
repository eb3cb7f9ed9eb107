"""T tokens, F width."""

import torch.nn.functional as F
from torch import Tensor


def silu_mul(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up [T, F] from the two side by side [T, 2F] (Shazeer, "GLU Variants", 2020)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
