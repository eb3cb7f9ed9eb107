"""Where a step's packed tokens lie: the one description that every cache-touching op reads.

T packed query tokens, S sequences, N blocks, P tokens per block, G KV heads, D head width, W table width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from penstock.kernels.tensor import Tensor


@dataclass(frozen=True, slots=True)
class KVBlocks:
    """One layer's cache. Blocks come first; a backend chooses the order within one, see ``Ops.cache_shapes``."""

    k: Tensor
    """N blocks of P * G * D elements: numbers, or int8 codes"""
    v: Tensor
    """As many"""
    k_scales: Tensor | None = None
    """N blocks of P * G float32 where elements are codes: what those of a token's key stand for one of"""
    v_scales: Tensor | None = None
    """As many, of values"""

    def tensors(self) -> Iterator[Tensor]:
        """Yield what there is, each with the blocks outermost."""
        yield from (tensor for tensor in (self.k, self.v, self.k_scales, self.v_scales) if tensor is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLayout:
    """S sequences whose new tokens lie one after another in T rows, without padding.

    Sequence s owns rows ``query_starts[s]:query_starts[s + 1]``: its last tokens, at positions
    ``context_lens[s] - query_len .. context_lens[s] - 1``. Its block table starts at token ``table_starts[s]``
    (a multiple of P): blocks that slid out of the window are not in the table.
    """

    positions: Tensor
    """[T] int64, of each token in its own sequence; or [3, T], its time, row and column, where angles have three axes.
    Only angles read them"""
    slots: Tensor
    """[T] int64, where each token's key and value go: block * P + offset"""
    query_starts: Tensor
    """[S + 1] int32"""
    context_lens: Tensor
    """[S] int32, this step's tokens included"""
    tables: Tensor
    """[S, W] int32 block ids, -1 past the end"""
    table_starts: Tensor
    """[S] int32, position of the first token of ``tables[s, 0]``"""
    query_lens_list: list[int]
    """The differences of ``query_starts`` as Python integers, so that no op has to ask a tensor"""
    context_lens_list: list[int]
    """``context_lens`` as Python integers"""
    block_size: int
    """P"""
    visible: Tensor | None = None
    """[T] int32, how many of its sequence's tokens a row sees: itself and those before it at least, and no fewer than
    the sequence's row before sees. None: no more than that"""

    @classmethod
    def pack(
        cls,
        query_lens: list[int],
        context_lens: list[int],
        tables: Sequence[Sequence[int]],
        block_size: int,
        table_starts: Sequence[int] | None = None,
        positions: npt.NDArray[np.int64] | None = None,
        visible: npt.NDArray[np.int32] | None = None,
    ) -> Self:
        """Return the layout of sequences with these new tokens, tokens in all, blocks and first tokens in their tables.

        ``table_starts`` are zeros by default, ``positions`` those of tokens in their own sequences, and ``visible``
        what is before each.
        """
        query_array, context_array = np.array(query_lens, np.int32), np.array(context_lens, np.int32)
        starts = np.array(table_starts or [0] * len(query_lens), dtype=np.int32)
        table_array = np.full((len(query_lens), max(map(len, tables))), -1, dtype=np.int32)
        for s, block_ids in enumerate(tables):
            table_array[s, : len(block_ids)] = block_ids
        query_starts = np.zeros(len(query_lens) + 1, dtype=np.int32)
        np.cumsum(query_array, out=query_starts[1:])
        owners = np.repeat(np.arange(len(query_lens)), query_array)
        first_positions = context_array - query_array
        indices = np.arange(query_starts[-1]) - query_starts[owners] + first_positions[owners]
        offsets = indices - starts[owners]
        slots = table_array[owners, offsets // block_size].astype(np.int64) * block_size + offsets % block_size
        return cls(
            positions=torch.from_numpy(indices if positions is None else positions),
            slots=torch.from_numpy(slots),
            query_starts=torch.from_numpy(query_starts),
            context_lens=torch.from_numpy(context_array),
            tables=torch.from_numpy(table_array),
            table_starts=torch.from_numpy(starts),
            query_lens_list=query_lens,
            context_lens_list=context_lens,
            block_size=block_size,
            visible=None if visible is None else torch.from_numpy(visible),
        )
