"""T tokens, E width."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale each row of ``x`` [..., E] to a root mean square of one, then by ``weight`` [E].

    Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019). The statistics are taken in float32.
    """
    if x.dtype is torch.float32:
        return F.rms_norm(x, weight.shape, weight, eps)
    return weight * F.rms_norm(x.float(), weight.shape, None, eps).to(x.dtype)
