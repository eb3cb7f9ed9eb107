"""T tokens, E width, V vocabulary."""

from penstock.errors import KernelUnsupported
from penstock.kernels.dtypes import dtype_name
from penstock.kernels.linear.ahead import FLOAT_KINDS
from penstock.kernels.native import NATIVE, checked
from penstock.kernels.native.replay import empty
from penstock.kernels.tensor import Tensor


def embed(token_ids: Tensor, table: Tensor, *, scale: float = 1.0) -> Tensor:
    """See ``reference.py``; the result is float32. ``PackedLinear.embed`` reads the same rows from a packed table."""
    assert NATIVE is not None
    (num_tokens,), (vocab_size, width) = token_ids.shape, table.shape
    dtype = dtype_name(table.dtype)
    if dtype not in FLOAT_KINDS:
        raise KernelUnsupported(f"no native embedding in a table of {dtype}")
    out = empty(num_tokens, width)
    NATIVE.embed(
        checked(token_ids, "int64", num_tokens),
        num_tokens,
        FLOAT_KINDS[dtype],
        checked(table, dtype, vocab_size, width),
        vocab_size,
        width,
        scale,
        out.data_ptr(),
    )
    return out
