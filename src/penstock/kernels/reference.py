"""The backend of plain torch ops."""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from penstock.kernels.add.reference import add
from penstock.kernels.dtypes import torch_dtype
from penstock.kernels.embedding.reference import embed
from penstock.kernels.layer_norm.reference import layer_norm
from penstock.kernels.layout import BatchLayout
from penstock.kernels.linear.quantization import Quantization
from penstock.kernels.linear.reference import ReferenceGatedLinear, ReferenceLinear
from penstock.kernels.native.array import Array
from penstock.kernels.ops import CacheShapes, Embedding, Linear
from penstock.kernels.paged_attention.reference import plan_attention
from penstock.kernels.rms_norm.reference import rms_norm
from penstock.kernels.rope_angles.reference import rope_angles
from penstock.kernels.rope_write_kv.reference import rope_write_kv


class ReferenceOps:
    """The oracle in tests, and what runs in any dtype where nothing faster was made."""

    name = "reference"
    prepare_linear = staticmethod(ReferenceLinear)
    prepare_gated_linear = staticmethod(ReferenceGatedLinear)
    add = staticmethod(add)
    rms_norm = staticmethod(rms_norm)
    layer_norm = staticmethod(layer_norm)
    rope_angles = staticmethod(rope_angles)
    rope_write_kv = staticmethod(rope_write_kv)
    plan_attention = staticmethod(plan_attention)

    @staticmethod
    def prepare_embedding(
        table: Callable[[], Tensor], dtype: str, *, scale: float = 1.0, tied: Linear | None = None
    ) -> Embedding:
        """Keep one table."""
        weight = tied.weight if isinstance(tied, ReferenceLinear) else table()
        return partial(embed, table=weight, dtype=torch_dtype(dtype), scale=scale)

    @staticmethod
    def record(
        first: Callable[[Tensor, BatchLayout], tuple[Tensor, ...]],
        rest: Callable[..., Tensor],
        head: Callable[[Tensor], Tensor],
        block_size: int,
    ) -> None:
        """Return nothing: torch's ops are called one by one."""

    @staticmethod
    def form_of_codes(bits: int, group: int | None, *, int8_activations: bool) -> Quantization | None:
        """Return None: this backend computes with floats."""
        return None

    @staticmethod
    def activation_dtype(weights_dtype: str) -> str:
        """Return the weights' own."""
        return weights_dtype

    @staticmethod
    def own(array: Array) -> Tensor:
        """Return a tensor."""
        return array.torch()

    @staticmethod
    def cache_shapes(num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> CacheShapes:
        """Return keys and values [N, P, G, D], scales [N, P, G]."""
        tokens = (num_blocks, block_size, num_kv_heads)
        return CacheShapes((*tokens, head_dim), (*tokens, head_dim), tokens)
