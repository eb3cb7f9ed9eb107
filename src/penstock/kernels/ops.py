"""The one interface between models and kernels. A backend is a final class that offers every op.

T packed tokens, N outputs, K inputs, E width, F feed-forward width, H query heads, G KV heads, D head width, P tokens
per block.
"""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from penstock.kernels.layout import BatchLayout, KVBlocks
from penstock.kernels.linear.quantization import Quantization, Stacked, WeightCodes
from penstock.kernels.native.array import Array
from penstock.kernels.sampling.rows import DrawRow
from penstock.kernels.tensor import Tensor


class Linear(Protocol):
    """A weight prepared by a backend."""

    def __call__(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """Return [T, N] from ``x`` [T, K], plus ``added`` [T, N], which may be overwritten with it."""


Embedding = Callable[[Tensor], Tensor]
"""From token ids [T] int64 to their vectors [T, E]; raises ``IndexError`` for a token that there is none of."""


class Attention(Protocol):
    """One step's attention, for all layers that share a window."""

    def __call__(self, q: Tensor, kv: KVBlocks, *, scale: float) -> Tensor:
        """Attend every query token to its own sequence's keys, this step's included, which are in the cache already.

        A token sees itself and what is before it, or as much as ``BatchLayout.visible`` says.


        q   [T, H, D]  activation dtype
        kv             one layer's cache
        Returns [T, H, D] in q's dtype; softmax accumulates in float32. Cache slots that no token of a sequence
        wrote may hold anything, numbers or not, and change nothing.
        """


class Replay(Protocol):
    """A model's forward pass over one cache, as a backend repeats it."""

    def __call__(
        self,
        token_ids: list[int],
        query_lens: list[int],
        context_lens: list[int],
        tables: "list[array[int]]",
        table_starts: list[int],
        position_offsets: list[int] | None = None,
        rows: list[int] | None = None,
        *,
        to_logits: bool = False,
    ) -> npt.NDArray[np.float32] | None:
        """Return the hidden states [T, E] of ``token_ids``, valid until the next call; writes the cache.

        With ``rows`` [R], any of the T, those alone: [R, E]. ``to_logits``: what the head makes of them, [R, V],
        valid as long, which may be overwritten.
        ``position_offsets`` are what each sequence's new tokens, all of them text, add to their places in it to get
        their positions, on every axis; None: nothing. The others are what ``BatchLayout.pack`` takes. To the last bit
        they are what the pass itself gives. None, and nothing done, for a step or a pass that cannot be repeated.
        """

    def draw(
        self,
        token_ids: list[int],
        context_lens: list[int],
        tables: "list[array[int]]",
        table_starts: list[int],
        position_offsets: list[int] | None,
        rows: Sequence[DrawRow],
        *,
        goes_on: bool,
    ) -> list[int] | None:
        """Return the tokens drawn by ``rows`` [S] after a step of one token for each sequence; -1 where there is none.

        If it ``goes_on``, the step with these tokens may have begun when this returns; the next call takes it up where
        it is for the same step, and else gives it up. Its keys and values are written to what the tables have beyond
        ``context_lens``. None, and nothing done, where that cannot be.
        """

    def stop(self) -> None:
        """Give up a step that nobody asked for yet. Needed before anything else touches the cache."""


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """Norms of each query and key head before rotation."""

    q: Tensor
    """[D]"""
    k: Tensor
    """[D]"""
    eps: float


class CacheShapes(NamedTuple):
    """The shapes of ``KVBlocks``' tensors."""

    k: tuple[int, ...]
    v: tuple[int, ...]
    scales: tuple[int, ...]
    """Of keys' and of values' scales each"""


class Ops(Protocol):
    """What a model's forward pass is written in. Each op's contract stands in its folder's reference."""

    @property
    def name(self) -> str:
        """Which kernels these are: an instruction set's, or reference."""

    def activation_dtype(self, weights_dtype: str) -> str:
        """Return what activations are computed in beside weights of ``weights_dtype``."""

    def own(self, array: Array) -> Tensor:
        """Return ``array`` as the ops take it, in the same memory."""

    def cache_shapes(self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> CacheShapes:
        """Return the shapes of one layer's cache, blocks outermost."""

    def form_of_codes(self, bits: int, group: int | None, *, int8_activations: bool) -> Quantization | None:
        """Return the form to give codes in that a checkpoint has; None if they are to be given as floats.

        ``group`` inputs share a scale, all if it is None; ``int8_activations`` is what the checkpoint is made for.
        """

    def prepare_linear(
        self,
        weight: Tensor | Stacked | WeightCodes,
        bias: Tensor | None,
        *,
        exact: bool = False,
        activation: str | None = None,
    ) -> Linear:
        """Take a weight [N, K] and bias [N] into the form this backend computes with, once at load.

        ``exact`` keeps the weight as it is, whatever precision the backend keeps others in. ``activation``, one of
        ``linear.reference.ACTIVATIONS``, is applied to the product before anything is added.
        """

    def prepare_gated_linear(
        self,
        gate: Tensor | WeightCodes,
        up: Tensor | WeightCodes,
        gate_bias: Tensor | None,
        up_bias: Tensor | None,
        *,
        activation: str = "silu",
    ) -> Linear:
        """Take two weights [F, K] and biases [F] likewise; the result computes activation(gate) * up, which is [T, F].

        ``activation`` is ``silu``, or ``gelu_tanh``: Gaussian error linear units by tanh.
        """

    def prepare_embedding(
        self, table: Callable[[], Tensor], dtype: str, *, scale: float = 1.0, tied: Linear | None = None
    ) -> Embedding:
        """Return what looks up rows of ``table()`` [V, E]; see ``embedding/reference.py``.

        ``tied`` is the product with the same weight, if there is one: where it keeps that as it came, rows are read
        from there, and nobody asks for the table.
        """

    def record(
        self,
        first: Callable[[Tensor, BatchLayout], tuple[Tensor, ...]],
        rest: Callable[..., Tensor],
        head: Callable[[Tensor], Tensor],
        block_size: int,
    ) -> Replay | None:
        """Return a faster way to do what a forward pass does in this backend's ops; None where there is none.

        ``first`` makes tensors [T, ...] of token ids [T] int64, ``rest`` the hidden states of any rows of them,
        ``head`` logits [R, V] of these.
        """

    def add(self, x: Tensor, y: Tensor, *, scale: float = 1.0) -> Tensor:
        """See ``add/reference.py``."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
        """See ``rms_norm/reference.py``."""

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """See ``layer_norm/reference.py``."""

    def rope_angles(
        self, positions: Tensor, inverse: Tensor, head_dim: int, *, factor: float = 1.0, axes: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See ``rope_angles/reference.py``."""

    def rope_write_kv(
        self,
        qkv: Tensor,
        kv: KVBlocks,
        layout: BatchLayout,
        cos: Tensor,
        sin: Tensor,
        *,
        num_heads: int,
        num_kv_heads: int,
        norms: HeadNorms | None,
    ) -> Tensor:
        """See ``rope_write_kv/reference.py``; ``qkv`` may be overwritten."""

    def plan_attention(
        self,
        layout: BatchLayout,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        window: int | None,
        score_cap: float | None = None,
    ) -> Attention:
        """Work out what each sequence of a step sees, once for all layers with this ``window``.

        ``window`` is how many tokens back a token sees, itself included; None: all. With a ``score_cap`` each score s
        becomes cap * tanh(s / cap).
        """
