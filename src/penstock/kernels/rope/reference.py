"""T tokens, H heads, D head width."""

from torch import Tensor


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + D/2) of every head of ``x`` [T, H, D] by its token's angles.

    cos  [T, 1, D] float32, each angle's cosine at i and at i + D/2
    sin  [T, 1, D] float32, its sine negated at i and as it is at i + D/2
    Both are scaled already where the scaling asks for it.
    Su et al., "RoFormer" (2021), in the half-split arrangement of GPT-NeoX. Returns x's dtype.
    """
    partner = x.roll(x.shape[-1] // 2, -1)
    return (x * cos).addcmul_(partner, sin).to(x.dtype)
