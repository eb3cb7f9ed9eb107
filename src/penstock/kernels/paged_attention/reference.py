"""Attention of packed query tokens to their own sequences' cached keys, by gathering those keys.

T packed query tokens, S sequences, H query heads, G KV heads, R = H / G query heads per KV head, D head width,
N blocks, P tokens per block, W table width.

What depends on the step alone is worked out once and shared by all layers. Sequences with one new token are batched,
a few groups of similar length at a time, so that short ones do not pay for long ones; the others run one by one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.kernels.layout import BatchLayout, KVBlocks

_MAX_GROUPS = 4
_SIMILAR = 0.7
"""Keys and values are padded to the longest of a group, so groups must be narrow."""


@dataclass(frozen=True, slots=True)
class Decode:
    """A sequence with one new token."""

    sequence: int
    row: int
    """Which of the T tokens."""
    context_len: int
    num_visible: int
    """Tokens it sees: the last ones of its context."""


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    """B sequences with one new token each, L gathered cache slots per sequence."""

    rows: Tensor
    """[B] which of the T tokens"""
    blocks: Tensor
    """[B * L / P] block ids to gather"""
    mask: Tensor
    """[B, 1, 1, L] float32, 0 where the slot may be seen, minus infinity elsewhere"""
    unseen: Tensor
    """Indices into the B * L slots of what no token of the sequence wrote"""


@dataclass(frozen=True, slots=True)
class PrefillSequence:
    """One sequence with several new tokens, Q, over L gathered cache slots."""

    start: int
    end: int
    """Rows of the T tokens."""
    blocks: Tensor | None
    """[L / P] block ids to gather; None where the new tokens are all there is to see"""
    num_slots: int
    """L, up to the last token"""
    mask: Tensor | None
    """[Q, L] float32, 0 or minus infinity; None means plainly causal over the new tokens"""


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
    """See ``ops.Ops.plan_attention``."""
    decodes, prefills = split_batch(layout, window)
    return _Attention([_plan_group(layout, group, window) for group in group_decodes(decodes, _SIMILAR)], prefills)


def split_batch(layout: BatchLayout, window: int | None) -> tuple[list[Decode], list[PrefillSequence]]:
    """Return the sequences with one new token and those with several."""
    decodes, prefills, row = [], [], 0
    for s, (query_len, context_len) in enumerate(zip(layout.query_lens_list, layout.context_lens_list, strict=True)):
        if query_len == 1:
            num_visible = context_len if window is None else min(context_len, window)
            decodes.append(Decode(s, row, context_len, num_visible))
        else:
            prefills.append(_plan_prefill(layout, s, row, query_len, context_len, window))
        row += query_len
    return decodes, prefills


def group_decodes(decodes: Sequence[Decode], similar: float) -> list[list[Decode]]:
    """Return them in a few groups whose members see at least ``similar`` of what the group's longest sees.

    The last group takes all that is left. Within a group they keep their order.
    """
    waiting = list(decodes)
    groups: list[list[Decode]] = []
    while waiting:
        longest = max(decode.num_visible for decode in waiting)
        least = 0.0 if len(groups) == _MAX_GROUPS - 1 else longest * similar
        groups.append([decode for decode in waiting if decode.num_visible >= least])
        waiting = [decode for decode in waiting if decode.num_visible < least]
    return groups


def _plan_group(layout: BatchLayout, group: list[Decode], window: int | None) -> _DecodeGroup:
    size = layout.block_size
    sequences = torch.tensor([decode.sequence for decode in group])
    contexts = torch.tensor([decode.context_len for decode in group]).unsqueeze(1)
    first_visible = contexts - torch.tensor([decode.num_visible for decode in group]).unsqueeze(1)
    starts = layout.table_starts[sequences].long().unsqueeze(1)
    first_blocks = (first_visible - starts) // size
    width = int(((contexts - 1 - starts) // size - first_blocks).max()) + 1
    columns = first_blocks + torch.arange(width)
    blocks = layout.tables[sequences.unsqueeze(1), columns.clamp(max=layout.tables.shape[1] - 1)].long()
    positions = starts + first_blocks * size + torch.arange(width * size)
    written = positions < contexts
    hidden = ~(written & (positions >= first_visible))
    return _DecodeGroup(
        rows=torch.tensor([decode.row for decode in group]),
        blocks=blocks.clamp_(min=0).flatten(),
        mask=torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)[:, None, None],
        unseen=(~written).flatten().nonzero().flatten(),
    )


def _plan_prefill(
    layout: BatchLayout, s: int, row: int, query_len: int, context_len: int, window: int | None
) -> PrefillSequence:
    size, end = layout.block_size, row + query_len
    if query_len == context_len and (window is None or context_len <= window):
        return PrefillSequence(row, end, None, context_len, None)
    table_start = int(layout.table_starts[s])
    first_visible = 0 if window is None else max(0, context_len - query_len + 1 - window)
    first_block = (first_visible - table_start) // size
    first_slot = table_start + first_block * size
    num_blocks = -(-(context_len - first_slot) // size)
    queries = torch.arange(context_len - query_len, context_len).unsqueeze(1)
    keys = torch.arange(first_slot, context_len).unsqueeze(0)
    hidden = keys > queries
    if window is not None:
        hidden |= keys <= queries - window
    return PrefillSequence(
        start=row,
        end=end,
        blocks=layout.tables[s, first_block : first_block + num_blocks].long(),
        num_slots=context_len - first_slot,
        mask=torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf),
    )


def _attend_decodes(q_BHD: Tensor, kv: KVBlocks, group: _DecodeGroup, scale: float) -> Tensor:
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


def attend_prefill(q: Tensor, k: Tensor, v: Tensor, kv: KVBlocks, sequence: PrefillSequence, scale: float) -> Tensor:
    """Return [Q, H, D] of one sequence; arguments as ``ops.Attention`` has them."""
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
