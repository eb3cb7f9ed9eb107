"""Attention that reads float32 keys and values where they lie in the cache.

B decodes of a group, H query heads, G KV heads, D head width, L tokens the longest of the group sees, N blocks of
P tokens.

Gathering keys and values into one dense tensor reads and writes more bytes than the attention itself reads. Two torch
ops work by row numbers instead. A product sampled at the pattern of a sparse matrix gives scores: each of the B * H
rows names the cache rows it sees. A bag of embeddings, weighted with the probabilities, gives the weighted sum of the
values of the same rows. Both run in parallel over the B * H rows, and neither touches a slot that is not named.
"""

import warnings
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    """B sequences with one new token each."""

    rows: Tensor
    """[B] which of the T tokens"""
    seen: Tensor
    """[B * H * L] rows of the cache, taken as [N * P * G, D], that each query head sees. Rows of sequences that see
    less than L tokens are padded with their last."""
    bags: Tensor
    """[B * H] where each query head's part of ``seen`` begins"""
    pattern: Tensor
    """[B * H, N * P * G] sparse, zero at ``seen``"""
    mask: Tensor | None
    """[B, 1, L] 0, or minus infinity at padding; None where there is none"""


@dataclass(frozen=True, slots=True)
class _Attention:
    """See ``ops.Attention``."""

    groups: list[_DecodeGroup]
    prefills: list[PrefillSequence]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, kv: KVBlocks, *, scale: float) -> Tensor:
        out = torch.empty_like(q)
        for group in self.groups:
            out.index_copy_(0, group.rows, _attend_decodes(q.index_select(0, group.rows), kv, group, scale))
        for sequence in self.prefills:
            out[sequence.start : sequence.end] = attend_prefill(q, k, v, kv, sequence, scale)
        return out


def plan_attention(layout: BatchLayout, kv: KVBlocks, *, num_heads: int, window: int | None) -> _Attention:
    """See ``ops.Ops.plan_attention``; the cache must be float32."""
    decodes, prefills = split_batch(layout, window)
    return _Attention([_plan_group(layout, kv, group, num_heads) for group in group_decodes(decodes)], prefills)


def _plan_group(layout: BatchLayout, kv: KVBlocks, group: list[Decode], num_heads: int) -> _DecodeGroup:
    num_blocks, size, G, _ = kv.k.shape
    num_cache_rows = num_blocks * size * G
    index_type = torch.int32 if num_cache_rows < 2**31 else torch.int64
    sequences = torch.tensor([decode.sequence for decode in group])
    visible = torch.tensor([decode.num_visible for decode in group]).unsqueeze(1)
    first_visible = torch.tensor([decode.context_len for decode in group]).unsqueeze(1) - visible
    width = group[0].num_visible
    columns = torch.arange(width).unsqueeze(0)
    offsets = first_visible - layout.table_starts[sequences].long().unsqueeze(1) + columns.minimum(visible - 1)
    slots_BL = layout.tables[sequences].gather(1, offsets // size).long() * size + offsets % size
    heads_H = torch.arange(num_heads) // (num_heads // G)
    seen = (slots_BL.unsqueeze(1) * G + heads_H[:, None]).to(index_type).flatten()
    num_queries = len(group) * num_heads
    starts = torch.arange(0, num_queries * width + 1, width, dtype=index_type)
    mask = None
    if group[-1].num_visible < width:
        mask = torch.zeros(len(group), width).masked_fill_(columns >= visible, -torch.inf).unsqueeze(1)
    return _DecodeGroup(
        rows=torch.tensor([decode.row for decode in group]),
        seen=seen,
        bags=starts[:-1],
        pattern=torch.sparse_csr_tensor(
            starts, seen, torch.zeros(len(seen)), size=(num_queries, num_cache_rows), check_invariants=False
        ),
        mask=mask,
    )


def _attend_decodes(q_BHD: Tensor, kv: KVBlocks, group: _DecodeGroup, scale: float) -> Tensor:
    B, H, D = q_BHD.shape
    keys, values = kv.k.view(-1, D), kv.v.view(-1, D)
    sampled = torch.sparse.sampled_addmm(group.pattern, q_BHD.view(B * H, D), keys.t(), beta=0.0, alpha=scale)
    scores_BHL = sampled.values().view(B, H, -1)
    if group.mask is not None:
        scores_BHL = scores_BHL + group.mask
    weights = scores_BHL.softmax(-1).flatten()
    out = F.embedding_bag(group.seen, values, group.bags, mode="sum", per_sample_weights=weights)
    return out.view(B, H, D)
