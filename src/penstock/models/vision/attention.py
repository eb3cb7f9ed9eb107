"""Attention within sequences of any lengths that lie one after another, each row seeing all of its own.

Done by the decoder's kernels, with every sequence in blocks of keys and values that no other has: nothing is padded,
and what a row gets does not depend on other sequences. N rows, E width, H heads, D head width.
"""

import numpy as np
import torch
from torch import Tensor

from penstock.kernels import BatchLayout, KVBlocks, Ops

_BLOCK = 16
"""Rows in a block"""


class PackedAttention:
    """Attention of one pass, for all layers whose sequences are these."""

    def __init__(
        self, ops: Ops, lengths: list[int], num_heads: int, head_dim: int, angles: tuple[Tensor, Tensor], kv: KVBlocks
    ) -> None:
        """Plan it for sequences of ``lengths`` in rotary ``angles`` (cosines, sines), on a ``keys_and_values``."""
        tables, first = [], 0
        for length in lengths:
            end = first + -(-length // _BLOCK)
            tables.append(range(first, end))
            first = end
        visible = np.repeat(np.array(lengths, dtype=np.int32), lengths)
        self._ops, self._num_heads, self._angles, self._kv = ops, num_heads, angles, kv
        self._scale = head_dim**-0.5
        self._layout = BatchLayout.pack(lengths, lengths, tables, _BLOCK, visible=visible)
        self._attention = ops.plan_attention(
            self._layout, num_heads=num_heads, num_kv_heads=num_heads, head_dim=head_dim, window=None
        )

    def __call__(self, qkv: Tensor) -> Tensor:
        """Return [N, E] from queries, keys and values side by side [N, 3 * E], which may be overwritten."""
        num_heads, kv = self._num_heads, self._kv
        q = self._ops.rope_write_kv(
            qkv, kv, self._layout, *self._angles, num_heads=num_heads, num_kv_heads=num_heads, norms=None
        )
        return self._attention(q, kv, scale=self._scale).flatten(1)


def keys_and_values(ops: Ops, dtype: torch.dtype, lengths: list[int], num_heads: int, head_dim: int) -> KVBlocks:
    """Return room for sequences of ``lengths``, which one ``PackedAttention`` at a time may use."""
    shapes = ops.cache_shapes(sum(-(-length // _BLOCK) for length in lengths), _BLOCK, num_heads, head_dim)
    return KVBlocks(torch.empty(shapes.k, dtype=dtype), torch.empty(shapes.v, dtype=dtype))
