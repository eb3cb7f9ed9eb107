"""The layout of GPTQ checkpoints, as AutoGPTQ and GPTQModel write them.

https://github.com/ModelCloud/GPTQModel: codes of 2, 3, 4 or 8 bits in words along the inputs, zeros in words along the
outputs. In version 1 of the format zeros are stored less one. N outputs, K inputs, G groups, b bits.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from penstock.errors import InvalidSetting
from penstock.quant.codes import QuantizedWeight, Scheme
from penstock.quant.words import pack_words, unpack_words

BITS = (2, 3, 4, 8)


def pack(weight: QuantizedWeight, *, version: int = 1) -> dict[str, Tensor]:
    """Return a projection's tensors by the last part of their names, in the format's ``version``, 1 or 2.

    ``qweight`` [ceil(K b / 32), N] int32, ``qzeros`` [G, ceil(N b / 32)] int32, ``scales`` [G, N] float16, ``g_idx``
    [K] int32. Scales that float16 does not hold are rounded to it: round them before codes are chosen.
    Raises ``InvalidSetting`` for what the format cannot say.
    """
    scheme = weight.scheme
    if scheme.bits not in BITS or scheme.activations is not None:
        raise InvalidSetting(
            f"GPTQ has weights of {', '.join(map(str, BITS))} bits and activations as they are; write "
            "compressed-tensors instead"
        )
    zeros = torch.full(weight.scales.shape, scheme.middle, dtype=torch.uint8) if weight.zeros is None else weight.zeros
    if version == 1:
        if not zeros.all():
            raise InvalidSetting("GPTQ's version 1 has no zero of 0, and readers disagree on it; write version 2")
        zeros = zeros - 1
    return {
        "qweight": pack_words(weight.codes, scheme.bits).T.contiguous(),
        "qzeros": pack_words(zeros.T.contiguous(), scheme.bits),
        "scales": half(weight.scales).T.contiguous(),
        "g_idx": weight.group_of_inputs().int(),
    }


def unpack(
    tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int], *, version: int = 1
) -> QuantizedWeight:
    """Return the weight of ``shape`` [N, K] that ``tensors``, named as ``pack`` names them, hold.

    What the tensors say counts, not ``scheme``, as to symmetry and the order of groups.
    """
    num_outputs, num_inputs = shape
    codes = unpack_words(tensors["qweight"].T, scheme.bits, num_inputs)
    zeros = unpack_words(_true_zeros(tensors["qzeros"], scheme.bits, num_outputs, version), scheme.bits, num_outputs).T
    groups = tensors.get("g_idx")
    in_order = torch.arange(num_inputs) // (scheme.group or num_inputs)
    if groups is not None and torch.equal(groups.long(), in_order):
        groups = None
    return from_parts(codes, tensors["scales"].T, zeros, scheme, groups)


def from_parts(
    codes: Tensor, scales: Tensor, zeros: Tensor, scheme: Scheme, groups: Tensor | None = None
) -> QuantizedWeight:
    """Return the weight; symmetric if all ``zeros`` are in the middle, in order if ``groups`` are None."""
    symmetric = bool((zeros == scheme.middle).all())
    found = Scheme(bits=scheme.bits, group=scheme.group, symmetric=symmetric, act_order=groups is not None)
    return QuantizedWeight(
        scheme=found,
        codes=codes,
        scales=scales.contiguous(),
        zeros=None if symmetric else zeros.contiguous(),
        groups=groups,
    )


def half(scales: Tensor) -> Tensor:
    """Return ``scales`` in float16; raises ``InvalidSetting`` where it does not reach so far."""
    rounded = scales.half()
    if not rounded.isfinite().all():
        raise InvalidSetting("a scale is beyond float16, which GPTQ and AWQ keep them in; write compressed-tensors")
    return rounded


def _true_zeros(words: Tensor, bits: int, num_outputs: int, version: int) -> Tensor:
    """Return zeros in words as version 2 has them.

    Zeros of 0 are rare in version 1, and then GPTQModel, its one writer, borrowed from the next code of the word: words
    are added as a whole. Three bits straddle words, and it wrapped each by itself.
    """
    if version == 2:
        return words
    if bits == 3:
        return pack_words((unpack_words(words, bits, num_outputs) + 1) & 7, bits)
    one = pack_words(torch.ones(1, words.shape[1] * 32 // bits, dtype=torch.uint8), bits)
    return words + one  # int32 wraps around
