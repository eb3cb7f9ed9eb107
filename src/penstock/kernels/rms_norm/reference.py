"""T tokens, E width."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale each row of ``x`` [..., E] to a root mean square of one, then by ``weight`` [E].

    Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019). The statistics are taken in float32.
    """
    wide = x.float()
    # The length of a row is one pass in one op; squares and their mean would be three.
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = (length.square_() / x.shape[-1]).add_(eps).rsqrt_()
    out: Tensor = (wide * scale).to(x.dtype) * weight
    return out
