"""A layer's cache as compiled code takes it."""

from penstock.errors import KernelUnsupported
from penstock.kernels.dtypes import dtype_name
from penstock.kernels.layout import KVBlocks
from penstock.kernels.native import checked

_KINDS = {"float32": 0, "bfloat16": 1, "int8": 2}
"""``Cache`` of ``kernels.h``"""


def cache_addresses(kv: KVBlocks, num_kv_heads: int, head_dim: int, block_size: int) -> tuple[int, int, int, int, int]:
    """Return a cache's kind and the addresses of keys, values and their scales, 0 where there are none.

    G KV heads, D head width, N blocks, P tokens per block: see ``kernels.h``. Raises ``KernelUnsupported`` for a cache
    of another dtype or shape.
    """
    N, G, D, P = kv.k.shape[0], num_kv_heads, head_dim, block_size
    dtype = dtype_name(kv.k.dtype)
    kind = _KINDS.get(dtype)
    if kind is None or (dtype == "int8") != (kv.k_scales is not None and kv.v_scales is not None):
        raise KernelUnsupported(
            f"native kernels take a cache of float32, bfloat16 or int8 with scales, not of {dtype} "
            f"{'without' if kv.k_scales is None else 'with'} scales"
        )
    return (
        kind,
        checked(kv.k, dtype, N, G, D, P),
        checked(kv.v, dtype, N, G, P, D),
        0 if kv.k_scales is None else checked(kv.k_scales, "float32", N, G, P),
        0 if kv.v_scales is None else checked(kv.v_scales, "float32", N, G, P),
    )
