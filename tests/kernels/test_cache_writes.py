"""Storing keys and values, and copying blocks."""

import torch

from penstock.kernels import KVBlocks
from penstock.kernels.copy_blocks.reference import copy_blocks
from penstock.kernels.write_kv.reference import write_kv


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


def test_copies_read_everything_before_they_write() -> None:
    cache, before = [numbered(), numbered()], numbered()
    copy_blocks(cache, [(0, 1), (1, 4), (0, 5)])
    for kv in cache:
        for copied, old in ((kv.k, before.k), (kv.v, before.v)):
            assert torch.equal(copied[1], old[0])
            assert torch.equal(copied[4], old[1])
            assert torch.equal(copied[5], old[0])
            assert torch.equal(copied[[0, 2, 3]], old[[0, 2, 3]])
