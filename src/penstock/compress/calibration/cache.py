"""The scales by which a layer's keys and values fit into 8-bit floats."""

import torch
from torch import Tensor

from penstock.kernels import KVBlocks
from penstock.kernels.native.array import as_torch

_GREATEST = torch.finfo(torch.float8_e4m3fn).max
"""Of an 8-bit float with 3 bits of mantissa: its steps follow magnitudes, so that only the ends of the range matter"""


class CacheRange:
    """The greatest key and value of a layer."""

    def __init__(self) -> None:
        self._greatest = torch.zeros(2)

    def add(self, kv: KVBlocks) -> None:
        """Count what is in a cache, zeros that nobody wrote included."""
        torch.maximum(
            self._greatest, torch.stack([as_torch(values).abs().amax() for values in (kv.k, kv.v)]), out=self._greatest
        )

    def tensors(self, layer: int) -> dict[str, Tensor]:
        """Return the scales [1] of a layer, by the names that compressed-tensors gives them."""
        scales = (self._greatest / _GREATEST).clamp(min=torch.finfo(torch.float32).tiny)
        return {
            f"model.layers.{layer}.self_attn.{name}_scale": scale.reshape(1)
            for name, scale in zip("kv", scales.clone(), strict=True)
        }
