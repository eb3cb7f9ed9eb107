"""Copy-on-write, the copying half."""

from collections.abc import Sequence

from penstock.kernels.layout import KVBlocks
from penstock.kernels.native.array import Array


def copy_blocks(cache: Sequence[KVBlocks], copies: Sequence[tuple[int, int]]) -> None:
    """Copy whole blocks (from, to) in every layer; all are read before any is written."""
    sources, targets = (list(ids) for ids in zip(*copies, strict=True))
    for kv in cache:
        for tensor in kv.tensors():
            blocks = tensor.numpy() if isinstance(tensor, Array) else tensor
            blocks[targets] = blocks[sources]
