"""What every loaded model offers, and the cache it needs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from penstock.kernels import BatchLayout, KVBlocks, Ops, Replay
from penstock.kernels.pages import lazy_zeros
from penstock.kernels.tensor import Tensor
from penstock.models.config import ModelConfig
from penstock.models.lora import Adapted, Adapter
from penstock.models.vision.encoder import Inserted


class LanguageModel(Protocol):
    """A loaded decoder-only language model. T packed tokens, R rows, E hidden width, V vocabulary."""

    config: ModelConfig
    num_parameters: int
    dtype: str
    """What weights run in."""
    kv_dtype: str
    """What keys and values are cached in."""

    @property
    def weights_bytes(self) -> int:
        """Bytes of all parameters in the dtype they run in."""

    def new_cache(self, num_blocks: int, block_size: int) -> list[KVBlocks]:
        """Return zeroed cache blocks for each layer; memory is taken page by page as it is first written."""

    def load_adapter(self, path: Path) -> Adapter:
        """Return the LoRA adapter in directory ``path``; only where the model was loaded to be adaptable.

        Raises ``ModelUnreadable``.
        """

    def forward(
        self,
        token_ids: Tensor,
        layout: BatchLayout,
        cache: list[KVBlocks],
        adapted: Adapted = (),
        inserted: Inserted | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Return the final hidden states [T, E] of ``token_ids`` [T] int64; writes keys and values.

        With ``rows`` [R] int64, those of these tokens alone, [R, E]: the others need not go through all of the last
        layer. Rows in ``adapted`` run with their adapters; features that are ``inserted`` stand in for tokens'
        embeddings.
        """

    def replay(self, cache: list[KVBlocks], block_size: int) -> Replay | None:
        """Return a faster ``forward`` over ``cache``, for steps without adapters; None where there is none."""

    def hidden_states(
        self,
        token_ids: Tensor,
        layout: BatchLayout,
        cache: list[KVBlocks],
        adapted: Adapted = (),
        inserted: Inserted | None = None,
    ) -> Iterator[Tensor]:
        """Yield the hidden states [T, E] after each layer and at last what ``forward`` returns.

        Each is for reading before the next is asked for, which may overwrite it.
        """

    def logits(self, hidden: Tensor) -> Tensor:
        """Return [R, V] float32 from ``hidden`` [R, E]."""


def new_cache(config: ModelConfig, ops: Ops, kv_dtype: str, num_blocks: int, block_size: int) -> list[KVBlocks]:
    """See ``LanguageModel.new_cache``."""
    shapes = ops.cache_shapes(num_blocks, block_size, config.num_kv_heads, config.head_dim)
    has_scales = kv_dtype == "int8"
    return [
        KVBlocks(
            k=ops.own(lazy_zeros(shapes.k, kv_dtype)),
            v=ops.own(lazy_zeros(shapes.v, kv_dtype)),
            k_scales=ops.own(lazy_zeros(shapes.scales, "float32")) if has_scales else None,
            v_scales=ops.own(lazy_zeros(shapes.scales, "float32")) if has_scales else None,
        )
        for _ in range(config.num_layers)
    ]
