"""Compiled sampling: a pass or two over each row, and work on the few tokens that can be picked. R rows, V tokens."""

from collections.abc import Sequence
from itertools import starmap
from struct import Struct

import numpy as np
import numpy.typing as npt

from penstock.errors import KernelUnsupported
from penstock.kernels.native import NATIVE
from penstock.kernels.sampling.rows import DrawRow, TopTokens

_ROW = Struct("@dfqdd")
"""``Sampling`` of draw.h: a ``DrawRow`` as the compiler lays it out"""


def draw_tokens(logits: npt.NDArray[np.float32], rows: Sequence[DrawRow]) -> list[int]:
    """See ``reference.draw_tokens``; ``logits`` is dense."""
    assert NATIVE is not None
    num_rows, size = logits.shape
    address = _address(logits, len(rows))
    drawn: list[int] = NATIVE.draw_tokens(address, num_rows, size, packed_rows(rows))
    return drawn


def packed_rows(rows: Sequence[DrawRow]) -> bytes:
    """Return ``rows`` as compiled code takes them."""
    return b"".join(starmap(_ROW.pack, rows))


def top_tokens(logits: npt.NDArray[np.float32], count: int) -> TopTokens:
    """See ``reference.top_tokens``; ``logits`` is dense."""
    assert NATIVE is not None
    num_rows, size = logits.shape
    tokens, values = np.empty((num_rows, count), dtype=np.int32), np.empty((num_rows, count), dtype=np.float32)
    log_totals = np.empty(num_rows, dtype=np.float64)
    address = _address(logits, num_rows)
    NATIVE.top_tokens(address, num_rows, size, count, tokens.ctypes.data, values.ctypes.data, log_totals.ctypes.data)
    found = (tokens >= 0).sum(axis=1).tolist()
    return TopTokens(
        [row[:n] for row, n in zip(tokens.tolist(), found, strict=True)],
        [row[:n] for row, n in zip(values.tolist(), found, strict=True)],
        log_totals.tolist(),
    )


def _address(logits: npt.NDArray[np.float32], num_rows: int) -> int:
    if logits.dtype != np.float32 or not logits.flags.c_contiguous or len(logits) != num_rows:
        raise KernelUnsupported(
            f"native sampling takes dense float32 logits of {num_rows} rows, not {logits.dtype} of {list(logits.shape)}"
        )
    # A third of what `ctypes` takes to say it.
    address: int = logits.__array_interface__["data"][0]
    return address


def scratch_bytes(vocab_size: int, num_threads: int) -> int:
    """Return what drawing works in: each thread's candidates, and maxima and sums of blocks."""
    return 9 * vocab_size * num_threads
