"""T tokens, E width."""

import torch
from torch import Tensor


def add(x: Tensor, y: Tensor, *, scale: float = 1.0) -> Tensor:
    """Return ``x`` + ``scale`` * ``y``, all [T, E]; may overwrite ``x``."""
    return torch.add(x, y, alpha=scale)
