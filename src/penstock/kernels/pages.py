"""A cache's memory, which the system hands out when it is first written to: in huge pages, and before steps need it."""

import math
import mmap
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np

from penstock.errors import InvalidSetting
from penstock.kernels.dtypes import ELEMENT_BYTES
from penstock.kernels.layout import KVBlocks
from penstock.kernels.native import NATIVE
from penstock.kernels.native.array import Array
from penstock.kernels.tensor import Tensor
from penstock.units import format_bytes

_HUGE_PAGE = 2 << 20
_FIRST_BYTES = 256 << 10
"""What of each tensor lies in small pages: a first prompt waits for few of these, and not for a huge one in each"""


def lazy_zeros(shape: tuple[int, ...], dtype: str) -> Array:
    """Return zeros that take memory as they are written to.

    All but their beginning is in whole huge pages, where the system has these: blocks lie in no order, and translating
    their addresses page by page costs attention a tenth and writes a third. Raises ``InvalidSetting`` where the system
    refuses as much.
    """
    num_bytes = math.prod(shape) * ELEMENT_BYTES[dtype]
    try:
        memory = mmap.mmap(-1, num_bytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise InvalidSetting(
            f"the system refuses {format_bytes(num_bytes)} for a part of the cache ({error.strerror}); lower "
            "cache.memory_bytes (--cache-memory), or raise what limits memory: ulimit -v, or vm.overcommit_memory",
            param="cache.memory_bytes",
        ) from error
    room = np.frombuffer(memory, dtype=np.uint8)
    first = -(room.ctypes.data + _FIRST_BYTES) % _HUGE_PAGE
    num_in_huge_pages = (num_bytes - _FIRST_BYTES) // _HUGE_PAGE * _HUGE_PAGE
    if num_in_huge_pages > 0 and hasattr(mmap, "MADV_HUGEPAGE"):
        # A kernel may be built without them.
        with suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE, first + _FIRST_BYTES, num_in_huge_pages)
    elements = room[first : first + num_bytes].view(np.uint16 if dtype == "bfloat16" else dtype)
    return Array(elements.reshape(shape), dtype)


class PagesAhead:
    """Has the system hand out a cache's memory before steps write to it, on a thread beside them.

    New memory has to be zeroed, a huge page in each layer when the first block there is written, and on a virtual
    machine found by the host too: milliseconds each, all in one step. A pool hands out its blocks in their order before
    it takes any again, so what comes next is known.
    """

    def __init__(self, cache: Sequence[KVBlocks], *, step_blocks: int) -> None:
        """``step_blocks``: how many new ones a step may write to."""
        tensors = [tensor for kv in cache for tensor in kv.tensors()]
        self._tensors = tensors if NATIVE is not None else []
        self._num_blocks = len(tensors[0]) if tensors else 0
        block_bytes = max((tensor[0].nbytes for tensor in tensors), default=_HUGE_PAGE)
        self._stretch = max(-(-_HUGE_PAGE // block_bytes), 4 * step_blocks)
        """Blocks whose memory is asked for at a time"""
        self._num_asked = 0
        self._last: int | None = None
        """The last block that the step before writes to; no first answer shares the machine with this"""
        # The process waits for it before it ends: a thread that returns from compiled code to no Python would be fatal.
        self._thread = ThreadPoolExecutor(1, "penstock-pages")

    def begin_step(self, tables: "Sequence[array[int]]") -> None:
        """Note the blocks that a step writes to, newest last in each table, and ask for what is behind those before."""
        if self._num_asked >= self._num_blocks or not self._tensors:
            return
        last, self._last = self._last, max(table[-1] for table in tables)
        if last is None:
            return
        while last + self._stretch // 2 >= self._num_asked < self._num_blocks:
            first, self._num_asked = self._num_asked, min(self._num_asked + self._stretch, self._num_blocks)
            # Where no thread can be had, steps wait for their pages.
            with suppress(RuntimeError):
                self._thread.submit(_touch, self._tensors, first, self._num_asked)


def _touch(tensors: list[Tensor], first: int, end: int) -> None:
    assert NATIVE is not None
    NATIVE.touch([(tensor[first].data_ptr(), tensor[first:end].nbytes) for tensor in tensors])
