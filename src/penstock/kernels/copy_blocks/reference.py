"""Copy-on-write, the copying half."""

from collections.abc import Sequence

import torch

from penstock.kernels.layout import KVBlocks


def copy_blocks(cache: Sequence[KVBlocks], copies: Sequence[tuple[int, int]]) -> None:
    """Copy whole blocks (from, to) in every layer; all are read before any is written."""
    sources, targets = torch.tensor(copies, dtype=torch.int64).unbind(1)
    for kv in cache:
        kv.k.index_copy_(0, targets, kv.k.index_select(0, sources))
        kv.v.index_copy_(0, targets, kv.v.index_select(0, sources))
