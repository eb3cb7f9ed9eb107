"""From logits to tokens."""

from penstock.kernels.native import NATIVE
from penstock.kernels.sampling.rows import DrawRow, TopTokens

if NATIVE is None:
    from penstock.kernels.sampling.reference import draw_tokens, scratch_bytes, top_tokens
else:
    from penstock.kernels.sampling.cpu import draw_tokens, scratch_bytes, top_tokens

__all__ = ["DrawRow", "TopTokens", "draw_tokens", "scratch_bytes", "top_tokens"]
