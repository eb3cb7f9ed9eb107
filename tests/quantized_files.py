"""Tiny checkpoints quantized by plain rounding, each beside the floats its codes stand for."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from penstock.kernels import InputCodes
from penstock.models.weights import Weights
from penstock.quant import QuantizedWeight, Scheme
from penstock.quant.writing import widen, write_checkpoint

PROJECTIONS = ("_proj", "lm_head", ".w1", ".w2", ".w3")

SchemeOf = Callable[[str], Scheme | None]
"""A projection's name to how it is quantized; None: it is not"""


def quantize_weight(weight: Tensor, scheme: Scheme) -> QuantizedWeight:
    """Round ``weight`` [N, K] to codes; with an order of groups, one that depends on K alone."""
    num_outputs, num_inputs = weight.shape
    num_groups = scheme.num_groups(num_inputs)
    groups = torch.arange(num_inputs) // (scheme.group or num_inputs)
    if scheme.act_order:
        groups = groups[torch.randperm(num_inputs, generator=torch.Generator().manual_seed(num_inputs))]
    weight = weight.float()
    least, most = torch.zeros(num_outputs, num_groups), torch.zeros(num_outputs, num_groups)
    for group in range(num_groups):
        least[:, group], most[:, group] = weight[:, groups == group].aminmax(dim=1)
    if scheme.symmetric:
        most = torch.maximum(most, -least)
        least = -most
    scales = ((most - least) / (2**scheme.bits - 1)).half()
    zeros = (-least / scales.float()).round().clamp(1, 2**scheme.bits - 1)
    if scheme.symmetric:
        zeros = torch.full_like(zeros, scheme.middle)
    codes = (weight / scales.float()[:, groups] + zeros[:, groups]).round().clamp(0, 2**scheme.bits - 1)
    return QuantizedWeight(
        scheme=scheme,
        codes=codes.to(torch.uint8),
        scales=scales,
        zeros=None if scheme.symmetric else zeros.to(torch.uint8),
        groups=groups.int() if scheme.act_order else None,
        inputs=InputCodes(0.05, -20 if scheme.activation_zeros else 0) if scheme.activations == "static" else None,
    )


def quantize_checkpoint(
    checkpoint: Path, directory: Path, scheme_of: SchemeOf, layout: str = "compressed-tensors"
) -> tuple[Path, Path]:
    """Write ``checkpoint`` in codes, and as the floats that those stand for, below ``directory``; return both."""

    def weights(source: Weights) -> Iterator[tuple[str, QuantizedWeight | Tensor]]:
        for name in source:
            module, tensor = name.removesuffix(".weight"), source.read(name)
            scheme = scheme_of(module) if tensor.ndim == 2 and module.endswith(PROJECTIONS) else None
            yield (name, tensor) if scheme is None else (module, quantize_weight(tensor, scheme))

    coded, plain = directory / "coded", directory / "plain"
    with Weights(checkpoint) as source:
        write_checkpoint(coded, checkpoint, weights(source), layout)
    with Weights(coded) as stored:
        assert stored.quantized is not None
        write_checkpoint(plain, coded, widen(stored, stored.quantized, torch.float32))
    return coded, plain


def all_alike(scheme: Scheme) -> SchemeOf:
    """Quantize what is quantized usually: all projections but the head."""
    return lambda module: None if module == "lm_head" else scheme
