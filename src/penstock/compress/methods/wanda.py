"""Wanda: weights whose products with what they usually read are small become zero; the others stay as they are.

Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (2023), arXiv 2306.11695. A weight's
score is its magnitude times its input's norm over calibration tokens, compared within an output. N outputs, K inputs.
"""

from torch import Tensor

from penstock.compress.methods.sparsity import Sparsity, least


def wanda(weight: Tensor, hessian: Tensor, sparsity: Sparsity) -> Tensor:
    """Return ``weight`` [N, K] with zeros; ``hessian`` [K, K] is the sum or mean of x x^T over calibration tokens."""
    return weight.masked_fill(least(weight.abs() * hessian.diagonal().sqrt(), sparsity), 0)
