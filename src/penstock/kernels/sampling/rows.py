"""What goes into sampling a batch and what comes out. R rows."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

DRAW_ROW = np.dtype(
    [
        # In [0, 1): where in its distribution the row is inverted.
        ("number", np.float64),
        # Positive, or 0 for the likeliest token.
        ("temperature", np.float32),
        # 0 for all.
        ("top_k", np.int64),
        ("top_p", np.float64),
        ("min_p", np.float64),
    ],
    align=True,
)
"""How a row becomes a token; ``Sampling`` of draw.h, byte by byte."""

DrawRows = npt.NDArray[np.void]
"""[R] of ``DRAW_ROW``"""


@dataclass(frozen=True, slots=True)
class TopTokens:
    """Each row's likeliest tokens."""

    tokens: list[list[int]]
    """Likeliest first; fewer than were asked for where the other logits are minus infinity"""
    logits: list[list[float]]
    log_totals: list[float]
    """Of each row, the logarithm of the sum of e^logit: subtracted from a logit it gives the log-probability"""
