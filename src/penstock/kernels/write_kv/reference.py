"""T tokens, G KV heads, D head width, N blocks of P tokens."""

from torch import Tensor

from penstock.kernels.layout import KVBlocks


def write_kv(kv: KVBlocks, slots: Tensor, k: Tensor, v: Tensor) -> None:
    """Store ``k`` and ``v`` [T, G, D] at ``slots`` [T] int64 (block * P + offset) of the cache."""
    kv.k.flatten(0, 1).index_copy_(0, slots, k)
    kv.v.flatten(0, 1).index_copy_(0, slots, v)
