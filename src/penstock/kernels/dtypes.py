"""Dtypes, by the names that checkpoints' configurations have for them. No torch, but where it is asked for."""

from functools import cache
from typing import TYPE_CHECKING

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
