"""T tokens, D head width, R rotated elements of it."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rope_angles(
    positions: Tensor, inverse: Tensor, head_dim: int, *, factor: float = 1.0, axes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return (cos, sin) as ``apply_rope`` takes them, each [T, 1, D] float32, times ``factor``.

    positions  [T] int64, or [A, T] on several axes
    inverse    [R/2] or [T, R/2] float32, radians a position
    axes       [R/2] int64, whose positions turn each pair; only where there are several axes
    What of a head is not rotated gets an angle of zero, at the end of each of its halves.
    """
    turns = positions.unsqueeze(1) if axes is None else positions[axes].T
    angles = (turns.to(torch.float32) * inverse).unsqueeze(1)
    cos, sin = angles.cos() * factor, angles.sin() * factor
    num_unrotated = head_dim // 2 - angles.shape[-1]
    if num_unrotated:
        cos, sin = F.pad(cos, (0, num_unrotated), value=1.0), F.pad(sin, (0, num_unrotated))
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
