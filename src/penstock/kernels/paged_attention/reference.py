"""Attention of packed query tokens to their own sequences' cached keys, one sequence at a time.

T packed query tokens, S sequences, Q query tokens of one sequence, H query heads, G KV heads, R = H / G query heads
per KV head, D head width, L tokens a sequence sees, N blocks, P tokens per block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.kernels.layout import BatchLayout, KVBlocks

_MOST_SCORES = 1 << 20
"""Of all heads at a time, unless one query has more: what they take does not grow with a step"""
_SCORES_COPIES = 3
"""Scores, their softmax, and what is made on the way of one of them"""


@dataclass(frozen=True, slots=True)
class _Sequence:
    """What one sequence's queries see."""

    rows: slice
    """Of the T tokens"""
    slots: Tensor
    """[L] where its visible tokens lie in the cache"""
    keys: Tensor
    """[L] their positions"""
    starts: Tensor | None
    """[Q, 1] position of the first key that each query sees; None: all see the first"""
    ends: Tensor
    """[Q, 1] position behind the last"""

    def hidden(self, some: slice) -> Tensor:
        """Return [q, L] bool: keys that ``some`` of the queries may not see."""
        hidden = self.keys >= self.ends[some]
        return hidden if self.starts is None else hidden.logical_or_(self.keys < self.starts[some])


@dataclass(frozen=True, slots=True)
class _Attention:
    """See ``ops.Attention``."""

    sequences: list[_Sequence]
    score_cap: float | None

    def __call__(self, q: Tensor, kv: KVBlocks, *, scale: float) -> Tensor:
        out = torch.empty_like(q)
        for sequence in self.sequences:
            _attend(out[sequence.rows], q[sequence.rows], kv, sequence, scale, self.score_cap)
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
        ends = torch.arange(context_len - query_len, context_len).unsqueeze(1) + 1
        starts = None if window is None else ends - window
        first_visible = 0 if window is None else max(0, context_len - query_len + 1 - window)
        keys = torch.arange(first_visible, context_len)
        if layout.visible is not None:
            ends = layout.visible[row : row + query_len].unsqueeze(1)
        offsets = keys - layout.table_starts[s]
        blocks = layout.tables[s].long()[offsets // layout.block_size]
        slots = blocks * layout.block_size + offsets % layout.block_size
        sequences.append(_Sequence(slice(row, row + query_len), slots, keys, starts, ends))
        row += query_len
    return _Attention(sequences, score_cap)


def _attend(
    out_QHD: Tensor, q_QHD: Tensor, kv: KVBlocks, sequence: _Sequence, scale: float, score_cap: float | None
) -> None:
    Q, H, _ = q_QHD.shape
    k_LGD = _gather(kv.k, kv.k_scales, sequence.slots)
    v_LGD = _gather(kv.v, kv.v_scales, sequence.slots)
    num_at_once = max(1, _MOST_SCORES // (H * len(sequence.slots)))
    for first in range(0, Q, num_at_once):
        some = slice(first, first + num_at_once)
        q_QGRD = q_QHD[some].float().unflatten(1, (k_LGD.shape[1], -1))  # type: ignore[no-untyped-call]
        scores_GRQL = torch.einsum("qgrd,lgd->grql", q_QGRD, k_LGD).mul_(scale)
        if score_cap is not None:
            scores_GRQL = scores_GRQL.div_(score_cap).tanh_().mul_(score_cap)
        weights_GRQL = scores_GRQL.masked_fill_(sequence.hidden(some), -torch.inf).softmax(-1)
        out_QHD[some] = torch.einsum("grql,lgd->qgrd", weights_GRQL, v_LGD).flatten(1, 2)


def _gather(cache: Tensor, scales: Tensor | None, slots: Tensor) -> Tensor:
    """Return what a cache [N, P, G, D] has at ``slots`` [L] as [L, G, D] float32; codes times their scales."""
    heads = cache.flatten(0, 1).index_select(0, slots).float()
    return heads if scales is None else heads * scales.flatten(0, 1).index_select(0, slots).unsqueeze(-1)


def scratch_bytes(*, max_model_tokens: int, num_heads: int, num_kv_heads: int, head_dim: int) -> int:
    """Return what attention works in beside its arguments and result, at most.

    For one sequence at a time: its gathered keys and values, and each in the order that products take; and scores.
    """
    gathered = 4 * max_model_tokens * num_kv_heads * head_dim
    scores = _SCORES_COPIES * max(_MOST_SCORES, num_heads * max_model_tokens)
    return (gathered + scores) * torch.float32.itemsize
