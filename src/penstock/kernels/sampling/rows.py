"""What goes into sampling a batch and what comes out. R rows."""

from dataclasses import dataclass
from typing import NamedTuple


class DrawRow(NamedTuple):
    """How a row becomes a token."""

    number: float
    """In [0, 1): where in its distribution the row is inverted"""
    temperature: float
    """Positive, or 0 for the likeliest token"""
    top_k: int
    """0 for all"""
    top_p: float
    min_p: float


@dataclass(frozen=True, slots=True)
class TopTokens:
    """Each row's likeliest tokens."""

    tokens: list[list[int]]
    """Likeliest first; fewer than were asked for where the other logits are minus infinity"""
    logits: list[list[float]]
    log_totals: list[float]
    """Of each row, the logarithm of the sum of e^logit: subtracted from a logit it gives the log-probability"""
