"""Attention within sequences of any lengths that lie one after another, each row seeing all of its own.

Done by the decoder's kernels, with every sequence in blocks of keys and values that no other has: nothing is padded,
and what a row gets does not depend on other sequences. Rows come in parts of a bounded number, so that what a pass
holds beside its rows does not grow with a picture, and somebody can go on with something else between two parts.

N rows, E width, H heads, D head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from penstock.kernels import Attention, BatchLayout, KVBlocks, Ops

ROWS_AT_ONCE = 1024
"""Of a part. More are no faster, for products are large enough, and take more memory and more time for a part."""
_BLOCK = 16
"""Rows in a block"""


def runs(sizes: Sequence[int]) -> list[range]:
    """Return which of ``sizes`` go together: neighbours of ``ROWS_AT_ONCE`` at most, or one that has more."""
    found: list[range] = []
    first = total = 0
    for index, size in enumerate(sizes):
        if index > first and total + size > ROWS_AT_ONCE:
            found.append(range(first, index))
            first, total = index, 0
        total += size
    if sizes:
        found.append(range(first, len(sizes)))
    return found


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of whole sequences, or of a long one."""

    rows: slice
    """Of the N"""
    num_rows: int
    num_seen: int
    """Rows that these see, added up"""
    ops: Ops
    num_heads: int
    angles: tuple[Tensor, Tensor]
    kv: KVBlocks
    written: BatchLayout
    attention: Attention

    def write(self, qkv: Tensor) -> Tensor:
        """Keep the keys and values of queries, keys and values side by side [rows, 3 * E]; return [rows, H, D] queries.

        ``qkv`` may be overwritten, and the queries lie in it.
        """
        num_heads = self.num_heads
        return self.ops.rope_write_kv(
            qkv, self.kv, self.written, *self.angles, num_heads=num_heads, num_kv_heads=num_heads, norms=None
        )

    def attend(self, q: Tensor) -> Tensor:
        """Return [rows, E] from queries [rows, H, D], once the keys and values of all that they see are kept."""
        return self.attention(q, self.kv, scale=q.shape[-1] ** -0.5).flatten(1)


class PackedAttention:
    """Attention of one pass, for all layers whose sequences are these."""

    def __init__(
        self, ops: Ops, lengths: list[int], num_heads: int, head_dim: int, angles: tuple[Tensor, Tensor], kv: KVBlocks
    ) -> None:
        """Plan it for sequences of ``lengths`` in rotary ``angles`` (cosines, sines), on a ``keys_and_values``."""
        self._ops, self._heads, self._angles, self._kv = ops, (num_heads, head_dim), angles, kv
        self.groups: list[list[Part]] = []
        """Parts that see only each other, as keys and values of one group at a time are kept"""
        first = 0
        for run in runs(lengths):
            some = [lengths[index] for index in run]
            self.groups.append(self._whole(first, some) if sum(some) <= ROWS_AT_ONCE else self._cut(first, some[0]))
            first += sum(some)

    def _whole(self, first: int, lengths: list[int]) -> list[Part]:
        tables, block = [], 0
        for length in lengths:
            tables.append(range(block, block + _num_blocks(length)))
            block += _num_blocks(length)
        visible = np.repeat(np.array(lengths, dtype=np.int32), lengths)
        layout = BatchLayout.pack(lengths, lengths, tables, _BLOCK, visible=visible)
        return [self._part(first, sum(lengths), layout, layout)]

    def _cut(self, first: int, length: int) -> list[Part]:
        table, parts = [range(_num_blocks(length))], []
        for start in range(0, length, ROWS_AT_ONCE):
            num_rows = min(ROWS_AT_ONCE, length - start)
            written = BatchLayout.pack([num_rows], [start + num_rows], table, _BLOCK)
            # For what they see it does not matter which of the sequence's rows they are.
            visible = np.full(num_rows, length, dtype=np.int32)
            seeing = BatchLayout.pack([num_rows], [length], table, _BLOCK, visible=visible)
            parts.append(self._part(first + start, num_rows, written, seeing))
        return parts

    def _part(self, first: int, num_rows: int, written: BatchLayout, seeing: BatchLayout) -> Part:
        num_heads, head_dim = self._heads
        rows = slice(first, first + num_rows)
        assert seeing.visible is not None
        return Part(
            rows,
            num_rows,
            int(seeing.visible.sum()),
            self._ops,
            num_heads,
            (self._angles[0][rows], self._angles[1][rows]),
            self._kv,
            written,
            self._ops.plan_attention(
                seeing, num_heads=num_heads, num_kv_heads=num_heads, head_dim=head_dim, window=None
            ),
        )


def keys_and_values(
    ops: Ops, dtype: torch.dtype, ways: Sequence[Sequence[int]], num_heads: int, head_dim: int
) -> KVBlocks:
    """Return room for the sequences of a pass, which are cut in several ``ways`` into lengths.

    One ``PackedAttention`` at a time may use it.
    """
    needed = (sum(_num_blocks(way[index]) for index in run) for way in ways for run in runs(way))
    shapes = ops.cache_shapes(max(needed), _BLOCK, num_heads, head_dim)
    return KVBlocks(torch.empty(shapes.k, dtype=dtype), torch.empty(shapes.v, dtype=dtype))


def _num_blocks(length: int) -> int:
    return -(-length // _BLOCK)
