"""Rotary angles and the scalings that stretch them. D head width, R rotated elements of it, T tokens."""

import math

import numpy as np
import numpy.typing as npt
import torch

from penstock.kernels import Ops
from penstock.kernels.native.array import Array
from penstock.kernels.tensor import Tensor
from penstock.models.config import Rope


class RotaryEmbedding:
    """Cosines and sines for any positions.

    An angle depends on the token's position alone, never on what else is in the batch or on how far the sequence will
    grow: keys in the cache stay valid. See docs/decisions/0003 for ``dynamic`` and 0005 for ``longrope``.

    Where only R of D elements rotate, heads are expected in ``rotary_order``, and the others get an angle of zero.
    """

    def __init__(self, rope: Rope | None, head_dim: int, max_tokens: int, ops: Ops) -> None:
        """``max_tokens`` is the longest sequence that will be run; None for ``rope`` rotates nothing."""
        self._rope = rope
        self._head_dim = head_dim
        self._ops = ops
        sections = rope.sections if rope is not None else ()
        self._axes = ops.own(Array(np.repeat(np.arange(len(sections)), np.array(sections, dtype=np.int64))))
        inverse, self._attention_factor = (
            _inverse_frequencies(rope, max_tokens) if rope is not None else (np.empty(0), 1.0)
        )
        self._inverse = ops.own(Array(inverse.astype(np.float32)))

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return (cos, sin), each [T, 1, D] float32, for ``positions`` [T] int64; or [3, T], if there are sections."""
        is_dynamic = self._rope is not None and self._rope.kind == "dynamic"
        inverse = self._dynamic(positions) if is_dynamic else self._inverse
        axes = None if positions.ndim == 1 else self._axes
        return self._ops.rope_angles(positions, inverse, self._head_dim, factor=self._attention_factor, axes=axes)

    def _dynamic(self, positions: Tensor) -> Tensor:
        """Return [T, R/2]: NTK-aware bases that grow with the length reached (as transformers computes them)."""
        rope = self._rope
        assert rope is not None
        dim, trained = rope.rotary_dim, rope.original_max_positions
        lengths = (positions + 1).clamp(min=trained).double()
        growth = (rope.factor * lengths / trained - (rope.factor - 1)) ** (dim / (dim - 2))
        bases = (rope.theta * growth).float().unsqueeze(1)
        return 1.0 / bases ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)


def rotary_order(rope: Rope | None, head_dim: int) -> Tensor | None:
    """Return the order [D] int64 of a head's elements in which the kernel's pairs (i, i + D/2) are those to rotate.

    The R rotated elements pair up as (i, i + R/2); their halves go to the front of the head's halves. Queries and keys
    in the same order have the same products. None where nothing has to move.
    """
    if rope is None or rope.rotary_dim == head_dim:
        return None
    turned, kept = torch.arange(rope.rotary_dim), torch.arange(rope.rotary_dim, head_dim)
    return torch.cat([part for pair in zip(turned.chunk(2), kept.chunk(2), strict=True) for part in pair])


def _inverse_frequencies(rope: Rope, max_tokens: int) -> tuple[npt.NDArray[np.float64], float]:
    """Return [R/2] and the factor on cosines and sines."""
    powers: npt.NDArray[np.float64] = rope.theta ** (np.arange(0, rope.rotary_dim, 2) / rope.rotary_dim)
    match rope.kind:
        case "linear":
            return 1.0 / powers / rope.factor, 1.0
        case "llama3":
            return _llama3(1.0 / powers, rope), 1.0
        case "yarn":
            return _yarn(powers, rope), _yarn_attention_factor(rope)
        case "longrope":
            return _longrope(powers, rope, max_tokens), _longrope_attention_factor(rope)
        case _:
            return 1.0 / powers, 1.0


def _llama3(inverse: npt.NDArray[np.float64], rope: Rope) -> npt.NDArray[np.float64]:
    """Llama 3.1's rule: leave short wavelengths, divide long ones, blend between."""
    wavelengths = 2 * math.pi / inverse
    trained = rope.original_max_positions
    blend = (trained / wavelengths - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clip(0, 1)
    stretched: npt.NDArray[np.float64] = (1 - blend) * inverse / rope.factor + blend * inverse
    return stretched


def _yarn(powers: npt.NDArray[np.float64], rope: Rope) -> npt.NDArray[np.float64]:
    """Peng et al., "YaRN" (2023): interpolate the slow dimensions, extrapolate the fast ones, ramp between."""
    dim = rope.rotary_dim

    def dimension_of(num_rotations: float) -> float:
        turns = rope.original_max_positions / (num_rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = ((np.arange(dim // 2) - low) / (high - low)).clip(0, 1)
    mixed: npt.NDArray[np.float64] = ramp / (rope.factor * powers) + (1 - ramp) / powers
    return mixed


def _yarn_attention_factor(rope: Rope) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def magnitude(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return magnitude(1.0)


def _longrope(powers: npt.NDArray[np.float64], rope: Rope, max_tokens: int) -> npt.NDArray[np.float64]:
    """Ding et al., "LongRoPE" (2024): each frequency has its own divisor, for short sequences and for long ones."""
    divisors = rope.long_factors if max_tokens > rope.original_max_positions else rope.short_factors
    return 1.0 / (np.array(divisors) * powers)


def _longrope_attention_factor(rope: Rope) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.factor <= 1.0:
        return 1.0
    return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_positions))
