"""The one interface between models and kernels. A backend is a final class that offers every op.

T packed tokens, N outputs, K inputs, E width, F feed-forward width, H query heads, G KV heads, D head width.
"""

from typing import Protocol

from torch import Tensor

from penstock.kernels.layout import BatchLayout, KVBlocks


class Linear(Protocol):
    """A weight prepared by a backend."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return [T, N] from ``x`` [T, K]."""


class Attention(Protocol):
    """One step's attention, for all layers that share a window."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, kv: KVBlocks, *, scale: float) -> Tensor:
        """Attend every query token to its own sequence's keys, which ``write_kv`` has stored already.

        q     [T, H, D]  activation dtype
        k, v  [T, G, D]  this step's keys and values, the same as in the cache
        kv               one layer's cache
        Returns [T, H, D] in q's dtype; softmax accumulates in float32. Cache slots that no token of a sequence
        wrote may hold anything, numbers or not, and change nothing.
        """


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

    def plan_attention(self, layout: BatchLayout, kv: KVBlocks, *, num_heads: int, window: int | None) -> Attention:
        """Work out what each sequence of a step sees, once for all layers with this ``window``.

        ``window`` is how many tokens back a token sees, itself included; None: all. ``kv`` is any layer's cache:
        shapes and dtype are taken from it.
        """
