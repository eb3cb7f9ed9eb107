"""What goes into sampling a batch and what comes out. R rows."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class DrawRows:
    """How each row becomes a token."""

    numbers: npt.NDArray[np.float64]
    """[R], in [0, 1): where in its distribution a row is inverted"""
    temperatures: npt.NDArray[np.float32]
    """[R], positive, or 0 for the likeliest token"""
    top_k: npt.NDArray[np.int64]
    """[R], 0 for all"""
    top_p: npt.NDArray[np.float64]
    """[R]"""
    min_p: npt.NDArray[np.float64]
    """[R]"""

    def part(self, rows: slice) -> "DrawRows":
        """Return some of the rows."""
        return DrawRows(
            self.numbers[rows], self.temperatures[rows], self.top_k[rows], self.top_p[rows], self.min_p[rows]
        )


@dataclass(frozen=True, slots=True)
class TopTokens:
    """Each row's likeliest tokens."""

    tokens: list[list[int]]
    """Likeliest first; fewer than were asked for where the other logits are minus infinity"""
    logits: list[list[float]]
    log_totals: list[float]
    """Of each row, the logarithm of the sum of e^logit: subtracted from a logit it gives the log-probability"""
