"""A quantized matrix, whatever file it came from or goes to.

A code c of input k stands for scale * (c - zero), with a scale and a zero for each output and group of inputs.
N outputs, K inputs, G groups.
"""

from dataclasses import dataclass, replace

import torch

from penstock.kernels import InputCodes
from penstock.kernels.tensor import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How a projection is quantized."""

    bits: int
    """Of a weight: 2 to 8"""
    group: int | None = None
    """Inputs that share a scale; None: all of an output's"""
    symmetric: bool = True
    """Every zero is 2 ** (bits - 1)"""
    act_order: bool = False
    """Groups are not of neighbours: the checkpoint says which group each input is in"""
    activations: str | None = None
    """Activations are meant to be rounded to 8 bits: ``dynamic``, with a scale for each token, or ``static``, with one
    that was found beforehand; None: they are not"""
    activation_zeros: bool = False
    """Static activations are not symmetric, and have a zero beside their scale"""

    @property
    def middle(self) -> int:
        """The zero of symmetric codes."""
        return 1 << (self.bits - 1)

    def num_groups(self, num_inputs: int) -> int:
        """Return G."""
        return 1 if self.group is None else -(-num_inputs // self.group)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedWeight:
    """One projection's weight."""

    scheme: Scheme
    codes: Tensor
    """[N, K] uint8, a byte each whatever their bits, without sign"""
    scales: Tensor
    """[N, G] of any floating dtype: the checkpoint's own"""
    zeros: Tensor | None = None
    """[N, G] uint8; None where symmetric"""
    groups: Tensor | None = None
    """[K] int32, the group each input is in; None unless ``act_order``"""
    inputs: InputCodes | None = None
    """Of static activations"""

    def __post_init__(self) -> None:
        """Raise ValueError where parts do not fit together: files say many things."""
        scheme, shape = self.scheme, (len(self.codes), self.scheme.num_groups(self.num_inputs))
        for name, tensor, is_there, sizes in (
            ("codes", self.codes, True, (shape[0], self.num_inputs)),
            ("scales", self.scales, True, shape),
            ("zeros", self.zeros, not scheme.symmetric, shape),
            ("groups", self.groups, scheme.act_order, (self.num_inputs,)),
        ):
            if (tensor is not None) is not is_there or (tensor is not None and tuple(tensor.shape) != sizes):
                found = "none" if tensor is None else list(tensor.shape)
                raise ValueError(f"{name} are {found}, and should be {list(sizes) if is_there else 'none'}")
            if name in ("codes", "zeros") and tensor is not None and tensor.dtype is not torch.uint8:
                raise ValueError(f"{name} are {tensor.dtype}, not bytes")
        if (self.inputs is not None) is not (scheme.activations == "static"):
            raise ValueError(f"activations are {scheme.activations or 'not rounded'}, and rounded to {self.inputs}")
        if self.groups is not None and not (self.groups.min() >= 0 and self.groups.max() < shape[1]):
            raise ValueError(f"an input is in group {int(self.groups.max())} of {shape[1]}")

    @property
    def num_inputs(self) -> int:
        """K."""
        return self.codes.shape[1]

    def rows(self, which: Tensor | slice) -> "QuantizedWeight":
        """Return the outputs ``which``, in their order."""
        zeros = None if self.zeros is None else self.zeros[which]
        return replace(self, codes=self.codes[which], scales=self.scales[which], zeros=zeros)

    def group_of_inputs(self) -> Tensor:
        """Return [K] int64."""
        if self.groups is not None:
            return self.groups.long()
        return torch.arange(self.num_inputs) // (self.scheme.group or max(self.num_inputs, 1))


def dequantize(weight: QuantizedWeight) -> Tensor:
    """Return [N, K] float32: what the codes stand for."""
    groups = weight.group_of_inputs()
    zeros = float(weight.scheme.middle) if weight.zeros is None else weight.zeros.float()[:, groups]
    return (weight.codes.float() - zeros) * weight.scales.float()[:, groups]
