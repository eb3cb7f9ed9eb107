"""Ops that say what they took, and how many bytes and operations that was.

T packed tokens, S sequences, N outputs, K inputs, E width, H query heads, G KV heads, D head width, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from penstock.engine.profiling.recorder import Recorder
from penstock.kernels import (
    Attention,
    BatchLayout,
    HeadNorms,
    KVBlocks,
    Linear,
    Ops,
    Quantization,
    Replay,
    WeightCodes,
)
from penstock.kernels.ops import CacheShapes
from penstock.models import ModelConfig

_FLOAT32_BYTES = 4


def around_ops(ops: Ops, config: ModelConfig, quantization: Quantization | None, recorder: Recorder) -> Ops:
    """Return ``ops`` that are timed and keep weights as ``quantization`` says."""
    return _Ops(ops, config, quantization, recorder)


class _Ops:
    """See ``ops.Ops``. Products are told apart by their sizes, which differ within every family."""

    def __init__(self, ops: Ops, config: ModelConfig, quantization: Quantization | None, recorder: Recorder) -> None:
        self._ops = ops
        self._quantization = quantization
        self._recorder = recorder
        E, D, H, G = config.hidden_size, config.head_dim, config.num_heads, config.num_kv_heads
        self._roles = {
            (config.vocab_size, E): "lm_head",
            (E, config.intermediate_size): "down",
            (E, H * D): "o",
            ((H + 2 * G) * D, E): "qkv",
        }

    @property
    def name(self) -> str:
        return self._ops.name

    def activation_dtype(self, weights_dtype: torch.dtype) -> torch.dtype:
        return self._ops.activation_dtype(weights_dtype)

    def cache_shapes(self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> CacheShapes:
        return self._ops.cache_shapes(num_blocks, block_size, num_kv_heads, head_dim)

    def form_of_codes(self, bits: int, group: int | None, *, int8_activations: bool) -> Quantization | None:
        return self._ops.form_of_codes(bits, group, int8_activations=int8_activations)

    def prepare_linear(
        self, weight: Tensor | WeightCodes, bias: Tensor | None, *, exact: bool = False, activation: str | None = None
    ) -> Linear:
        N, K = weight.shape
        role = self._roles.get((N, K), f"linear {N} x {K}")
        linear = self._ops.prepare_linear(weight, bias, exact=exact, activation=activation)
        return self._timed(linear, role, weight, num_rows=N, num_outputs=N, exact=exact)

    def prepare_gated_linear(
        self,
        gate: Tensor | WeightCodes,
        up: Tensor | WeightCodes,
        gate_bias: Tensor | None,
        up_bias: Tensor | None,
        *,
        activation: str = "silu",
    ) -> Linear:
        F, _ = gate.shape
        linear = self._ops.prepare_gated_linear(gate, up, gate_bias, up_bias, activation=activation)
        return self._timed(linear, "gate_up", gate, num_rows=2 * F, num_outputs=F)

    def _timed(
        self,
        linear: Linear,
        role: str,
        weight: Tensor | WeightCodes,
        *,
        num_rows: int,
        num_outputs: int,
        exact: bool = False,
    ) -> Linear:
        form, K = None if exact else self._quantization, weight.shape[1]
        if isinstance(weight, Tensor):
            element_bytes = weight.element_size() if form is None else form.weight_bytes
        else:
            form = weight.form
            element_bytes = form.weight_bytes
        return _Linear(
            linear,
            role,
            self._recorder,
            weight_bytes=int(num_rows * K * element_bytes),
            ops_per_token=2 * num_rows * K,
            bytes_per_token=(K + num_outputs) * _FLOAT32_BYTES,
            of_bytes=form is not None and form.int8_activations,
        )

    def record(self, forward: Callable[[Tensor, BatchLayout], Tensor], block_size: int) -> Replay | None:
        return self._ops.record(forward, block_size)

    def embed(self, token_ids: Tensor, table: Tensor, dtype: torch.dtype, *, scale: float = 1.0) -> Tensor:
        self._recorder.lap("between ops")
        out = self._ops.embed(token_ids, table, dtype, scale=scale)
        self._recorder.lap("embed", out.numel() * (table.element_size() + out.element_size()), out.numel())
        return out

    def add(self, x: Tensor, y: Tensor, *, scale: float = 1.0) -> Tensor:
        self._recorder.lap("between ops")
        out = self._ops.add(x, y, scale=scale)
        self._recorder.lap("add", 3 * out.numel() * out.element_size(), 2 * out.numel())
        return out

    def rope_angles(
        self, positions: Tensor, inverse: Tensor, head_dim: int, *, factor: float = 1.0, axes: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        self._recorder.lap("between ops")
        angles = self._ops.rope_angles(positions, inverse, head_dim, factor=factor, axes=axes)
        self._recorder.lap("rope_angles")
        return angles

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
        self._recorder.lap("between ops")
        out = self._ops.rms_norm(x, weight, eps, out)
        self._recorder.lap("rms_norm", 2 * x.numel() * x.element_size(), 4 * x.numel())
        return out

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        self._recorder.lap("between ops")
        out = self._ops.layer_norm(x, weight, bias, eps)
        self._recorder.lap("layer_norm", 2 * x.numel() * x.element_size(), 8 * x.numel())
        return out

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
        self._recorder.lap("between ops")
        q = self._ops.rope_write_kv(
            qkv, kv, layout, cos, sin, num_heads=num_heads, num_kv_heads=num_kv_heads, norms=norms
        )
        T, _, D = q.shape
        num_written = q.numel() * q.element_size() + T * num_kv_heads * _head_bytes(kv, D)
        self._recorder.lap("rope_write_kv", qkv.numel() * qkv.element_size() + num_written, 3 * qkv.numel())
        return q

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
        self._recorder.lap("between ops")
        plan = self._ops.plan_attention(
            layout,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            window=window,
            score_cap=score_cap,
        )
        num_seen, num_scores = attended(layout, window)
        self._recorder.lap("attention plan")
        return _Attention(plan, num_seen * num_kv_heads, num_scores * num_heads, self._recorder)


class _Linear:
    def __init__(
        self,
        linear: Linear,
        role: str,
        recorder: Recorder,
        *,
        weight_bytes: int,
        ops_per_token: int,
        bytes_per_token: int,
        of_bytes: bool,
    ) -> None:
        self._linear = linear
        self._role = role
        self._recorder = recorder
        self._weight_bytes = weight_bytes
        self._ops_per_token = ops_per_token
        self._bytes_per_token = bytes_per_token
        self._of_bytes = of_bytes

    def __call__(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        self._recorder.lap("between ops")
        out = self._linear(x, added)
        T = len(x)
        num_bytes = self._weight_bytes + T * self._bytes_per_token
        self._recorder.lap(self._role, num_bytes, T * self._ops_per_token, of_bytes=self._of_bytes)
        return out


class _Attention:
    def __init__(self, attention: Attention, num_keys: int, num_scores: int, recorder: Recorder) -> None:
        self._attention = attention
        self._recorder = recorder
        self._num_keys = num_keys
        self._num_scores = num_scores

    def __call__(self, q: Tensor, kv: KVBlocks, *, scale: float) -> Tensor:
        self._recorder.lap("between ops")
        out = self._attention(q, kv, scale=scale)
        num_bytes = self._num_keys * _head_bytes(kv, q.shape[-1]) + 2 * q.numel() * q.element_size()
        self._recorder.lap("attention", num_bytes, 4 * self._num_scores * q.shape[-1])
        return out


def _head_bytes(kv: KVBlocks, head_dim: int) -> int:
    """Return what one head's key and value of one token take, with their scales."""
    return 2 * (head_dim * kv.k.element_size() + (0 if kv.k_scales is None else _FLOAT32_BYTES))


def attended(layout: BatchLayout, window: int | None) -> tuple[int, int]:
    """Return how many tokens' keys a step reads, each once, and how many pairs of query and key it scores."""
    num_seen = num_scores = 0
    for num_queries, context_len in zip(layout.query_lens_list, layout.context_lens_list, strict=True):
        if window is None or context_len <= window:
            num_seen += context_len
            num_scores += num_queries * context_len - num_queries * (num_queries - 1) // 2
        else:
            num_seen += min(context_len, window + num_queries - 1)
            first = context_len - num_queries + 1
            num_scores += sum(min(window, first + i) for i in range(num_queries))
    return num_seen, num_scores
