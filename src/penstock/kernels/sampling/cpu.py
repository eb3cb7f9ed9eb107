"""Compiled sampling: a pass or two over each row, and work on the few tokens that can be picked. R rows, V tokens."""

from collections.abc import Sequence
from itertools import starmap
from struct import Struct

import numpy as np
import torch
from torch import Tensor

from penstock.kernels.native import NATIVE, checked
from penstock.kernels.sampling.rows import DrawRow, TopTokens

_ROW = Struct("@dfqdd")
"""``Sampling`` of draw.h: a ``DrawRow`` as the compiler lays it out"""


def draw_tokens(logits: Tensor, rows: Sequence[DrawRow]) -> list[int]:
    """See ``reference.draw_tokens``; ``logits`` is dense."""
    assert NATIVE is not None
    num_rows, size = logits.shape
    address = checked(logits, torch.float32, len(rows), size)
    drawn: list[int] = NATIVE.draw_tokens(address, num_rows, size, b"".join(starmap(_ROW.pack, rows)))
    return drawn


def top_tokens(logits: Tensor, count: int) -> TopTokens:
    """See ``reference.top_tokens``; ``logits`` is dense."""
    assert NATIVE is not None
    num_rows, size = logits.shape
    tokens, values = np.empty((num_rows, count), dtype=np.int32), np.empty((num_rows, count), dtype=np.float32)
    log_totals = np.empty(num_rows, dtype=np.float64)
    address = checked(logits, torch.float32, num_rows, size)
    NATIVE.top_tokens(address, num_rows, size, count, tokens.ctypes.data, values.ctypes.data, log_totals.ctypes.data)
    found = (tokens >= 0).sum(axis=1).tolist()
    return TopTokens(
        [row[:n] for row, n in zip(tokens.tolist(), found, strict=True)],
        [row[:n] for row, n in zip(values.tolist(), found, strict=True)],
        log_totals.tolist(),
    )


def scratch_bytes(vocab_size: int, num_threads: int) -> int:
    """Return what drawing works in: each thread's candidates, and maxima and sums of blocks."""
    return 9 * vocab_size * num_threads
