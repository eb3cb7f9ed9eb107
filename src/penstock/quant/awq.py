"""The layout of AWQ checkpoints of version ``gemm``, as AutoAWQ writes them.

https://github.com/casper-hansen/AutoAWQ: codes of 4 bits in words along the outputs, in an order that served a GPU's
kernel. N outputs, K inputs, G groups.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from penstock.errors import InvalidSetting
from penstock.quant.codes import QuantizedWeight, Scheme
from penstock.quant.gptq import from_parts, half
from penstock.quant.words import pack_words, unpack_words

_ORDER = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
"""Which of eight outputs each of a word's codes, from the lowest, belongs to"""
_PLACE = _ORDER.argsort()


def pack(weight: QuantizedWeight) -> dict[str, Tensor]:
    """Return a projection's tensors by the last part of their names.

    ``qweight`` [K, N / 8] int32, ``qzeros`` [G, N / 8] int32, ``scales`` [G, N] float16, which scales are rounded to.
    Raises ``InvalidSetting`` for what the format cannot say.
    """
    scheme, (num_outputs, num_inputs) = weight.scheme, weight.codes.shape
    if scheme.bits != 4 or scheme.activations is not None or scheme.act_order:
        raise InvalidSetting("AWQ has weights of 4 bits in groups of neighbours; write compressed-tensors instead")
    if num_outputs % 8 or (scheme.group is not None and num_inputs % scheme.group):
        raise InvalidSetting(
            f"AWQ has whole groups and outputs by eights, and a projection has {num_inputs} inputs in groups of "
            f"{scheme.group} and {num_outputs} outputs; write compressed-tensors instead"
        )
    zeros = torch.full(weight.scales.shape, scheme.middle, dtype=torch.uint8) if weight.zeros is None else weight.zeros
    return {"qweight": _pack(weight.codes), "qzeros": _pack(zeros), "scales": half(weight.scales).T.contiguous()}


def unpack(tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]) -> QuantizedWeight:
    """Return the weight of ``shape`` [N, K] that ``tensors``, named as ``pack`` names them, hold."""
    codes, zeros = (_unpack(tensors[name]) for name in ("qweight", "qzeros"))
    assert codes.shape == shape
    return from_parts(codes, tensors["scales"].T, zeros, scheme)


def _pack(codes: Tensor) -> Tensor:
    """Return [C, N / 8] int32 from [N, C] uint8."""
    return pack_words(codes.T.reshape(-1, 8)[:, _ORDER], 4).view(codes.shape[1], -1)


def _unpack(words: Tensor) -> Tensor:
    """Return [N, C] uint8 from [C, N / 8] int32."""
    return unpack_words(words.reshape(-1, 1), 4, 8)[:, _PLACE].view(len(words), -1).T.contiguous()
