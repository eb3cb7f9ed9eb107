"""T tokens, H query heads, G KV heads, D head width, N blocks of P tokens."""

import torch
from torch import Tensor

from penstock.kernels.layout import BatchLayout, KVBlocks
from penstock.kernels.ops import HeadNorms
from penstock.kernels.rms_norm.reference import rms_norm


def rope_write_kv(
    qkv: Tensor,
    kv: KVBlocks,
    layout: BatchLayout,
    cos: Tensor,
    sin: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    norms: HeadNorms | None,
) -> Tensor:
    """Normalize and rotate queries and keys, store keys and values at ``layout.slots``, return the queries [T, H, D].

    qkv       [T, (H + 2G) * D]  queries, keys and values side by side
    cos, sin  [T, 1, D] float32  as ``apply_rope`` takes them
    """
    H, G = num_heads, num_kv_heads
    heads = qkv.view(len(qkv), H + 2 * G, -1)
    q, k, v = heads[:, :H], heads[:, H : H + G], heads[:, H + G :]
    if norms is not None:
        q, k = rms_norm(q, norms.q, norms.eps), rms_norm(k, norms.k, norms.eps)
    write_kv(kv, layout.slots, apply_rope(k, cos, sin), v)
    return apply_rope(q, cos, sin)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + D/2) of ``x`` [T, H, D] by its token's angles.

    cos  [T, 1, D] float32, each angle's cosine at i and at i + D/2
    sin  [T, 1, D] float32, its sine negated at i and as it is at i + D/2
    Both are scaled already where the scaling asks for it.
    Su et al., "RoFormer" (2021), in the half-split arrangement of GPT-NeoX. Returns x's dtype.
    """
    partner = x.roll(x.shape[-1] // 2, -1)
    return (x * cos).addcmul_(partner, sin).to(x.dtype)


def write_kv(kv: KVBlocks, slots: Tensor, k: Tensor, v: Tensor) -> None:
    """Store ``k`` and ``v`` [T, G, D] at ``slots`` [T] int64 (block * P + offset) of a cache [N, P, G, D].

    An int8 cache takes codes, see ``to_codes``, and their scales.
    """
    for heads, cache, cache_scales in ((k, kv.k, kv.k_scales), (v, kv.v, kv.v_scales)):
        if cache_scales is None:
            cache.flatten(0, 1).index_copy_(0, slots, heads.to(cache.dtype))
            continue
        codes, scales = to_codes(heads)
        cache.flatten(0, 1).index_copy_(0, slots, codes)
        cache_scales.flatten(0, 1).index_copy_(0, slots, scales)


def to_codes(heads: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``heads`` [..., D] as int8 codes in -127..127 and what one stands for [...] float32.

    A head's scale is its greatest magnitude by 127, so that a code is off by half a scale at most. A head with anything
    in it that is not finite has a scale that is not a number.
    """
    heads = heads.float()
    scales = heads.abs().amax(-1) / 127
    codes = (heads / scales.unsqueeze(-1)).round().clamp(-127, 127)
    usable = scales.isfinite() & (scales > 0)
    scales = scales.where(scales.isfinite(), torch.nan)
    return codes.where(usable.unsqueeze(-1), 0).to(torch.int8), scales
