"""Locally typical sampling (Meister et al., "Locally Typical Sampling", TACL 2023)."""

import torch
from torch import Tensor


def atypical(scaled: Tensor, typical_p: Tensor) -> Tensor:
    """Return [R, V] bool: the tokens that are not typical.

    A token is the more typical the nearer its surprise, the negative logarithm of its probability, is to the
    distribution's entropy. Kept are the most typical ones, the fewest whose probability reaches ``typical_p``.

    scaled     [R, V] float32 logits, divided by temperature; -inf where a token is ruled out
    typical_p  [R, 1] float32 in (0, 1]
    """
    log_probabilities = torch.log_softmax(scaled, dim=-1)
    probabilities = log_probabilities.exp()
    # Zero times infinity: a token that cannot come adds nothing to the entropy.
    entropy = -(probabilities * log_probabilities).nan_to_num(nan=0.0).sum(-1, keepdim=True)
    _, order = (log_probabilities + entropy).abs().sort(dim=-1, stable=True)
    ordered = probabilities.gather(1, order)
    keep = (ordered.cumsum(-1) - ordered) < typical_p
    keep[:, 0] = True
    return torch.ones_like(keep).scatter_(1, order, ~keep)
