"""From logits to tokens."""

from penstock.kernels.native import NATIVE
from penstock.kernels.sampling import cpu, reference
from penstock.kernels.sampling.rows import DrawRow, TopTokens

__all__ = ["DrawRow", "TopTokens", "draw_tokens", "scratch_bytes", "top_tokens"]

draw_tokens = reference.draw_tokens if NATIVE is None else cpu.draw_tokens
top_tokens = reference.top_tokens if NATIVE is None else cpu.top_tokens
scratch_bytes = reference.scratch_bytes if NATIVE is None else cpu.scratch_bytes
