"""Dtypes, by the names that checkpoints' configurations have for them. No torch, but where it is asked for."""

from functools import cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
"""Of each dtype that weights, activations or a cache may have"""


def torch_dtype(name: str) -> "torch.dtype":
    """Return what torch calls ``name``."""
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


@cache
def dtype_name(dtype: "torch.dtype | str") -> str:
    """Return the name of torch's ``dtype``, or of one that is named already."""
    return str(dtype).removeprefix("torch.")


def rounded(value: float, dtype: str) -> float:
    """Return the number nearest to ``value`` that a ``dtype`` of floats has."""
    if dtype == "float16":
        return float(np.float16(value))
    single = np.float32(value)
    if dtype == "float32":
        return float(single)
    # The upper half of its bits, the lower one rounded to even.
    bits = int(single.view(np.uint32))
    bits += 0x7FFF + (bits >> 16 & 1)
    return float(np.uint32(bits & 0xFFFF0000).view(np.float32))
