"""Copy-on-write, the copying half."""

from collections.abc import Sequence

import torch

from penstock.kernels.layout import KVBlocks


def copy_blocks(cache: Sequence[KVBlocks], copies: Sequence[tuple[int, int]]) -> None:
    """Copy whole blocks (from, to) in every layer; all are read before any is written."""
    sources, targets = torch.tensor(copies, dtype=torch.int64).unbind(1)
    for kv in cache:
        for tensor in kv.tensors():
            tensor.index_copy_(0, targets, tensor.index_select(0, sources))
