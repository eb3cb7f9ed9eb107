"""Attention of packed query tokens to their own sequences' cached keys.

T packed query tokens, S sequences, H query heads, G KV heads, R = H / G query heads per KV head, D head width,
N blocks, P tokens per block, W table width.

What depends on the step alone is worked out once in an ``AttentionPlan`` and shared by all layers. Sequences with one
new token are batched, a few groups of similar length at a time, so that short ones do not pay for long ones; the
others run one by one.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.kernels.layout import BatchLayout, KVBlocks

_MAX_GROUPS = 4
_SIMILAR = 0.7
"""A decode joins the group of the longest one if its blocks are at least this share of that one's."""


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    """B sequences with one new token each, L gathered cache slots per sequence."""

    rows: Tensor
    """[B] which of the T tokens"""
    blocks: Tensor
    """[B * L / P] block ids to gather"""
    mask: Tensor
    """[B, 1, 1, L] bool, true where the slot may be seen"""
    unseen: Tensor
    """Indices into the B * L slots of what no token of the sequence wrote, which may hold anything"""


@dataclass(frozen=True, slots=True)
class _PrefillSequence:
    """One sequence with Q new tokens over L gathered cache slots."""

    start: int
    end: int
    """Rows of the T tokens."""
    blocks: Tensor | None
    """[L / P] block ids to gather; None where the new tokens are all there is to see"""
    num_slots: int
    """L, up to the last token"""
    mask: Tensor | None
    """[Q, L] bool; None means plainly causal over the new tokens"""


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """One step's attention, for all layers that share a window."""

    decodes: list[_DecodeGroup]
    prefills: list[_PrefillSequence]


def plan_attention(layout: BatchLayout, window: int | None) -> AttentionPlan:
    """Work out what each sequence gathers and sees; ``window`` is how many tokens each looks back, itself included."""
    size = layout.block_size
    table_starts = layout.table_starts.tolist()
    decodes: list[tuple[int, int, int, int]] = []
    prefills = []
    row = 0
    for s, (query_len, context_len) in enumerate(zip(layout.query_lens_list, layout.context_lens_list, strict=True)):
        first_visible = 0 if window is None else max(0, context_len - query_len + 1 - window)
        first_block = (first_visible - table_starts[s]) // size
        num_blocks = -(-(context_len - table_starts[s]) // size) - first_block
        if query_len == 1:
            decodes.append((num_blocks, s, row, first_block))
        else:
            blocks = layout.tables[s, first_block : first_block + num_blocks].long()
            first_slot = table_starts[s] + first_block * size
            prefills.append(_plan_prefill(row, query_len, context_len, first_slot, blocks, window))
        row += query_len
    decodes.sort(reverse=True)
    groups: list[_DecodeGroup] = []
    while decodes:
        longest = decodes[0][0]
        least = 0 if len(groups) == _MAX_GROUPS - 1 else longest * _SIMILAR
        num_members = sum(1 for member in decodes if member[0] >= least)
        groups.append(_plan_decodes(layout, decodes[:num_members], table_starts, window))
        decodes = decodes[num_members:]
    return AttentionPlan(groups, prefills)


def _plan_decodes(
    layout: BatchLayout, members: list[tuple[int, int, int, int]], table_starts: list[int], window: int | None
) -> _DecodeGroup:
    size = layout.block_size
    width = members[0][0]
    sequences = torch.tensor([s for _, s, _, _ in members])
    first_blocks = torch.tensor([first for _, _, _, first in members])
    columns = first_blocks.unsqueeze(1) + torch.arange(width)
    blocks = layout.tables[sequences.unsqueeze(1), columns.clamp(max=layout.tables.shape[1] - 1)].long()
    contexts = layout.context_lens[sequences].long().unsqueeze(1)
    starts = torch.tensor([table_starts[s] for _, s, _, _ in members]).unsqueeze(1)
    positions = starts + first_blocks.unsqueeze(1) * size + torch.arange(width * size)
    written = positions < contexts
    visible = written if window is None else written & (positions >= contexts - window)
    return _DecodeGroup(
        rows=torch.tensor([row for _, _, row, _ in members]),
        blocks=blocks.clamp_(min=0).flatten(),
        mask=visible[:, None, None, :],
        unseen=(~written).flatten().nonzero().flatten(),
    )


def _plan_prefill(
    row: int, query_len: int, context_len: int, first_slot: int, blocks: Tensor, window: int | None
) -> _PrefillSequence:
    end = row + query_len
    if query_len == context_len and (window is None or context_len <= window):
        return _PrefillSequence(row, end, None, context_len, None)
    num_slots = context_len - first_slot
    queries = torch.arange(context_len - query_len, context_len).unsqueeze(1)
    keys = torch.arange(first_slot, context_len).unsqueeze(0)
    mask = keys <= queries
    if window is not None:
        mask &= keys > queries - window
    return _PrefillSequence(row, end, blocks, num_slots, mask)


def paged_attention(q: Tensor, k: Tensor, v: Tensor, kv: KVBlocks, plan: AttentionPlan, *, scale: float) -> Tensor:
    """Attend every query token to its own sequence's keys, which ``write_kv`` has stored already.

    q           [T, H, D]     activation dtype
    k, v        [T, G, D]     this step's keys and values, the same as in the cache
    kv.k, kv.v  [N, P, G, D]
    Returns [T, H, D] in q's dtype; softmax accumulates in float32.
    """
    out = torch.empty_like(q)
    for group in plan.decodes:
        out[group.rows] = _decode(q[group.rows], kv, group, scale)
    for sequence in plan.prefills:
        out[sequence.start : sequence.end] = _prefill(q, k, v, kv, sequence, scale)
    return out


def _decode(q_BHD: Tensor, kv: KVBlocks, group: _DecodeGroup, scale: float) -> Tensor:
    B, H, D = q_BHD.shape
    G = kv.k.shape[2]
    k_BLGD = kv.k.index_select(0, group.blocks).view(B, -1, G, D)
    v_BLGD = kv.v.index_select(0, group.blocks).view(B, -1, G, D)
    # A mask removes scores, but a stale value that is not a number would survive being weighted with zero.
    k_BLGD.view(-1, G, D).index_fill_(0, group.unseen, 0)
    v_BLGD.view(-1, G, D).index_fill_(0, group.unseen, 0)
    # The query heads that share a KV head stand in for query tokens: keys and values are read where they lie.
    out_BGRD = F.scaled_dot_product_attention(
        q_BHD.view(B, G, H // G, D),
        k_BLGD.transpose(1, 2),
        v_BLGD.transpose(1, 2),
        attn_mask=group.mask,
        scale=scale,
    )
    return out_BGRD.reshape(B, H, D)


def _prefill(q: Tensor, k: Tensor, v: Tensor, kv: KVBlocks, sequence: _PrefillSequence, scale: float) -> Tensor:
    rows = slice(sequence.start, sequence.end)
    Q, H, D = q[rows].shape
    G = k.shape[1]
    if sequence.blocks is None:
        k_LGD, v_LGD = k[rows], v[rows]
    else:
        k_LGD = kv.k.index_select(0, sequence.blocks).view(-1, G, D)[: sequence.num_slots]
        v_LGD = kv.v.index_select(0, sequence.blocks).view(-1, G, D)[: sequence.num_slots]
    R = H // G
    out_GRQD = F.scaled_dot_product_attention(
        q[rows].view(Q, G, R, D).permute(1, 2, 0, 3),
        k_LGD.transpose(0, 1).unsqueeze(1).expand(G, R, -1, D),
        v_LGD.transpose(0, 1).unsqueeze(1).expand(G, R, -1, D),
        attn_mask=sequence.mask,
        is_causal=sequence.mask is None,
        scale=scale,
    )
    return out_GRQD.permute(2, 0, 1, 3).reshape(Q, H, D)
