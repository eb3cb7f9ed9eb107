"""Codes of a few bits, one after another in 32-bit words without gaps: how GPTQ and compressed-tensors store them.

The first code takes the lowest bits of the first word; a code that does not fit goes on in the next. R rows, C codes.
"""

import numpy as np
import torch
from torch import Tensor


def num_words(num_codes: int, bits: int) -> int:
    """Return how many words ``num_codes`` take."""
    return -(-num_codes * bits // 32)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Return [R, ceil(C * bits / 32)] int32 from ``codes`` [R, C] uint8, padded with zeros."""
    num_rows, num_codes = codes.shape
    if bits == 8:
        packed = codes.numpy()
    elif bits == 4:
        even = np.pad(codes.numpy(), ((0, 0), (0, num_codes % 2)))
        packed = even[:, ::2] | (even[:, 1::2] << 4)
    else:
        each = np.unpackbits(codes.numpy()[..., None], axis=2, bitorder="little", count=bits)
        packed = np.packbits(each.reshape(num_rows, -1), axis=1, bitorder="little")
    words = np.zeros((num_rows, num_words(num_codes, bits) * 4), np.uint8)
    words[:, : packed.shape[1]] = packed
    return torch.from_numpy(words.view("<i4"))


def unpack_words(words: Tensor, bits: int, num_codes: int) -> Tensor:
    """Return the first ``num_codes`` codes [R, C] uint8 of ``words`` [R, W] int32.

    Raises ValueError if there are fewer.
    """
    if words.dtype is not torch.int32 or words.ndim != 2 or not 0 <= num_codes * bits <= words.shape[1] * 32:
        raise ValueError(f"{num_codes} codes of {bits} bits are not in {list(words.shape)} words of {words.dtype}")
    data = words.contiguous().numpy().astype("<i4", copy=False).view(np.uint8)
    if bits == 8:
        codes = data
    elif bits == 4:
        codes = np.stack([data & 15, data >> 4], axis=2).reshape(len(data), -1)
    else:
        each = np.unpackbits(data, axis=1, bitorder="little", count=num_codes * bits)
        codes = np.packbits(each.reshape(len(data), num_codes, bits), axis=2, bitorder="little")[..., 0]
    return torch.from_numpy(np.ascontiguousarray(codes[:, :num_codes]))
