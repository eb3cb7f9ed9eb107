"""A cache's memory: had ahead of who writes to it, in huge pages, and unchanged by that."""

import ctypes
import mmap
import re
from array import array
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from penstock.errors import InvalidSetting
from penstock.kernels import KVBlocks
from penstock.kernels.pages import PagesAhead, lazy_zeros
from tests.kernels.backends import needs_native

HUGE = 2 << 20
THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def resident_bytes(tensor: Tensor) -> int:
    """Return how much of ``tensor`` the system has handed out."""
    first = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    num_bytes = tensor.data_ptr() + tensor.nbytes - first
    pages = ctypes.create_string_buffer(-(-num_bytes // mmap.PAGESIZE))
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(first), ctypes.c_size_t(num_bytes), pages) == 0
    return sum(page & 1 for page in pages.raw) * mmap.PAGESIZE


def flags_at(address: int) -> list[str]:
    """Return what the system says of the mapping at ``address``; `hg` is advice to use huge pages."""
    is_inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            is_inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif is_inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError("nothing is mapped there")


def cache(num_blocks: int, *, num_layers: int = 2) -> list[KVBlocks]:
    """Return layers whose blocks of 64 KiB make 32 a huge page."""
    shape = (num_blocks, 2, 64, 256)
    return [KVBlocks(*(lazy_zeros(shape, "bfloat16").as_tensor() for _ in range(2))) for _ in range(num_layers)]


def settle(pages: PagesAhead) -> None:
    """Wait until all that was asked for is there."""
    pages._thread.submit(lambda: None).result(60)


@pytest.mark.parametrize("shape", [(3, 5), (1 << 20, 3), (0, 4)])
def test_lazy_memory_is_zeros_of_the_shape_asked_for(shape: tuple[int, ...]) -> None:
    array = lazy_zeros(shape, "bfloat16")
    zeros = array.torch()
    assert zeros.data_ptr() == array.data_ptr() or not zeros.numel()
    assert (array.shape, array.dtype, array.is_contiguous()) == (shape, "bfloat16", True)
    assert (zeros.shape, zeros.dtype, zeros.is_contiguous()) == (shape, torch.bfloat16, True)
    assert not zeros.any()
    zeros += 1
    assert bool((zeros == 1).all())


def test_all_but_the_beginning_is_in_whole_huge_pages() -> None:
    zeros = lazy_zeros((6 * HUGE,), "int8")
    assert (zeros.data_ptr() + (256 << 10)) % HUGE == 0
    first = zeros.data_ptr()
    assert "hg" not in flags_at(first), "a first write waits for a small page"
    if THP.exists():
        assert "hg" in flags_at(first + (256 << 10))
        assert "hg" in flags_at(first + (256 << 10) + 5 * HUGE - 1)


@needs_native
def test_memory_is_there_before_blocks_are_reached() -> None:
    kv = cache(256)
    tensors = [tensor for layer in kv for tensor in layer.tensors()]
    pages = PagesAhead(kv, step_blocks=2)
    assert all(resident_bytes(tensor) < HUGE for tensor in tensors), "nothing is asked for before the first step"
    pages.begin_step([array("i", [0])])
    settle(pages)
    assert all(resident_bytes(tensor) < HUGE for tensor in tensors), "and a first step has the machine to itself"
    for last in range(0, 256, 15):
        pages.begin_step([array("i", [0]), array("i", [3, last])])
        pages.begin_step([array("i", [0]), array("i", [3, last])])
        settle(pages)
        ahead = tensors[0][0].nbytes * min(last + 16, 255)
        assert all(resident_bytes(tensor) >= ahead for tensor in tensors)
        if last == 0:
            assert all(resident_bytes(tensor) < 3 * HUGE for tensor in tensors), "and no more than is needed soon"


@needs_native
def test_what_others_write_meanwhile_stays() -> None:
    kv = cache(128, num_layers=1)
    pages = PagesAhead(kv, step_blocks=128)
    for _ in range(2):
        pages.begin_step([array("i", [127])])
    k, v = kv[0].k.numpy(), kv[0].v.numpy()
    for block in range(128):
        k[block], v[block] = block, 128 - block
    settle(pages)
    blocks = np.arange(128).reshape(-1, 1, 1, 1)
    assert (k == blocks).all()
    assert (v == 128 - blocks).all()


def test_memory_that_the_system_refuses_is_said_with_what_helps() -> None:
    with pytest.raises(InvalidSetting, match=r"1024.0 TiB .*--cache-memory.*ulimit -v"):
        lazy_zeros((1 << 50,), "int8")
