"""Storing keys and values, and copying blocks."""

import pytest
import torch

from penstock.kernels import CPUOps, HeadNorms, KVBlocks, ReferenceOps
from penstock.kernels.copy_blocks.reference import copy_blocks
from penstock.kernels.rope_write_kv.reference import to_codes, write_kv
from tests.kernels.backends import by_slot, instruction_sets, numbers, poisoned_cache, using
from tests.packing import layout_of


def numbered(num_blocks: int = 6, block_size: int = 3) -> KVBlocks:
    """Return blocks, with scales, in which every element is its own."""
    k = torch.arange(num_blocks * block_size * 2 * 4, dtype=torch.float32).view(num_blocks, block_size, 2, 4)
    scales = torch.arange(num_blocks * block_size * 2) + 0.5
    scales = scales.view(num_blocks, block_size, 2)
    return KVBlocks(k, -k - 1, scales, -scales)


def plain(kv: KVBlocks) -> KVBlocks:
    """Return the blocks without scales: elements are numbers, not codes."""
    return KVBlocks(kv.k, kv.v)


def test_write_kv_touches_its_slots_alone() -> None:
    kv, before = plain(numbered()), numbered()
    slots = torch.tensor([16, 0, 5])
    k, v = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    write_kv(kv, slots, k, v)
    for cache, written, old in ((kv.k, k, before.k), (kv.v, v, before.v)):
        flat, untouched = cache.flatten(0, 1), old.flatten(0, 1)
        assert torch.equal(flat[slots], written)
        others = [slot for slot in range(18) if slot not in slots]
        assert torch.equal(flat[others], untouched[others])


def test_write_kv_takes_heads_that_lie_inside_a_wider_row() -> None:
    kv, projected = plain(numbered()), torch.randn(2, 8, 4)
    write_kv(kv, torch.tensor([1, 9]), projected[:, 4:6], projected[:, 6:])
    assert torch.equal(kv.k[3, 0], projected[1, 4:6])
    assert torch.equal(kv.v[0, 1], projected[0, 6:])


@pytest.mark.parametrize("block_size", [4, 16])
@pytest.mark.parametrize("with_norms", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("head_dim", [2, 6, 16, 24, 80, 128])
@pytest.mark.parametrize("isa", instruction_sets())
def test_native_queries_keys_and_values(
    isa: str, head_dim: int, dtype: torch.dtype, with_norms: bool, block_size: int
) -> None:
    torch.manual_seed(0)
    H, G = 3, 2
    layout = layout_of([2, 1, 5], [6, 1, 5], [[5, 0], [3], [1, 7]], block_size)
    qkv, angles = torch.randn(8, (H + 2 * G) * head_dim), torch.rand(8, 1, head_dim // 2) * 6
    cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([-angles.sin(), angles.sin()], -1)
    norms = HeadNorms(torch.randn(head_dim), torch.randn(head_dim), 1e-6) if with_norms else None
    results = []
    for ops in (ReferenceOps(), CPUOps()):
        kv = poisoned_cache(ops, 8, block_size, G, head_dim, dtype)
        with using(isa, 2):
            q = ops.rope_write_kv(qkv.clone(), kv, layout, cos, sin, num_heads=H, num_kv_heads=G, norms=norms)
        results.append((q, *numbers(ops, isa, kv)))
    # A last bit of rotation may decide to which of two neighbours a number is rounded: 8 bits of magnitudes up to 10,
    # for codes, are a step of 10 / 127.
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.int8: 8e-2}[dtype]
    torch.testing.assert_close(results[1][0], results[0][0], atol=1e-5, rtol=1e-5)
    for expected, found in zip(results[0][1:], results[1][1:], strict=True):
        # Slots that no token owns are still what they were: not numbers.
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance, equal_nan=True)


def angles_of_nothing(num_tokens: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cosines and sines that rotate by nothing, so that keys arrive to the bit."""
    return torch.ones(num_tokens, 1, head_dim), torch.zeros(num_tokens, 1, head_dim)


@pytest.mark.parametrize("head_dim", [2, 6, 16, 24, 128])
@pytest.mark.parametrize("isa", instruction_sets())
def test_native_codes_are_the_references(isa: str, head_dim: int) -> None:
    torch.manual_seed(0)
    G, block_size = 3, 4
    layout = layout_of([9], [9], [[5, 0, 2]], block_size)
    qkv = torch.randn(9, 3 * G * head_dim) * torch.logspace(-20, 20, 9).unsqueeze(1)
    heads = qkv.view(9, 3 * G, head_dim)
    heads[0, G] = 0  # no magnitude at all
    heads[1, G] = 1e-45  # none that has a 127th
    heads[2, G] = 1.9e-43  # whose 127th is a bit
    heads[3, G, 0] = torch.inf
    heads[4, 2 * G, 1] = torch.nan
    heads[5, G] = 3e38
    caches = []
    for ops in (ReferenceOps(), CPUOps()):
        kv = poisoned_cache(ops, 6, block_size, G, head_dim, torch.int8)
        cos, sin = angles_of_nothing(9, head_dim)
        with using(isa, 2):
            ops.rope_write_kv(qkv.clone(), kv, layout, cos, sin, num_heads=G, num_kv_heads=G, norms=None)
        caches.append(list(by_slot(ops, isa, kv).tensors()))
    for expected, found in zip(*caches, strict=True):
        torch.testing.assert_close(found, expected, atol=0, rtol=0, equal_nan=True)
    # What is not finite shows in the scale of its own head alone.
    k_scales = caches[1][2].flatten(0, 1)[layout.slots]
    assert k_scales[3].isnan().tolist() == [True, False, False]
    assert not k_scales[[0, 1, 2, 5, 6, 7, 8]].isnan().any()


def test_a_code_is_off_by_half_a_scale_at_most() -> None:
    torch.manual_seed(0)
    heads = torch.randn(50, 3, 24)
    codes, scales = to_codes(heads)
    off = (codes * scales.unsqueeze(-1) - heads).abs() / scales.unsqueeze(-1)
    assert off.max() < 0.5 + 1e-4
    assert (codes.abs().amax(-1) == 127).all()


def test_copies_read_everything_before_they_write() -> None:
    cache, before = [numbered(), numbered()], numbered()
    copy_blocks(cache, [(0, 1), (1, 4), (0, 5)])
    for kv in cache:
        for copied, old in zip(kv.tensors(), before.tensors(), strict=True):
            assert torch.equal(copied[1], old[0])
            assert torch.equal(copied[4], old[1])
            assert torch.equal(copied[5], old[0])
            assert torch.equal(copied[[0, 2, 3]], old[[0, 2, 3]])
