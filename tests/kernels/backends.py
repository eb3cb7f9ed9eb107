"""Every backend that this machine runs, and the places where each keeps keys and values."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from penstock.kernels import CPUOps, KVBlocks, Ops
from penstock.kernels.native import INSTRUCTION_SETS, NATIVE

needs_native = pytest.mark.skipif(NATIVE is None, reason="the native kernels were not built")


def instruction_sets() -> list[str]:
    """Return those of the compiled code that this processor runs."""
    return [isa for isa in INSTRUCTION_SETS if NATIVE is not None and NATIVE.runs(isa)]


@contextmanager
def using(isa: str | None, num_threads: int = 1) -> Iterator[None]:
    """Let native kernels run in ``isa`` on ``num_threads`` meanwhile; None changes nothing."""
    if NATIVE is None or isa is None:
        yield
        return
    before = NATIVE.isa(), NATIVE.num_threads()
    try:
        NATIVE.choose(isa)
        NATIVE.set_num_threads(num_threads)
        yield
    finally:
        NATIVE.choose(before[0])
        NATIVE.set_num_threads(before[1])


def poisoned_cache(ops: Ops, num_blocks: int, block_size: int, heads: int, width: int, dtype: torch.dtype) -> KVBlocks:
    """Return a cache full of what is not a number."""
    k, v = ops.cache_shapes(num_blocks, block_size, heads, width)
    return KVBlocks(torch.full(k, torch.nan, dtype=dtype), torch.full(v, torch.nan, dtype=dtype))


def by_slot(ops: Ops, kv: KVBlocks) -> tuple[Tensor, Tensor]:
    """Return views [N, P, G, D] of a cache's keys and values, whatever the backend's order."""
    if isinstance(ops, CPUOps):
        return kv.k.permute(0, 3, 1, 2), kv.v.permute(0, 2, 1, 3)
    return kv.k, kv.v
