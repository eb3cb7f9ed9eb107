"""ggml's formats of weights, to float32 exactly as ggml's own reference computes them.

The formats are those of ggml-quants.c (https://github.com/ggml-org/ggml). B blocks; a block of the older formats holds
32 weights, one of the K formats 256 in eight or sixteen groups that have scales of their own.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

_CHUNK_BLOCKS = 1 << 15
"""Blocks at a time: what is computed on the way takes several times what goes in."""


def _half(data: Bytes) -> Floats:
    """Return [B, 1] from two bytes each."""
    return np.ascontiguousarray(data).view(np.float16).astype(np.float32)


def _nibbles(data: Bytes) -> Bytes:
    """Return [B, 2n] from [B, n]: the lower halves of all bytes, then the upper ones."""
    return np.concatenate([data & 15, data >> 4], axis=1)


def _fifth_bits(data: Bytes) -> Bytes:
    """Return [B, 32] of the values 0 and 16, from 32 bits in four bytes."""
    return np.unpackbits(data, axis=1, bitorder="little") << np.uint8(4)


def _f32(blocks: Bytes) -> Floats:
    return blocks.view(np.float32)


def _f16(blocks: Bytes) -> Floats:
    return blocks.view(np.float16).astype(np.float32)


def _bf16(blocks: Bytes) -> Floats:
    return (blocks.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _q4_0(blocks: Bytes) -> Floats:
    return _half(blocks[:, :2]) * (_q4_0_codes(blocks).astype(np.float32) - 8)


def _q4_1(blocks: Bytes) -> Floats:
    return _half(blocks[:, :2]) * _nibbles(blocks[:, 4:]).astype(np.float32) + _half(blocks[:, 2:4])


def _q5_0(blocks: Bytes) -> Floats:
    return _half(blocks[:, :2]) * (_q5_0_codes(blocks).astype(np.float32) - 16)


def _q5_1(blocks: Bytes) -> Floats:
    codes = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])
    return _half(blocks[:, :2]) * codes.astype(np.float32) + _half(blocks[:, 2:4])


def _q8_0(blocks: Bytes) -> Floats:
    return np.ascontiguousarray(blocks[:, 2:]).view(np.int8).astype(np.float32) * _half(blocks[:, :2])


def _scales_and_minima(data: Bytes) -> tuple[Floats, Floats]:
    """Return two [B, 8] from twelve bytes: six bits each, the upper two of the last four in the first eight bytes."""
    low, middle, high = data[:, :4], data[:, 4:8], data[:, 8:]
    scales = np.concatenate([low & 63, (high & 15) | ((low >> 2) & 48)], axis=1)
    minima = np.concatenate([middle & 63, (high >> 4) | ((middle >> 2) & 48)], axis=1)
    return scales.astype(np.float32), minima.astype(np.float32)


def _groups(blocks: Bytes, codes: Bytes) -> Floats:
    """Return [B, 256] of codes [B, 8, 32] whose groups have a scale and a minimum."""
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    scales, minima = _half(blocks[:, :2]) * scales, _half(blocks[:, 2:4]) * minima
    return (scales[..., None] * codes.astype(np.float32) - minima[..., None]).reshape(-1, 256)


def _paired_groups(data: Bytes) -> Bytes:
    """Return [B, 8, 32] from 128 bytes: 32 bytes hold one group in their lower halves and the next in the upper."""
    pairs = data.reshape(-1, 4, 1, 32)
    return np.concatenate([pairs & 15, pairs >> 4], axis=2).reshape(-1, 8, 32)


def _q4_k(blocks: Bytes) -> Floats:
    return _groups(blocks, _paired_groups(blocks[:, 16:]))


def _q5_k(blocks: Bytes) -> Floats:
    # Byte i of 32 has the fifth bit of weight i of group g at its bit g.
    fifth = (blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]) & np.uint8(1)
    return _groups(blocks, _paired_groups(blocks[:, 48:]) | (fifth << np.uint8(4)))


def _q6_k(blocks: Bytes) -> Floats:
    halves = blocks[:, :128].reshape(-1, 2, 1, 64)
    low = np.concatenate([halves & 15, halves >> 4], axis=2).reshape(-1, 2, 4, 32)
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3
    codes: Floats = (low | (high << 4)).astype(np.float32).reshape(-1, 16, 16) - 32
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32) * _half(blocks[:, 208:])
    weights: Floats = scales[..., None] * codes
    return weights.reshape(-1, 256)


def _q4_0_codes(blocks: Bytes) -> Bytes:
    return _nibbles(blocks[:, 2:])


def _q5_0_codes(blocks: Bytes) -> Bytes:
    return _nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])


def _q8_0_codes(blocks: Bytes) -> Bytes:
    return blocks[:, 2:] ^ np.uint8(128)


@dataclass(frozen=True, slots=True)
class Codes:
    """Codes without sign of formats whose weights are a block's scale times a code less ``2 ** (bits - 1)``."""

    bits: int
    to_codes: Callable[[Bytes], Bytes]
    """[B, block_bytes] to [B, block_elements]"""


@dataclass(frozen=True, slots=True)
class Format:
    """How weights are written."""

    name: str
    block_elements: int
    block_bytes: int
    to_floats: Callable[[Bytes], Floats]
    """[B, block_bytes] to [B, block_elements]"""
    codes: Codes | None = None
    """None where a scale and a code do not say it all"""


FORMATS = {
    0: Format("F32", 1, 4, _f32),
    1: Format("F16", 1, 2, _f16),
    2: Format("Q4_0", 32, 18, _q4_0, Codes(4, _q4_0_codes)),
    3: Format("Q4_1", 32, 20, _q4_1),
    6: Format("Q5_0", 32, 22, _q5_0, Codes(5, _q5_0_codes)),
    7: Format("Q5_1", 32, 24, _q5_1),
    8: Format("Q8_0", 32, 34, _q8_0, Codes(8, _q8_0_codes)),
    12: Format("Q4_K", 256, 144, _q4_k),
    13: Format("Q5_K", 256, 176, _q5_k),
    14: Format("Q6_K", 256, 210, _q6_k),
    30: Format("BF16", 1, 2, _bf16),
}
"""By ggml's number."""


def dequantize(data: Bytes, number: int) -> Floats:
    """Return the weights [num_elements] that ``data`` [num_bytes] holds in format ``number``."""
    form = FORMATS[number]
    blocks = data.reshape(-1, form.block_bytes)
    out = np.empty((len(blocks), form.block_elements), dtype=np.float32)
    step = _CHUNK_BLOCKS * (256 // form.block_elements)
    # A damaged scale may be infinite, and infinity by 0 is not a number: the runner reports such logits.
    with np.errstate(invalid="ignore", over="ignore"):
        for begin in range(0, len(blocks), step):
            out[begin : begin + step] = form.to_floats(np.ascontiguousarray(blocks[begin : begin + step]))
    return out.reshape(-1)


def split_codes(data: Bytes, number: int) -> tuple[Bytes, NDArray[np.float16]]:
    """Return codes [num_blocks, block_elements] and scales [num_blocks] of ``data`` in a format that has ``codes``."""
    form = FORMATS[number]
    assert form.codes is not None, form.name
    blocks = data.reshape(-1, form.block_bytes)
    return form.codes.to_codes(blocks), np.ascontiguousarray(blocks[:, :2]).view(np.float16)[:, 0]
