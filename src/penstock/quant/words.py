"""Codes of a few bits, one after another in 32-bit words without gaps: how GPTQ and compressed-tensors store them.

The first code takes the lowest bits of the first word; a code that does not fit goes on in the next. R rows, C codes.
"""

from collections.abc import Iterator

import numpy as np
import torch

from penstock.kernels.tensor import Tensor


def num_words(num_codes: int, bits: int) -> int:
    """Return how many words ``num_codes`` take."""
    return -(-num_codes * bits // 32)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Return [R, ceil(C * bits / 32)] int32 from ``codes`` [R, C] uint8, padded with zeros."""
    num_rows, num_codes = codes.shape
    num_eights, num_bytes = -(-num_codes // 8), num_words(num_codes, bits) * 4
    eights = np.zeros((num_rows, num_eights, 8), np.uint8)
    eights.reshape(num_rows, -1)[:, :num_codes] = codes.numpy()
    data = np.zeros((num_rows, num_eights, bits), np.uint8)
    for place, first, shift in _places(bits):
        data[..., first] |= eights[..., place] << np.uint8(shift)
        if shift + bits > 8:
            data[..., first + 1] |= eights[..., place] >> np.uint8(8 - shift)
    words = np.zeros((num_rows, num_bytes), np.uint8)
    packed = data.reshape(num_rows, -1)[:, :num_bytes]
    words[:, : packed.shape[1]] = packed
    return torch.from_numpy(words.view("<i4"))


def unpack_words(words: Tensor, bits: int, num_codes: int) -> Tensor:
    """Return the first ``num_codes`` codes [R, C] uint8 of ``words`` [R, W] int32.

    Raises ValueError if there are fewer.
    """
    if words.dtype is not torch.int32 or words.ndim != 2 or not 0 <= num_codes * bits <= words.shape[1] * 32:
        raise ValueError(f"{num_codes} codes of {bits} bits are not in {list(words.shape)} words of {words.dtype}")
    data = words.contiguous().numpy().astype("<i4", copy=False).view(np.uint8)
    num_rows, num_eights = len(data), -(-num_codes // 8)
    data = np.pad(data, ((0, 0), (0, max(0, num_eights * bits - data.shape[1]))))[:, : num_eights * bits]
    data = data.reshape(num_rows, num_eights, bits)
    eights = np.empty((num_rows, num_eights, 8), np.uint8)
    for place, first, shift in _places(bits):
        code = data[..., first] >> np.uint8(shift)
        if shift + bits > 8:
            code |= data[..., first + 1] << np.uint8(8 - shift)
        np.bitwise_and(code, np.uint8((1 << bits) - 1), out=eights[..., place])
    return torch.from_numpy(np.ascontiguousarray(eights.reshape(num_rows, -1)[:, :num_codes]))


def _places(bits: int) -> Iterator[tuple[int, int, int]]:
    """Yield, for each of eight codes in so many bytes as a code has bits, the byte and the bit it begins at."""
    for place in range(8):
        yield place, *divmod(place * bits, 8)
