"""Attention that reads float32 keys and values where they lie in the cache.

B decodes of a group, H query heads, G KV heads, D head width, L tokens the longest of the group sees, M tokens all
of it see together, N blocks of P tokens.

Gathering keys and values into one dense tensor moves more bytes than the attention itself reads. Two torch ops work
by row numbers instead. A product sampled at the pattern of a sparse matrix gives the scores: each of the B * H rows
names the cache rows it sees, as many as there are. A bag of embeddings, weighted with the probabilities, gives the
weighted sum of the values of the same rows. Both run in parallel over the B * H rows, and neither touches a slot that
is not named.
"""

import warnings
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.kernels.layout import BatchLayout, KVBlocks
from penstock.kernels.paged_attention.reference import (
    Decode,
    PrefillSequence,
    attend_prefill,
    group_decodes,
    split_batch,
)

# torch warns once per process that its sparse tensors are in beta; an operator can do nothing with that.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0, 1], [0], [0.0], size=(1, 1))


_SIMILAR = 0.25
"""Only the scores are padded to the longest of a group, so groups may be wide."""


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    """B sequences with one new token each."""

    rows: Tensor
    """[B] which of the T tokens"""
    seen: Tensor
    """[M * H] rows of the cache, taken as [N * P * G, D], that each query head of each sequence sees"""
    bags: Tensor
    """[B * H] where each query head's part of ``seen`` begins"""
    pattern: Tensor
    """[B * H, N * P * G] sparse, zero at ``seen``"""
    scores: Tensor
    """[B * H, L] scratch, minus infinity where nothing is seen"""
    places: Tensor | None
    """[M * H] where each score goes in it; None where they fill it"""


@dataclass(frozen=True, slots=True)
class _Attention:
    """See ``ops.Attention``."""

    groups: list[_DecodeGroup]
    prefills: list[PrefillSequence]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, kv: KVBlocks, *, scale: float) -> Tensor:
        if len(self.groups) == 1 and len(self.groups[0].rows) == len(q):
            return _attend_decodes(q, kv, self.groups[0], scale)
        out = torch.empty(q.shape)
        for group in self.groups:
            out.index_copy_(0, group.rows, _attend_decodes(q.index_select(0, group.rows), kv, group, scale))
        for sequence in self.prefills:
            out[sequence.start : sequence.end] = attend_prefill(q, k, v, kv, sequence, scale)
        return out


def plan_attention(layout: BatchLayout, kv: KVBlocks, *, num_heads: int, window: int | None) -> _Attention:
    """See ``ops.Ops.plan_attention``; the cache must be float32."""
    decodes, prefills = split_batch(layout, window)
    groups = group_decodes(decodes, _SIMILAR)
    return _Attention([_plan_group(layout, kv, group, num_heads) for group in groups], prefills)


def _plan_group(layout: BatchLayout, kv: KVBlocks, group: list[Decode], num_heads: int) -> _DecodeGroup:
    # numpy: these are small steps on integers, and its fixed cost is the smaller.
    num_blocks, size, G, _ = kv.k.shape
    num_cache_rows = num_blocks * size * G
    index_type = np.int32 if num_cache_rows < 2**31 else np.int64
    sequences = [decode.sequence for decode in group]
    lengths = np.array([decode.num_visible for decode in group])
    ends = np.array([decode.context_len for decode in group]) - layout.table_starts.numpy()[sequences]
    columns = np.arange(lengths.max())
    is_seen_BL = columns < lengths[:, None]
    offsets_BL = ((ends - lengths)[:, None] + columns).astype(index_type)
    tables = layout.tables.numpy()[sequences]
    blocks_BL = np.take_along_axis(tables, (offsets_BL // size).clip(max=tables.shape[1] - 1), axis=1)
    rows_BL = (blocks_BL.astype(index_type) * size + offsets_BL % size) * G
    # Heads of one sequence follow each other, so that they find its keys still at hand.
    kv_heads = np.arange(num_heads, dtype=index_type) // (num_heads // G)
    rows_BHL = rows_BL[:, None] + kv_heads[:, None]
    places = np.flatnonzero(np.broadcast_to(is_seen_BL[:, None], rows_BHL.shape))
    seen = torch.from_numpy(rows_BHL.ravel().take(places))
    num_queries, width = len(group) * num_heads, len(columns)
    bounds = np.zeros(num_queries + 1, dtype=index_type)
    bounds[1:] = np.repeat(lengths, num_heads).cumsum()
    starts = torch.from_numpy(bounds)
    return _DecodeGroup(
        rows=torch.tensor([decode.row for decode in group]),
        seen=seen,
        bags=starts[:-1],
        pattern=torch.sparse_csr_tensor(
            starts, seen, torch.zeros(len(seen)), size=(num_queries, num_cache_rows), check_invariants=False
        ),
        scores=torch.full((num_queries, width), -torch.inf),
        places=None if len(seen) == num_queries * width else torch.from_numpy(places),
    )


def _attend_decodes(q_BHD: Tensor, kv: KVBlocks, group: _DecodeGroup, scale: float) -> Tensor:
    B, H, D = q_BHD.shape
    keys, values = kv.k.view(-1, D), kv.v.view(-1, D)
    queries = q_BHD.reshape(B * H, D)
    scores = torch.sparse.sampled_addmm(group.pattern, queries, keys.t(), beta=0.0, alpha=scale).values()
    if group.places is None:
        weights = scores.view(B * H, -1).softmax(-1).view(-1)
    else:
        group.scores.view(-1).scatter_(0, group.places, scores)
        weights = group.scores.softmax(-1).take(group.places)
    out = F.embedding_bag(group.seen, values, group.bags, mode="sum", per_sample_weights=weights)
    return out.view(B, H, D)
