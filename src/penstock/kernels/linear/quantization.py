"""What a weight comes as and is kept in, and what codes mean.

A code c stands for scale * (c - zero), with a scale and a zero for each output and group of inputs.
N outputs, K inputs, B = ceil(K / group) groups.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """A form that packed weights can have."""

    bits: int
    """8 or 4"""
    group: int
    """Inputs that share a scale: a multiple of 32 up to 512"""
    int8_activations: bool
    """Activations are rounded to 8 bits, with a scale for each token, and multiplied as integers"""

    @property
    def weight_bytes(self) -> float:
        """Bytes a weight takes that comes in codes, with its share of a scale."""
        return self.bits / 8 + 4 / self.group

    @property
    def rounded_weight_bytes(self) -> float:
        """Bytes a weight takes that is rounded to codes: scales of 4-bit ones are bfloat16s then."""
        return self.bits / 8 + (2 if self.bits == 4 else 4) / self.group


@dataclass(frozen=True, slots=True)
class InputCodes:
    """What every token's activations are rounded to, where that was found beforehand.

    An activation x becomes round(x / scale + zero), clamped to -128 and 127, and stands for scale * (code - zero).
    """

    scale: float
    zero: int = 0


@dataclass(frozen=True, slots=True)
class WeightCodes:
    """A matrix that comes in codes: what the codes of GPTQ, AWQ, compressed-tensors and GGUF map to."""

    form: Quantization
    codes: "Tensor"
    """[N, K] uint8, a byte each whatever their bits"""
    scales: "Tensor"
    """[N, B] float32"""
    zeros: "Tensor | None" = None
    """[N, B] uint8; None: 128 for codes of 8 bits, 8 for those of 4"""
    inputs: InputCodes | None = None
    """Where the form has ``int8_activations``; None: each token has a scale of its own"""

    @property
    def shape(self) -> tuple[int, int]:
        """Return N and K."""
        num_outputs, num_inputs = self.codes.shape
        return num_outputs, num_inputs


@dataclass(frozen=True, slots=True)
class Stacked:
    """A matrix of floats whose rows lie in several: one below the other, nothing is copied."""

    parts: "tuple[Tensor, ...]"
    """Each [n, K], of one dtype"""

    @property
    def shape(self) -> tuple[int, int]:
        """Return N and K."""
        return sum(len(part) for part in self.parts), self.parts[0].shape[1]

    @property
    def dtype(self) -> "torch.dtype":
        """Return that of every part."""
        return self.parts[0].dtype

    def joined(self) -> "Tensor":
        """Return a copy in one piece."""
        import torch

        return torch.cat(self.parts)


QUANTIZATIONS = {
    "int8": Quantization(bits=8, group=512, int8_activations=True),
    "int4": Quantization(bits=4, group=64, int8_activations=True),
    "w8a16": Quantization(bits=8, group=512, int8_activations=False),
    "w4a16": Quantization(bits=4, group=64, int8_activations=False),
}
"""What ``--quantize`` knows. Down to 64 inputs a smaller group helps 4-bit codes; 8-bit ones need none."""
