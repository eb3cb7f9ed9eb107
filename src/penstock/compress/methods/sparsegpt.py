"""SparseGPT: one input's weights after another become zero, and the later inputs' make up for the error.

Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot" (2023), arXiv
2301.00774. A weight w of input k costs w^2 / U_kk^2, U being the upper Cholesky factor of the inverse Hessian: the
error that remains once all later inputs have been adapted. Zeros are chosen when their turn comes, after what was made
up for: in a block of inputs over all outputs, or in each run of an N:M pattern. N outputs, K inputs.
"""

import torch
from torch import Tensor

from penstock.compress.methods.gptq import BLOCK, inverse_factor
from penstock.compress.methods.sparsity import Sparsity, least


def sparsegpt(weight: Tensor, hessian: Tensor, sparsity: Sparsity, *, damping: float = 0.01) -> Tensor:
    """Return ``weight`` [N, K] with zeros, its products with calibration inputs being as they were, nearly.

    hessian    [K, K] float32, sum or mean of x x^T over calibration tokens
    damping    share of the mean diagonal added to the diagonal; ten times more as long as that is not positive definite
    Raises ``CalibrationUnfit`` if no damping helps.
    """
    weight = weight.clone()
    num_inputs = weight.shape[1]
    never_used = hessian.diagonal() == 0
    upper = inverse_factor(hessian, damping)
    run = sparsity.run
    # A run lies in one block.
    block = BLOCK if run is None else max(BLOCK // run, 1) * run
    for start in range(0, num_inputs, block):
        end = min(start + block, num_inputs)
        part, factor = weight[:, start:end], upper[start:end, start:end]
        # What no calibration token ever used costs nothing, whatever damping makes of it.
        divisors = factor.diagonal().square().masked_fill(never_used[start:end], torch.inf)
        errors = torch.empty_like(part)
        zero = torch.empty_like(part, dtype=torch.bool)
        if run is None:
            zero = least((part.square() / divisors).view(1, -1), sparsity).view_as(part)
        for i in range(end - start):
            if run is not None and i % run == 0:
                zero[:, i : i + run] = least(part[:, i : i + run].square() / divisors[i : i + run], sparsity)
            errors[:, i] = part[:, i].where(zero[:, i], 0) / factor[i, i]
            part[:, i + 1 :].addr_(errors[:, i], factor[i, i + 1 :], alpha=-1)
        part.masked_fill_(zero, 0)
        weight[:, end:].addmm_(errors, upper[start:end, end:], alpha=-1)
    return weight
