"""The one interface between models and kernels. A backend is a final class that offers every op."""

from typing import Protocol

from torch import Tensor

from penstock.kernels.layout import BatchLayout, KVBlocks
from penstock.kernels.linear.reference import ReferenceLinear
from penstock.kernels.paged_attention.reference import AttentionPlan, paged_attention, plan_attention
from penstock.kernels.rms_norm.reference import rms_norm
from penstock.kernels.rope.reference import apply_rope
from penstock.kernels.silu_mul.reference import silu_mul
from penstock.kernels.write_kv.reference import write_kv


class Linear(Protocol):
    """A weight prepared by a backend."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return [T, N] from ``x`` [T, K]."""


class Ops(Protocol):
    """What a model's forward pass is written in. Each op's contract stands in its folder's reference."""

    def prepare_linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """Take a weight [N, K] and bias [N] into the form this backend computes with, once at load."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See ``rms_norm/reference.py``."""

    def apply_rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """See ``rope/reference.py``."""

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See ``silu_mul/reference.py``."""

    def write_kv(self, kv: KVBlocks, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """See ``write_kv/reference.py``."""

    def plan_attention(self, layout: BatchLayout, window: int | None) -> AttentionPlan:
        """Prepare one step's attention for all layers that share ``window``."""

    def paged_attention(
        self, q: Tensor, k: Tensor, v: Tensor, kv: KVBlocks, plan: AttentionPlan, *, scale: float
    ) -> Tensor:
        """See ``paged_attention/reference.py``."""


class ReferenceOps:
    """Plain torch: the oracle in tests, and what runs where nothing faster was built."""

    prepare_linear = staticmethod(ReferenceLinear)
    rms_norm = staticmethod(rms_norm)
    apply_rope = staticmethod(apply_rope)
    silu_mul = staticmethod(silu_mul)
    write_kv = staticmethod(write_kv)
    plan_attention = staticmethod(plan_attention)
    paged_attention = staticmethod(paged_attention)
