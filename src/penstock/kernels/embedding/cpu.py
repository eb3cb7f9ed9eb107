"""T tokens, E width, V vocabulary."""

import torch
from torch import Tensor

from penstock.errors import KernelUnsupported
from penstock.kernels.linear.cpu import FLOAT_KINDS
from penstock.kernels.native import NATIVE, checked
from penstock.kernels.native.replay import empty


def embed(token_ids: Tensor, table: Tensor, *, scale: float = 1.0) -> Tensor:
    """See ``reference.py``; the result is float32. ``PackedLinear.embed`` reads the same rows from a packed table."""
    assert NATIVE is not None
    (num_tokens,), (vocab_size, width) = token_ids.shape, table.shape
    if table.dtype not in FLOAT_KINDS:
        raise KernelUnsupported(f"no native embedding in a table of {table.dtype}")
    out = empty(num_tokens, width)
    NATIVE.embed(
        checked(token_ids, torch.int64, num_tokens),
        num_tokens,
        FLOAT_KINDS[table.dtype],
        checked(table, table.dtype, vocab_size, width),
        vocab_size,
        width,
        scale,
        out.data_ptr(),
    )
    return out
