"""Ops that say what they took, and how many bytes and operations that was.

T packed tokens, S sequences, N outputs, K inputs, E width, H query heads, G KV heads, D head width, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from penstock.engine.profiling.recorder import Cost, Recorder
from penstock.kernels import (
    Attention,
    BatchLayout,
    Embedding,
    KVBlocks,
    Linear,
    Ops,
    Quantization,
    Stacked,
    WeightCodes,
)
from penstock.kernels.dtypes import dtype_name
from penstock.kernels.limits import Numbers
from penstock.kernels.linear.cpu import PackedLinear
from penstock.kernels.native import IN_PAIRS
from penstock.models import ModelConfig

_FLOAT32_BYTES = 4


def around_ops(ops: Ops, config: ModelConfig, quantization: Quantization | None, recorder: Recorder) -> Ops:
    """Return ``ops`` that are timed and keep weights as ``quantization`` says."""
    return _Ops(ops, config, quantization, recorder)


class _Ops:
    """See ``ops.Ops``. Products are told apart by their sizes, which differ within every family."""

    def __init__(self, ops: Ops, config: ModelConfig, quantization: Quantization | None, recorder: Recorder) -> None:
        self.name = ops.name
        self.activation_dtype = ops.activation_dtype
        self.cache_shapes = ops.cache_shapes
        self.own = ops.own
        self.form_of_codes = ops.form_of_codes
        self.record = ops.record
        self.add = recorder.timed("add", ops.add, _add_cost)
        self.rope_angles = recorder.timed("rope_angles", ops.rope_angles)
        self.rms_norm = recorder.timed("rms_norm", ops.rms_norm, _rms_norm_cost)
        self.layer_norm = recorder.timed("layer_norm", ops.layer_norm, _layer_norm_cost)
        self.rope_write_kv = recorder.timed("rope_write_kv", ops.rope_write_kv, _rope_write_kv_cost)
        self._ops = ops
        self._quantization = quantization
        self._recorder = recorder
        self._untimed: dict[Linear, Linear] = {}
        """Products, by what times them"""
        E, D, H, G = config.hidden_size, config.head_dim, config.num_heads, config.num_kv_heads
        self._roles = {
            (config.vocab_size, E): "lm_head",
            (E, config.intermediate_size): "down",
            (E, H * D): "o",
            ((H + 2 * G) * D, E): "qkv",
        }

    def prepare_linear(
        self,
        weight: Tensor | Stacked | WeightCodes,
        bias: Tensor | None,
        *,
        exact: bool = False,
        activation: str | None = None,
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

    def _numbers(self, dtype: str | torch.dtype) -> Numbers:
        """Return what is multiplied where weights, or a cache, have ``dtype``."""
        return "bfloat16" if dtype_name(dtype) == "bfloat16" and self.name in IN_PAIRS else "float32"

    def _timed(
        self,
        linear: Linear,
        role: str,
        weight: Tensor | Stacked | WeightCodes,
        *,
        num_rows: int,
        num_outputs: int,
        exact: bool = False,
    ) -> Linear:
        form, K = None if exact else self._quantization, weight.shape[1]
        numbers: Numbers = "float32"
        if isinstance(weight, WeightCodes):
            form = weight.form
        elif form is None:
            numbers = self._numbers(weight.dtype)
        if isinstance(linear, PackedLinear):
            weight_bytes = linear.num_bytes
        else:
            element_bytes = weight.form.weight_bytes if isinstance(weight, WeightCodes) else weight.dtype.itemsize
            weight_bytes = int(num_rows * K * element_bytes)
        ops_per_token = 2 * num_rows * K
        bytes_per_token = (K + num_outputs) * _FLOAT32_BYTES
        if form is not None and form.int8_activations:
            numbers = "bytes"

        def cost(out: Tensor, x: Tensor, *_: object, **__: object) -> Cost:
            T = len(x)
            return Cost(weight_bytes + T * bytes_per_token, T * ops_per_token, numbers)

        timed = self._recorder.timed(role, linear, cost)
        self._untimed[timed] = linear
        return timed

    def prepare_embedding(
        self, table: Callable[[], Tensor], dtype: str, *, scale: float = 1.0, tied: Linear | None = None
    ) -> Embedding:
        # Whether rows can be read from it is seen from what the ops underneath made.
        tied = None if tied is None else self._untimed.get(tied, tied)
        embedding = self._ops.prepare_embedding(table, dtype, scale=scale, tied=tied)
        return self._recorder.timed("embed", embedding, _embed_cost)

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

        def cost(out: Tensor, q: Tensor, kv: KVBlocks, **_: object) -> Cost:
            D = q.shape[-1]
            key_bytes = num_seen * num_kv_heads * _head_bytes(kv, D)
            num_ops = 4 * num_scores * num_heads * D
            return Cost(key_bytes + 2 * q.numel() * q.element_size(), num_ops, self._numbers(kv.k.dtype))

        return self._recorder.timed("attention", plan, cost)


def _embed_cost(out: Tensor, *_: object, **__: object) -> Cost:
    # Rows are read in no more bytes than they are written in.
    return Cost(2 * out.numel() * out.element_size(), out.numel())


def _add_cost(out: Tensor, *_: object, **__: object) -> Cost:
    return Cost(3 * out.numel() * out.element_size(), 2 * out.numel())


def _rms_norm_cost(out: Tensor, x: Tensor, *_: object, **__: object) -> Cost:
    return Cost(2 * x.numel() * x.element_size(), 4 * x.numel())


def _layer_norm_cost(out: Tensor, x: Tensor, *_: object, **__: object) -> Cost:
    return Cost(2 * x.numel() * x.element_size(), 8 * x.numel())


def _rope_write_kv_cost(q: Tensor, qkv: Tensor, kv: KVBlocks, *_: object, num_kv_heads: int, **__: object) -> Cost:
    T, D = len(q), q.shape[-1]
    num_written = q.numel() * q.element_size() + T * num_kv_heads * _head_bytes(kv, D)
    return Cost(qkv.numel() * qkv.element_size() + num_written, 3 * qkv.numel())


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
