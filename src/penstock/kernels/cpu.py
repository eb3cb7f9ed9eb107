"""The backend for float32 on a processor: torch ops again, those that waste least there."""

import torch
from torch import Tensor

from penstock.kernels.linear.cpu import PackedLinear, is_worth_packing
from penstock.kernels.linear.reference import ReferenceLinear
from penstock.kernels.ops import Linear, Ops
from penstock.kernels.paged_attention.cpu import plan_attention
from penstock.kernels.reference import ReferenceOps
from penstock.kernels.rms_norm.reference import rms_norm
from penstock.kernels.rope.reference import apply_rope
from penstock.kernels.silu_mul.reference import silu_mul
from penstock.kernels.write_kv.reference import write_kv


class CPUOps:
    """Packed weights, and attention that reads the cache where it lies."""

    rms_norm = staticmethod(rms_norm)
    apply_rope = staticmethod(apply_rope)
    silu_mul = staticmethod(silu_mul)
    write_kv = staticmethod(write_kv)
    plan_attention = staticmethod(plan_attention)

    @staticmethod
    def prepare_linear(weight: Tensor, bias: Tensor | None) -> Linear:
        """Pack the weight if that pays."""
        return PackedLinear(weight, bias) if is_worth_packing(weight) else ReferenceLinear(weight, bias)


def ops_for(dtype: torch.dtype) -> Ops:
    """Return the fastest backend built for ``dtype``."""
    return CPUOps() if dtype is torch.float32 else ReferenceOps()
