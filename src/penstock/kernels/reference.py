"""The backend of plain torch ops."""

from penstock.kernels.linear.reference import ReferenceLinear
from penstock.kernels.paged_attention.reference import plan_attention
from penstock.kernels.rms_norm.reference import rms_norm
from penstock.kernels.rope.reference import apply_rope
from penstock.kernels.silu_mul.reference import silu_mul
from penstock.kernels.write_kv.reference import write_kv


class ReferenceOps:
    """The oracle in tests, and what runs in any dtype where nothing faster was made."""

    prepare_linear = staticmethod(ReferenceLinear)
    rms_norm = staticmethod(rms_norm)
    apply_rope = staticmethod(apply_rope)
    silu_mul = staticmethod(silu_mul)
    write_kv = staticmethod(write_kv)
    plan_attention = staticmethod(plan_attention)
