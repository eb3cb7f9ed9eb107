"""T tokens, D head width, R rotated elements of it."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rope_angles(positions: Tensor, inverse: Tensor, head_dim: int, *, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return (cos, sin) as ``apply_rope`` takes them, each [T, 1, D] float32, times ``factor``.

    positions  [T] int64
    inverse    [R/2] or [T, R/2] float32, radians a position
    What of a head is not rotated gets an angle of zero, at the end of each of its halves.
    """
    angles = (positions.to(torch.float32).unsqueeze(1) * inverse).unsqueeze(1)
    cos, sin = angles.cos() * factor, angles.sin() * factor
    num_unrotated = head_dim // 2 - angles.shape[-1]
    if num_unrotated:
        cos, sin = F.pad(cos, (0, num_unrotated), value=1.0), F.pad(sin, (0, num_unrotated))
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
