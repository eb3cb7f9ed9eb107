"""T packed query tokens, S sequences, H query heads, G KV heads, D head width, N blocks, P tokens per block."""

from penstock.errors import KernelUnsupported
from penstock.kernels.dtypes import ELEMENT_BYTES, dtype_name
from penstock.kernels.layout import BatchLayout, KVBlocks
from penstock.kernels.native import NATIVE, checked
from penstock.kernels.native.cache import cache_addresses
from penstock.kernels.native.replay import empty
from penstock.kernels.tensor import Tensor

_MAX_SHARING = 128
"""Query heads on one KV head; kMaxTileRows of ``native/kernels.h``."""

_SPAN_TOKENS, _TILE_ROWS, _BAND_ROWS, _TILE_TOKENS = 256, 128, 32, 16
"""kSpan and kMaxTileRows of ``native/kernels.h``, and kBand, at most, and kTile of ``cpu.cpp``"""


def scratch_bytes(*, max_model_tokens: int, num_heads: int, num_kv_heads: int, head_dim: int, num_threads: int) -> int:
    """Return what attention works in beside its arguments and result, at most; it reads the cache in place.

    Each thread has a tile's queries and sums, a band's scores, and a span of keys and values. A decoding sequence that
    is longer than its share of the threads is cut into spans, whose sums are kept until they are merged; shares are
    such that there are at most four tasks a thread of those.
    """
    band = _BAND_ROWS * (_SPAN_TOKENS + head_dim)
    tile = band + (_TILE_ROWS * 3 // 2 + _SPAN_TOKENS + _TILE_TOKENS) * head_dim
    num_split = -(-4 * num_threads // num_kv_heads)
    spans = num_split * -(-max_model_tokens // _SPAN_TOKENS) * num_heads * (head_dim + 2)
    return (num_threads * tile + spans) * ELEMENT_BYTES["float32"]


class CPUAttention:
    """See ``ops.Attention``. Queries and the result are float32, the cache float32, bfloat16 or int8."""

    def __init__(
        self,
        layout: BatchLayout,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        window: int | None,
        score_cap: float | None = None,
    ) -> None:
        assert NATIVE is not None
        if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
            raise KernelUnsupported(f"{num_heads} query heads cannot share {num_kv_heads} KV heads evenly")
        if num_heads // num_kv_heads > _MAX_SHARING:
            raise KernelUnsupported(
                f"{num_heads // num_kv_heads} query heads share a KV head, and native attention takes {_MAX_SHARING}; "
                "set PENSTOCK_KERNELS=reference"
            )
        num_sequences, table_width = layout.tables.shape
        self._layout = layout  # the plan reads its tables
        self._shape = (len(layout.slots), num_heads, head_dim)
        self._cache_shape = (num_kv_heads, head_dim, layout.block_size)
        self._plan = NATIVE.AttentionPlan(
            num_sequences,
            checked(layout.query_starts, "int32", num_sequences + 1),
            checked(layout.context_lens, "int32", num_sequences),
            checked(layout.tables, "int32", num_sequences, table_width),
            table_width,
            checked(layout.table_starts, "int32", num_sequences),
            0 if layout.visible is None else checked(layout.visible, "int32", len(layout.slots)),
            layout.block_size,
            num_heads,
            num_kv_heads,
            head_dim,
            window or 0,
            score_cap or 0.0,
        )

    def __call__(self, q: Tensor, kv: KVBlocks, *, scale: float) -> Tensor:
        """See ``ops.Attention``."""
        T, H, D = self._shape
        # Heads of a token are dense; tokens may stand apart, as they do in the projection they come from.
        if q.shape != self._shape or dtype_name(q.dtype) != "float32" or q.stride()[1:] != (D, 1):
            q_address = checked(q, "float32", T, H, D)
        else:
            q_address = q.data_ptr()
        out = empty(T, H * D)
        addresses = cache_addresses(kv, *self._cache_shape)
        self._plan.run(q_address, q.stride(0), T, *addresses, out.data_ptr(), scale)
        return out.view(T, H, D)
