"""Low rank: a matrix as the product of two that are narrow, near it where calibration inputs are large.

Wang et al., "SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression" (2024).
Inputs are whitened by their second moments H = S S^T: what is cut from the singular values of W S is then just what
the products lose, |(W - B A) X|, and no other product of that rank loses less (Eckart and Young, 1936). The root S
comes from H's eigenvectors, which no missing direction makes fail. N outputs, K inputs, r rank.
"""

import torch
from torch import Tensor


def low_rank(weight: Tensor, hessian: Tensor, rank: int, *, damping: float = 0.01) -> tuple[Tensor, Tensor]:
    """Return A [r, K] and B [N, r] whose product B A stands in for ``weight`` [N, K].

    hessian    [K, K] float32, mean of x x^T over calibration tokens
    damping    share of the mean diagonal that each direction has at least, those that no token took included
    """
    values, vectors = torch.linalg.eigh(hessian)
    least = damping * hessian.diagonal().mean()
    roots = values.clamp(min=float(least.clamp(min=1e-30))).sqrt()
    left, singular, right = torch.linalg.svd((weight @ vectors) * roots, full_matrices=False)
    # Both get a half of each singular value, so that neither is beyond the range of 16 bits.
    halves = singular[:rank].sqrt()
    first = (halves.unsqueeze(1) * right[:rank] / roots) @ vectors.T
    return first.contiguous(), (left[:, :rank] * halves).contiguous()
