"""Rotary angles and the scalings that stretch them. D head width, T tokens."""

import math

import torch
from torch import Tensor

from penstock.models.config import ModelConfig, RopeScaling


class RotaryEmbedding:
    """Cosines and sines for any positions.

    An angle depends on the token's position alone, never on what else is in the batch or on how far the sequence will
    grow: keys in the cache stay valid. For ``dynamic`` that means the base a token gets is the one transformers uses
    when the sequence ends with that token; a prompt longer than the trained context, which transformers rotates as a
    whole by its last token's base, therefore differs from it.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._scaling = config.rope
        self._inverse, self._attention_factor = _inverse_frequencies(config)

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return (cos, sin) as ``kernels/rope`` takes them, each [T, 1, D] float32, for ``positions`` [T] int64."""
        places = positions.to(torch.float32).unsqueeze(1)
        inverse = self._dynamic(positions) if self._scaling.kind == "dynamic" else self._inverse
        angles = (places * inverse).unsqueeze(1)
        cos, sin = angles.cos() * self._attention_factor, angles.sin() * self._attention_factor
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)

    def _dynamic(self, positions: Tensor) -> Tensor:
        """Return [T, D/2]: NTK-aware bases that grow with the length reached (as transformers computes them)."""
        scaling, dim = self._scaling, self._config.head_dim
        trained = self._config.max_positions / scaling.factor
        lengths = (positions + 1).clamp(min=round(trained)).double()
        growth = (scaling.factor * lengths / trained - (scaling.factor - 1)) ** (dim / (dim - 2))
        bases = (self._config.rope_theta * growth).float().unsqueeze(1)
        return 1.0 / bases ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)


def _inverse_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Return [D/2] float32 and the factor on cosines and sines."""
    dim, scaling = config.head_dim, config.rope
    powers = config.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    match scaling.kind:
        case "linear":
            return 1.0 / powers / scaling.factor, 1.0
        case "llama3":
            return _llama3(1.0 / powers, scaling), 1.0
        case "yarn":
            return _yarn(powers, config), _yarn_attention_factor(scaling)
        case _:
            return 1.0 / powers, 1.0


def _llama3(inverse: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1's rule: leave short wavelengths, divide long ones, blend between."""
    wavelengths = 2 * math.pi / inverse
    trained = scaling.original_max_positions
    blend = (trained / wavelengths - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0, 1)
    return (1 - blend) * inverse / scaling.factor + blend * inverse


def _yarn(powers: Tensor, config: ModelConfig) -> Tensor:
    """Peng et al., "YaRN" (2023): interpolate the slow dimensions, extrapolate the fast ones, ramp between."""
    scaling, dim = config.rope, config.head_dim

    def dimension_of(num_rotations: float) -> float:
        turns = scaling.original_max_positions / (num_rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(config.rope_theta))

    low, high = dimension_of(scaling.beta_fast), dimension_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return ramp / (scaling.factor * powers) + (1 - ramp) / powers


def _yarn_attention_factor(scaling: RopeScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def magnitude(weight: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * weight * math.log(scaling.factor) + 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return magnitude(scaling.mscale) / magnitude(scaling.mscale_all_dim)
    return magnitude(1.0)
