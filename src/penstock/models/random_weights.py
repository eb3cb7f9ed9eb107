"""Weights that no checkpoint holds: as large and as hard to compute with as real ones, made in memory."""

import zlib

import numpy as np
import torch

from penstock.kernels import Ops
from penstock.kernels.dtypes import torch_dtype
from penstock.kernels.tensor import Tensor
from penstock.models.config import ModelConfig
from penstock.models.decoder import DecoderModel

_POOL_SIZE = 1_048_573
"""The greatest prime below 2^20: no row length divides it, so the rows that are cut from it one after another begin
at different places, and a matrix has no two rows alike (nor two logits, which would tie)."""


class RandomWeights:
    """A ``TensorSource`` whose tensors depend on their name and shape alone.

    Drawing half a billion normal numbers takes seconds, so they come from one small pool, over and over. Matrices
    have a standard deviation of 1 / sqrt(inputs): a product then has the spread of what went in, activations neither
    vanish nor overflow however many layers follow, and logits are spread by about one. Norms are one, biases zero.
    """

    def __init__(self) -> None:
        self._pool = torch.from_numpy(np.random.default_rng(0).standard_normal(_POOL_SIZE, dtype=np.float32))

    def take(self, name: str, shape: tuple[int, ...], dtype: str) -> Tensor:
        """Return a new tensor."""
        if len(shape) == 1:
            fill = torch.zeros if name.endswith("bias") else torch.ones
            return fill(shape, dtype=torch_dtype(dtype))
        tensor = torch.empty(shape, dtype=torch_dtype(dtype))
        pool = (self._pool * shape[-1] ** -0.5).to(tensor.dtype).roll(zlib.crc32(name.encode()) % _POOL_SIZE)
        flat = tensor.view(-1)
        for start in range(0, len(flat), _POOL_SIZE):
            part = flat[start : start + _POOL_SIZE]
            part.copy_(pool[: len(part)])
        return tensor

    def take_codes(self, module: str, shape: tuple[int, int]) -> None:
        """Nothing is quantized."""


def make_random_model(
    config: ModelConfig, dtype: str, kv_dtype: str, ops: Ops, *, adaptable: bool = False
) -> DecoderModel:
    """Return a model of this shape, the same one every time."""
    with torch.inference_mode():
        return DecoderModel(config, RandomWeights(), dtype, kv_dtype, ops, adaptable=adaptable)


class _Sizes:
    """A ``TensorSource`` of tensors without contents."""

    def take(self, name: str, shape: tuple[int, ...], dtype: str) -> Tensor:
        return torch.empty(shape, dtype=torch_dtype(dtype), device="meta")

    def take_codes(self, module: str, shape: tuple[int, int]) -> None:
        return None


def count_random_parameters(config: ModelConfig) -> int:
    """Return how many parameters ``make_random_model`` will hold, without making them."""
    from penstock.kernels import ReferenceOps

    return DecoderModel(config, _Sizes(), "float32", "float32", ReferenceOps()).num_parameters
