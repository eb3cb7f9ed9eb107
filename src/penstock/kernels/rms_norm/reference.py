"""T tokens, E width."""

from functools import lru_cache

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """Scale each row of ``x`` [..., E] to a root mean square of one, then by ``weight`` [E]; into ``out`` if given.

    Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019). The statistics are taken in float32.
    """
    wide = x.float()
    # Rows are short, so the number of ops counts: length, its square over E plus eps, root, two products.
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = torch.addcmul(_constant(eps), length, length, value=1 / x.shape[-1]).rsqrt_()
    normed = (wide * scale).to(x.dtype).mul_(weight)
    return normed if out is None else out.copy_(normed)


@lru_cache(maxsize=16)
def _constant(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)
