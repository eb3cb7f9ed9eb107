"""The layout of compressed-tensors, which llm-compressor writes and vLLM reads.

https://github.com/vllm-project/compressed-tensors: *pack-quantized* keeps codes of 2 to 8 bits in words along the
inputs; *int-quantized* keeps them as signed bytes, and is used where activations are rounded too. N outputs, K inputs,
G groups, b bits.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from penstock.errors import InvalidSetting
from penstock.quant.codes import QuantizedWeight, Scheme
from penstock.quant.words import pack_words, unpack_words


def pack(weight: QuantizedWeight) -> dict[str, Tensor]:
    """Return a projection's tensors by the last part of their names.

    Rounded activations:  ``weight`` [N, K] int8, ``weight_scale`` and ``weight_zero_point`` [N, G] int8, and for static
    ones ``input_scale`` and ``input_zero_point`` [1].
    Weights alone: ``weight_packed`` [N, ceil(K b / 32)] int32, ``weight_scale``, ``weight_shape`` [2] int64,
    ``weight_zero_point`` [ceil(N b / 32), G] int32, and ``weight_g_idx`` [K] int32.
    """
    scheme, zeros = weight.scheme, weight.zeros
    tensors = {"weight_scale": weight.scales.contiguous()}
    if scheme.activations is None:
        tensors["weight_packed"] = pack_words(weight.codes, scheme.bits)
        tensors["weight_shape"] = torch.tensor(weight.codes.shape)
        if zeros is not None:
            tensors["weight_zero_point"] = pack_words(zeros.T.contiguous(), scheme.bits).T.contiguous()
        if weight.groups is not None:
            tensors["weight_g_idx"] = weight.groups.int()
        return tensors
    if weight.groups is not None:
        raise InvalidSetting("compressed-tensors has no activations of 8 bits beside groups in order of activations")
    tensors["weight"] = _signed(weight.codes, scheme)
    if zeros is not None:
        tensors["weight_zero_point"] = _signed(zeros, scheme)
    if weight.input_scale is not None:
        tensors["input_scale"] = weight.input_scale
    if weight.input_zero is not None:
        tensors["input_zero_point"] = weight.input_zero
    return tensors


def unpack(tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]) -> QuantizedWeight:
    """Return the weight of ``shape`` [N, K] that ``tensors``, named as ``pack`` names them, hold."""
    zeros = tensors.get("weight_zero_point")
    if "weight_packed" in tensors:
        codes = unpack_words(tensors["weight_packed"], scheme.bits, shape[1])
        zeros = None if zeros is None else unpack_words(zeros.T, scheme.bits, shape[0]).T.contiguous()
    else:
        codes = _unsigned(tensors["weight"], scheme)
        zeros = None if zeros is None else _unsigned(zeros, scheme).view(tensors["weight_scale"].shape)
    return QuantizedWeight(
        scheme=scheme,
        codes=codes,
        # A scale for the whole tensor is one for each output.
        scales=tensors["weight_scale"].reshape(-1, scheme.num_groups(shape[1])).expand(shape[0], -1),
        zeros=None if scheme.symmetric else zeros,
        groups=tensors.get("weight_g_idx"),
        input_scale=tensors.get("input_scale"),
        input_zero=tensors.get("input_zero_point"),
    )


def _signed(codes: Tensor, scheme: Scheme) -> Tensor:
    return (codes.short() - scheme.middle).to(torch.int8)


def _unsigned(codes: Tensor, scheme: Scheme) -> Tensor:
    return (codes.short() + scheme.middle).to(torch.uint8)
