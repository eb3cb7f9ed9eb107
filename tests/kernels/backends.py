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
    before = NATIVE.isa(), NATIVE.num_threads(1)
    try:
        NATIVE.choose(isa)
        NATIVE.set_num_threads(num_threads, num_threads, [])
        yield
    finally:
        NATIVE.choose(before[0])
        NATIVE.set_num_threads(before[1], before[1], [])


def poisoned_cache(ops: Ops, num_blocks: int, block_size: int, heads: int, width: int, dtype: torch.dtype) -> KVBlocks:
    """Return a cache full of what is not a number: codes that are never written have a scale that is none."""
    shapes = ops.cache_shapes(num_blocks, block_size, heads, width)
    if dtype is torch.int8:
        codes = [torch.full(shape, -128, dtype=dtype) for shape in (shapes.k, shapes.v)]
        return KVBlocks(*codes, *(torch.full(shapes.scales, torch.nan) for _ in range(2)))
    return KVBlocks(*(torch.full(shape, torch.nan, dtype=dtype) for shape in (shapes.k, shapes.v)))


def by_slot(ops: Ops, isa: str | None, kv: KVBlocks) -> KVBlocks:
    """Return views of a cache, whatever the order, that have the shape [N, P, G, D] if reshaped; scales [N, P, G]."""
    if not isinstance(ops, CPUOps):
        return kv
    k_scales, v_scales = (None if scales is None else scales.transpose(1, 2) for scales in (kv.k_scales, kv.v_scales))
    N, G, D, P = kv.k.shape
    if isa in ("avx512_bf16", "amx") and kv.k.dtype is torch.bfloat16 and D % 16 == P % 16 == 0:
        k, v = kv.k.view(N, G, D // 2, P, 2), kv.v.view(N, G, P // 2, D, 2)
        return KVBlocks(k.permute(0, 3, 1, 2, 4), v.permute(0, 2, 4, 1, 3), k_scales, v_scales)
    return KVBlocks(kv.k.permute(0, 3, 1, 2), kv.v.permute(0, 2, 1, 3), k_scales, v_scales)


def numbers(ops: Ops, isa: str | None, kv: KVBlocks) -> tuple[Tensor, Tensor]:
    """Return the keys and values [N, P, G, D] that a cache stands for, in float32."""
    shape = kv.k.shape
    if isinstance(ops, CPUOps):
        N, G, D, P = shape
        shape = torch.Size((N, P, G, D))
    views = by_slot(ops, isa, kv)
    k, v = views.k.reshape(shape).float(), views.v.reshape(shape).float()
    if views.k_scales is not None and views.v_scales is not None:
        k, v = k * views.k_scales.unsqueeze(-1), v * views.v_scales.unsqueeze(-1)
    return k, v
