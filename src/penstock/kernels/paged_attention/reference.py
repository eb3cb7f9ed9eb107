"""Attention of packed query tokens to their own sequences' cached keys, one sequence at a time.

T packed query tokens, S sequences, Q query tokens of one sequence, H query heads, G KV heads, R = H / G query heads
per KV head, D head width, L tokens a sequence sees, N blocks, P tokens per block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.kernels.layout import BatchLayout, KVBlocks


@dataclass(frozen=True, slots=True)
class _Sequence:
    """What one sequence's queries see."""

    rows: slice
    """Of the T tokens"""
    slots: Tensor
    """[L] where its visible tokens lie in the cache"""
    hidden: Tensor
    """[Q, L] bool: keys a query may not see"""


@dataclass(frozen=True, slots=True)
class _Attention:
    """See ``ops.Attention``."""

    sequences: list[_Sequence]
    score_cap: float | None

    def __call__(self, q: Tensor, kv: KVBlocks, *, scale: float) -> Tensor:
        out = torch.empty_like(q)
        for sequence in self.sequences:
            out[sequence.rows] = _attend(q[sequence.rows], kv, sequence, scale, self.score_cap)
        return out


def plan_attention(
    layout: BatchLayout,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    window: int | None,
    score_cap: float | None = None,
) -> _Attention:
    """See ``ops.Ops.plan_attention``; the cache is [N, P, G, D]."""
    sequences, row = [], 0
    for s, (query_len, context_len) in enumerate(zip(layout.query_lens_list, layout.context_lens_list, strict=True)):
        queries = torch.arange(context_len - query_len, context_len).unsqueeze(1)
        first_visible = 0 if window is None else max(0, context_len - query_len + 1 - window)
        keys = torch.arange(first_visible, context_len)
        ends = queries + 1
        if layout.visible is not None:
            ends = layout.visible[row : row + query_len].unsqueeze(1)
        hidden = keys >= ends
        if window is not None:
            hidden |= keys <= queries - window
        offsets = keys - layout.table_starts[s]
        blocks = layout.tables[s].long()[offsets // layout.block_size]
        slots = blocks * layout.block_size + offsets % layout.block_size
        sequences.append(_Sequence(slice(row, row + query_len), slots, hidden))
        row += query_len
    return _Attention(sequences, score_cap)


def _attend(q_QHD: Tensor, kv: KVBlocks, sequence: _Sequence, scale: float, score_cap: float | None) -> Tensor:
    Q, H, D = q_QHD.shape
    k_LGD = _gather(kv.k, kv.k_scales, sequence.slots)
    v_LGD = _gather(kv.v, kv.v_scales, sequence.slots)
    q_QGRD = q_QHD.float().view(Q, k_LGD.shape[1], -1, D)
    scores_GRQL = torch.einsum("qgrd,lgd->grql", q_QGRD, k_LGD) * scale
    if score_cap is not None:
        scores_GRQL = (scores_GRQL / score_cap).tanh() * score_cap
    weights_GRQL = scores_GRQL.masked_fill(sequence.hidden, -torch.inf).softmax(-1)
    return torch.einsum("grql,lgd->qgrd", weights_GRQL, v_LGD).reshape(Q, H, D).to(q_QHD.dtype)


def _gather(cache: Tensor, scales: Tensor | None, slots: Tensor) -> Tensor:
    """Return what a cache [N, P, G, D] has at ``slots`` [L] as [L, G, D] float32; codes times their scales."""
    heads = cache.flatten(0, 1).index_select(0, slots).float()
    return heads if scales is None else heads * scales.flatten(0, 1).index_select(0, slots).unsqueeze(-1)


def scratch_bytes(*, step_tokens: int, max_model_tokens: int, num_heads: int, head_dim: int, element_bytes: int) -> int:
    """Return what attention works in beside its arguments and result, at most.

    For one sequence at a time: its gathered keys and values, widened to all heads, and a float32 row of scores or mask
    for each query token.
    """
    gathered = 2 * max_model_tokens * num_heads * head_dim * element_bytes
    return gathered + min(step_tokens, max_model_tokens) * max_model_tokens * torch.float32.itemsize
