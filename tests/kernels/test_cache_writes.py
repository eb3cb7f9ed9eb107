"""Storing keys and values, and copying blocks."""

import pytest
import torch

from penstock.kernels import CPUOps, HeadNorms, KVBlocks, ReferenceOps
from penstock.kernels.copy_blocks.reference import copy_blocks
from penstock.kernels.rope_write_kv.reference import write_kv
from tests.kernels.backends import by_slot, instruction_sets, poisoned_cache, using
from tests.packing import layout_of


def numbered(num_blocks: int = 6, block_size: int = 3) -> KVBlocks:
    """Return blocks in which every element is its own."""
    k = torch.arange(num_blocks * block_size * 2 * 4, dtype=torch.float32).view(num_blocks, block_size, 2, 4)
    return KVBlocks(k, -k - 1)


def test_write_kv_touches_its_slots_alone() -> None:
    kv, before = numbered(), numbered()
    slots = torch.tensor([16, 0, 5])
    k, v = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    write_kv(kv, slots, k, v)
    for cache, written, old in ((kv.k, k, before.k), (kv.v, v, before.v)):
        flat, untouched = cache.flatten(0, 1), old.flatten(0, 1)
        assert torch.equal(flat[slots], written)
        others = [slot for slot in range(18) if slot not in slots]
        assert torch.equal(flat[others], untouched[others])


def test_write_kv_takes_heads_that_lie_inside_a_wider_row() -> None:
    kv, projected = numbered(), torch.randn(2, 8, 4)
    write_kv(kv, torch.tensor([1, 9]), projected[:, 4:6], projected[:, 6:])
    assert torch.equal(kv.k[3, 0], projected[1, 4:6])
    assert torch.equal(kv.v[0, 1], projected[0, 6:])


@pytest.mark.parametrize("with_norms", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [2, 6, 16, 24, 80, 128])
@pytest.mark.parametrize("isa", instruction_sets())
def test_native_queries_keys_and_values(isa: str, head_dim: int, dtype: torch.dtype, with_norms: bool) -> None:
    torch.manual_seed(0)
    H, G, block_size = 3, 2, 4
    layout = layout_of([2, 1, 5], [6, 1, 5], [[5, 0], [3], [1, 7]], block_size)
    qkv, angles = torch.randn(8, (H + 2 * G) * head_dim), torch.rand(8, 1, head_dim // 2) * 6
    cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([-angles.sin(), angles.sin()], -1)
    norms = HeadNorms(torch.randn(head_dim), torch.randn(head_dim), 1e-6) if with_norms else None
    results = []
    for ops in (ReferenceOps(), CPUOps()):
        kv = poisoned_cache(ops, 8, block_size, G, head_dim, dtype)
        with using(isa, 2):
            q = ops.rope_write_kv(qkv.clone(), kv, layout, cos, sin, num_heads=H, num_kv_heads=G, norms=norms)
        results.append((q, *by_slot(ops, kv)))
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    for expected, found in zip(*results, strict=True):
        # Slots that no token owns are still what they were: not numbers.
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance, equal_nan=True)


def test_copies_read_everything_before_they_write() -> None:
    cache, before = [numbered(), numbered()], numbered()
    copy_blocks(cache, [(0, 1), (1, 4), (0, 5)])
    for kv in cache:
        for copied, old in ((kv.k, before.k), (kv.v, before.v)):
            assert torch.equal(copied[1], old[0])
            assert torch.equal(copied[4], old[1])
            assert torch.equal(copied[5], old[0])
            assert torch.equal(copied[[0, 2, 3]], old[[0, 2, 3]])
