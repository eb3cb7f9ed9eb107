"""T tokens, H heads, D head width."""

import torch
from torch import Tensor


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + D/2) of every head of ``x`` [T, H, D] by its token's angles.

    cos, sin  [T, 1, D/2] float32, already scaled where the scaling asks for it
    Su et al., "RoFormer" (2021), in the half-split arrangement of GPT-NeoX. Returns x's dtype.
    """
    low, high = x.float().chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)
