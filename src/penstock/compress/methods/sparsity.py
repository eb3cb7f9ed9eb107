"""Which weights become zero: shares of a matrix, and N:M patterns. N outputs, K inputs."""

import re
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sparsity:
    """How many weights become zero, and among which they are chosen."""

    share: float
    """Of all weights, above 0 and below 1"""
    run: int | None = None
    """The share holds in each run of so many inputs, of which there is a whole number; None: it holds on the whole"""

    @classmethod
    def read_pattern(cls, pattern: str) -> "Sparsity | None":
        """Return what ``pattern`` says: of ``2:4``, 2 of every 4 inputs stay. None if it is no pattern."""
        found = re.fullmatch(r"(\d{1,3}):(\d{1,3})", pattern)
        if found is None or not 0 < (stay := int(found[1])) < (run := int(found[2])):
            return None
        return cls(1 - stay / run, run)


def magnitude(weight: Tensor, sparsity: Sparsity) -> Tensor:
    """Return ``weight`` [N, K] without its smallest values, chosen over the whole matrix or in each run."""
    scores = weight.abs()
    among = scores.view(1, -1) if sparsity.run is None else scores
    return weight.masked_fill(least(among, sparsity).view_as(weight), 0)


def least(scores: Tensor, sparsity: Sparsity) -> Tensor:
    """Return where the least of each row of ``scores`` [N, K], or of each run in it, are; exactly as many as asked."""
    rows = scores if sparsity.run is None else scores.reshape(-1, sparsity.run)
    chosen = rows.topk(round(sparsity.share * rows.shape[1]), largest=False).indices
    return torch.zeros_like(rows, dtype=torch.bool).scatter_(1, chosen, True).view_as(scores)
