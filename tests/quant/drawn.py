"""Quantized weights drawn at random."""

import torch

from penstock.kernels import InputCodes
from penstock.quant import QuantizedWeight, Scheme


def draw_weight(
    num_outputs: int, num_inputs: int, scheme: Scheme, *, dtype: torch.dtype = torch.float16, least_zero: int = 0
) -> QuantizedWeight:
    """Return codes, zeros from ``least_zero`` on and, where the scheme has an order, groups of every value there is."""
    num_groups = scheme.num_groups(num_inputs)
    size = 1 << scheme.bits
    groups = None
    if scheme.act_order:
        groups = (torch.arange(num_inputs) // (scheme.group or num_inputs))[torch.randperm(num_inputs)].int()
    is_static = scheme.activations == "static"
    return QuantizedWeight(
        scheme=scheme,
        codes=torch.randint(0, size, (num_outputs, num_inputs), dtype=torch.uint8),
        scales=((torch.rand(num_outputs, num_groups) + 0.2) / (size * num_inputs**0.5)).to(dtype),
        zeros=None
        if scheme.symmetric
        else torch.randint(least_zero, size, (num_outputs, num_groups), dtype=torch.uint8),
        groups=groups,
        inputs=InputCodes(float(torch.rand(1)), 3 if scheme.activation_zeros else 0) if is_static else None,
    )


def assert_same(found: QuantizedWeight, expected: QuantizedWeight) -> None:
    """Every field, to the last bit."""
    assert found.scheme == expected.scheme
    assert found.inputs == expected.inputs
    for name in ("codes", "scales", "zeros", "groups"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert (ours is None) is (theirs is None), name
        if ours is not None:
            torch.testing.assert_close(ours, theirs, atol=0, rtol=0)
