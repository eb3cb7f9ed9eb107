"""Packing is undone exactly, and gives what other packages give."""

from dataclasses import replace

import pytest
import torch
from compressed_tensors.compressors import IntQuantizationCompressor, PackedQuantizationCompressor
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import Tensor

from penstock.errors import InvalidSetting
from penstock.quant import Scheme, awq, compressed_tensors, dequantize, gptq
from penstock.quant.words import num_words, pack_words, unpack_words
from tests.quant.drawn import assert_same, draw_weight

SIZES = [(1, 1), (3, 7), (8, 32), (31, 65), (40, 96), (64, 300)]
"""(N, K)"""


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("num_codes", [1, 7, 8, 31, 32, 33, 100])
def test_words_are_one_row_of_bits(bits: int, num_codes: int) -> None:
    codes = torch.randint(0, 1 << bits, (5, num_codes), dtype=torch.uint8)
    words = pack_words(codes, bits)
    assert words.shape == (5, num_words(num_codes, bits))
    for row, packed in zip(codes.tolist(), words.tolist(), strict=True):
        number = sum(code << (i * bits) for i, code in enumerate(row))
        assert number == sum((word & 0xFFFFFFFF) << (i * 32) for i, word in enumerate(packed))
    assert torch.equal(unpack_words(words, bits, num_codes), codes)


SCHEMES = [
    Scheme(bits=bits, group=group, symmetric=symmetric)
    for bits in (2, 3, 4, 5, 8)
    for group in (None, 32)
    for symmetric in (True, False)
]
ORDERED = Scheme(bits=4, group=32, act_order=True)
ROUNDED = [
    Scheme(bits=8, activations="dynamic"),
    Scheme(bits=8, activations="static"),
    Scheme(bits=8, symmetric=False, activations="dynamic"),
    Scheme(bits=4, group=32, activations="dynamic"),
    Scheme(bits=8, activations="static", activation_zeros=True),
]


@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("scheme", [*SCHEMES, ORDERED, *ROUNDED], ids=str)
def test_compressed_tensors_there_and_back(scheme: Scheme, shape: tuple[int, int]) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        weight = draw_weight(*shape, scheme, dtype=dtype)
        tensors = compressed_tensors.pack(weight)
        assert_same(compressed_tensors.unpack(tensors, scheme), weight)


def their_scheme(scheme: Scheme) -> QuantizationScheme:
    strategy = "channel" if scheme.group is None else "group"
    weights = QuantizationArgs(
        num_bits=scheme.bits, symmetric=scheme.symmetric, strategy=strategy, group_size=scheme.group
    )
    activations = None if scheme.activations is None else QuantizationArgs(strategy="token", dynamic=True)
    return QuantizationScheme(targets=["Linear"], weights=weights, input_activations=activations)


@pytest.mark.parametrize("shape", [(31, 64), (40, 96)], ids=str)
@pytest.mark.parametrize("scheme", [*SCHEMES, ROUNDED[0], ROUNDED[2]], ids=str)
def test_compressed_tensors_package_agrees(scheme: Scheme, shape: tuple[int, int]) -> None:
    theirs: type[BaseCompressor] = (
        PackedQuantizationCompressor if scheme.activations is None else IntQuantizationCompressor
    )
    weight = draw_weight(*shape, scheme, dtype=torch.float32)
    exact = dequantize(weight)
    zeros = torch.full_like(weight.scales, scheme.middle) if weight.zeros is None else weight.zeros
    signed_zeros = (zeros.short() - scheme.middle).to(torch.int8)
    state = {"weight": exact, "weight_scale": weight.scales, "weight_zero_point": signed_zeros}
    # What it makes of the same weight is what we write; and what it reads of that is the weight.
    packed: dict[str, Tensor] = theirs.compress(state, their_scheme(scheme))
    ours = compressed_tensors.pack(weight)
    assert packed.keys() == ours.keys()
    for name, tensor in ours.items():
        assert torch.equal(packed[name], tensor), name
    read: dict[str, Tensor] = theirs.decompress(ours, their_scheme(scheme))
    torch.testing.assert_close(read["weight"], exact, atol=0, rtol=0)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("scheme", [*(s for s in SCHEMES if s.bits != 5), ORDERED], ids=str)
def test_gptq_there_and_back(scheme: Scheme, shape: tuple[int, int], version: int) -> None:
    weight = draw_weight(*shape, scheme, least_zero=2 - version)
    # Few zeros may all be in the middle by chance, and few groups in order.
    if weight.zeros is not None:
        weight.zeros[0, 0] = scheme.middle + 1
    if weight.groups is not None and torch.equal(weight.groups, weight.groups.sort()[0]):
        weight = replace(weight, scheme=replace(scheme, act_order=False), groups=None)
    found = gptq.unpack(gptq.pack(weight, version=version), scheme, version=version)
    assert_same(found, weight)


def gptq_word(codes: list[int]) -> list[int]:
    """Thirty-two codes of three bits as GPTQModel's ``pack`` has them: ten and a piece, twice, and ten."""
    first = sum(codes[i] << (3 * i) for i in range(10)) | (codes[10] & 3) << 30
    second = codes[10] >> 2 | sum(codes[11 + i] << (3 * i + 1) for i in range(10)) | (codes[21] & 1) << 31
    third = codes[21] >> 1 | sum(codes[22 + i] << (3 * i + 2) for i in range(10))
    return [word - (1 << 32) if word >= 1 << 31 else word for word in (first, second, third)]


def test_gptq_by_hand() -> None:
    weight = draw_weight(8, 32, Scheme(bits=4, group=16, symmetric=False), least_zero=1)
    tensors = gptq.pack(weight)
    assert weight.zeros is not None
    for n in range(8):
        for k in range(32):
            assert tensors["qweight"][k // 8, n] >> (k % 8 * 4) & 15 == weight.codes[n, k]
        for g in range(2):
            assert (tensors["qzeros"][g, 0] >> (n * 4) & 15) + 1 == weight.zeros[n, g]
            assert tensors["scales"][g, n] == weight.scales[n, g]
    assert tensors["g_idx"].tolist() == [0] * 16 + [1] * 16
    narrow = draw_weight(5, 32, Scheme(bits=3))
    words = gptq.pack(narrow)["qweight"]
    for n in range(5):
        assert words[:, n].tolist() == gptq_word(narrow.codes[n].tolist())


def test_gptq_zeros_that_borrowed() -> None:
    """GPTQModel makes version 1 of version 2 by subtracting from whole words."""
    scheme = Scheme(bits=4, group=32, symmetric=False)
    weight = draw_weight(16, 64, scheme)
    assert weight.zeros is not None
    weight.zeros[::3] = 0
    tensors = gptq.pack(weight, version=2)
    tensors["qzeros"] = tensors["qzeros"] - 0x11111111
    assert_same(gptq.unpack(tensors, scheme, version=1), weight)
    with pytest.raises(InvalidSetting, match=r"no zero of 0.*version 2"):
        gptq.pack(weight)


@pytest.mark.parametrize("shape", [(8, 32), (40, 96), (64, 320)], ids=str)
@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.bits == 4], ids=str)
def test_awq_there_and_back(scheme: Scheme, shape: tuple[int, int]) -> None:
    weight = draw_weight(*shape, scheme)
    if weight.zeros is not None:
        weight.zeros[0, 0] = 0
    assert_same(awq.unpack(awq.pack(weight), scheme), weight)


def test_awq_by_hand() -> None:
    weight = draw_weight(16, 32, Scheme(bits=4, group=16, symmetric=False))
    tensors = awq.pack(weight)
    assert weight.zeros is not None
    for i, place in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
        for word in range(2):
            n = word * 8 + place
            assert (tensors["qweight"][:, word] >> (4 * i) & 15).tolist() == weight.codes[n].tolist()
            assert (tensors["qzeros"][:, word] >> (4 * i) & 15).tolist() == weight.zeros[n].tolist()
    assert torch.equal(tensors["scales"], weight.scales.T)


def test_what_a_layout_cannot_say_is_refused() -> None:
    with pytest.raises(InvalidSetting, match="2, 3, 4, 8 bits"):
        gptq.pack(draw_weight(8, 32, Scheme(bits=5)))
    with pytest.raises(InvalidSetting, match="activations as they are"):
        gptq.pack(draw_weight(8, 32, ROUNDED[0]))
    with pytest.raises(InvalidSetting, match="4 bits in groups of neighbours"):
        awq.pack(draw_weight(8, 64, ORDERED))
    with pytest.raises(InvalidSetting, match="outputs by eights"):
        awq.pack(draw_weight(9, 32, Scheme(bits=4, group=32)))
    large = draw_weight(8, 32, Scheme(bits=4), dtype=torch.float32)
    large.scales[0] = 1e6
    with pytest.raises(InvalidSetting, match="beyond float16"):
        gptq.pack(large)


def test_dequantized_codes() -> None:
    weight = draw_weight(3, 7, Scheme(bits=4, group=2, symmetric=False, act_order=True))
    assert weight.zeros is not None
    assert weight.groups is not None
    for n in range(3):
        for k in range(7):
            g = int(weight.groups[k])
            expected = float(weight.scales[n, g]) * (int(weight.codes[n, k]) - int(weight.zeros[n, g]))
            assert dequantize(weight)[n, k] == pytest.approx(expected, rel=1e-6)
