"""The decoder that Llama, Mistral, Qwen2 and Qwen3 share; ``ModelConfig`` says how they differ.

T packed tokens, R rows, E hidden width, H query heads, G KV heads, D head width, F feed-forward width, V vocabulary.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import structlog
import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.errors import InvalidSetting
from penstock.kernels import BatchLayout, HeadNorms, KVBlocks, Linear, Ops, ops_for
from penstock.models.config import DTYPES, ModelConfig, read_config
from penstock.models.rope import RotaryEmbedding
from penstock.models.weights import TensorSource, Weights

_log = structlog.get_logger(__name__)

KV_DTYPES = ("float32", "bfloat16", "int8")
"""What keys and values can be cached in, whatever the weights' dtype."""


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer's weights as the kernels want them."""

    input_norm: Tensor
    qkv: Linear
    head_norms: HeadNorms | None
    o: Linear
    post_norm: Tensor
    gate_up: Linear
    down: Linear
    window: int | None


class DecoderModel:
    """A loaded decoder-only language model."""

    def __init__(
        self, config: ModelConfig, weights: TensorSource, dtype: torch.dtype, kv_dtype: torch.dtype, ops: Ops
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.kv_dtype = kv_dtype
        self.num_parameters = 0
        self._ops = ops
        self._activation_dtype = ops.activation_dtype(dtype)
        self._weights = weights
        E, V = config.hidden_size, config.vocab_size
        self._embedding = self._take("model.embed_tokens.weight", V, E)
        self._layers = [self._load_layer(layer) for layer in range(config.num_layers)]
        self._norm = self._take_norm("model.norm.weight", E)
        # Checkpoints may carry a copy of a tied head; the embedding is what counts.
        head = self._embedding if config.tie_word_embeddings else self._take("lm_head.weight", V, E)
        self._head = ops.prepare_linear(head, None)
        self._rope = RotaryEmbedding(config)
        del self._weights

    @property
    def weights_bytes(self) -> int:
        """Bytes of all parameters in the dtype they run in."""
        return self.num_parameters * self.dtype.itemsize

    def new_cache(self, num_blocks: int, block_size: int) -> list[KVBlocks]:
        """Return zeroed cache blocks for each layer; memory is taken page by page as it is first written."""
        config = self.config
        shapes = self._ops.cache_shapes(num_blocks, block_size, config.num_kv_heads, config.head_dim)
        has_scales = self.kv_dtype is torch.int8
        return [
            KVBlocks(
                k=_lazy_zeros(shapes.k, self.kv_dtype),
                v=_lazy_zeros(shapes.v, self.kv_dtype),
                k_scales=_lazy_zeros(shapes.scales, torch.float32) if has_scales else None,
                v_scales=_lazy_zeros(shapes.scales, torch.float32) if has_scales else None,
            )
            for _ in range(config.num_layers)
        ]

    def forward(self, token_ids: Tensor, layout: BatchLayout, cache: list[KVBlocks]) -> Tensor:
        """Return the final normed hidden states [T, E] of ``token_ids`` [T] int64; writes keys and values."""
        ops, config = self._ops, self.config
        eps, scale = config.rms_norm_eps, config.head_dim**-0.5
        heads = {"num_heads": config.num_heads, "num_kv_heads": config.num_kv_heads}
        attentions = {
            window: ops.plan_attention(layout, **heads, head_dim=config.head_dim, window=window)
            for window in set(config.layer_windows)
        }
        cos, sin = self._rope(layout.positions)
        x_TE = F.embedding(token_ids, self._embedding).to(self._activation_dtype)
        for layer, kv in zip(self._layers, cache, strict=True):
            qkv = layer.qkv(ops.rms_norm(x_TE, layer.input_norm, eps))
            q_THD = ops.rope_write_kv(qkv, kv, layout, cos, sin, **heads, norms=layer.head_norms)
            mixed_THD = attentions[layer.window](q_THD, kv, scale=scale)
            x_TE = layer.o(mixed_THD.flatten(1), x_TE)
            x_TE = layer.down(layer.gate_up(ops.rms_norm(x_TE, layer.post_norm, eps)), x_TE)
        return ops.rms_norm(x_TE, self._norm, eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return [R, V] float32 from ``hidden`` [R, E]."""
        return self._head(hidden).float()

    # ---- loading

    def _load_layer(self, index: int) -> _Layer:
        config, name = self.config, f"model.layers.{index}"
        E, D, F_ = config.hidden_size, config.head_dim, config.intermediate_size
        q, kv = config.num_heads * D, config.num_kv_heads * D
        attention = f"{name}.self_attn"
        return _Layer(
            input_norm=self._take_norm(f"{name}.input_layernorm.weight", E),
            qkv=self._linear(
                [(f"{attention}.q_proj", q), (f"{attention}.k_proj", kv), (f"{attention}.v_proj", kv)],
                E,
                bias=config.qkv_bias,
            ),
            head_norms=HeadNorms(
                self._take_norm(f"{attention}.q_norm.weight", D),
                self._take_norm(f"{attention}.k_norm.weight", D),
                config.rms_norm_eps,
            )
            if config.qk_norm
            else None,
            o=self._linear([(f"{attention}.o_proj", E)], q, bias=config.o_bias),
            post_norm=self._take_norm(f"{name}.post_attention_layernorm.weight", E),
            gate_up=self._gated_linear(f"{name}.mlp.gate_proj", f"{name}.mlp.up_proj", F_, E, bias=config.mlp_bias),
            down=self._linear([(f"{name}.mlp.down_proj", E)], F_, bias=config.mlp_bias),
            window=config.layer_windows[index],
        )

    def _linear(self, parts: list[tuple[str, int]], num_inputs: int, *, bias: bool) -> Linear:
        """Return the projections ``parts`` (name, outputs) as one, side by side."""
        weights = [self._take(f"{name}.weight", outputs, num_inputs) for name, outputs in parts]
        biases = [self._take(f"{name}.bias", outputs) for name, outputs in parts] if bias else []
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        return self._ops.prepare_linear(weight, torch.cat(biases) if biases else None)

    def _gated_linear(self, gate: str, up: str, num_outputs: int, num_inputs: int, *, bias: bool) -> Linear:
        weights = [self._take(f"{name}.weight", num_outputs, num_inputs) for name in (gate, up)]
        biases = [self._take(f"{name}.bias", num_outputs) if bias else None for name in (gate, up)]
        return self._ops.prepare_gated_linear(weights[0], weights[1], biases[0], biases[1])

    def _take_norm(self, name: str, size: int) -> Tensor:
        return self._take(name, size).to(self._activation_dtype)

    def _take(self, name: str, *shape: int) -> Tensor:
        tensor = self._weights.take(name, shape, self.dtype)
        self.num_parameters += tensor.numel()
        return tensor


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return zeros that the system hands out page by page; torch.zeros would write gigabytes at start."""
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)


def load_model(path: Path, *, dtype: str = "auto", kv_dtype: str = "auto", ops: Ops | None = None) -> DecoderModel:
    """Load the model in directory ``path``.

    Raises ``ModelUnreadable`` if the checkpoint is incomplete or broken, ``InvalidSetting`` for an unknown dtype.
    """
    config = read_config(path)
    torch_dtype: torch.dtype = getattr(torch, run_dtype(config, dtype))
    torch_kv_dtype = cache_dtype(torch_dtype, kv_dtype)
    with torch.inference_mode(), Weights(path) as weights:
        model = DecoderModel(config, weights, torch_dtype, torch_kv_dtype, ops or ops_for(torch_dtype))
        ignored = list(weights.unused())
    if ignored:
        _log.debug("weights_ignored", num_tensors=len(ignored), first=ignored[0])
    return model


def count_parameters(path: Path, config: ModelConfig) -> int:
    """Return how many parameters ``load_model`` will hold, from the files' headers alone."""
    with Weights(path) as weights:
        tied_copy = "lm_head.weight" if config.tie_word_embeddings else ""
        return sum(weights.num_elements(name) for name in weights.unused() if name != tied_copy)


def run_dtype(config: ModelConfig, dtype: str) -> str:
    """Return the dtype of a model's weights: the one asked for, or for ``auto`` the checkpoint's own if
    kernels take it beside float32 activations, and float32, which holds every value of the others exactly, if not.
    """
    if dtype != "auto":
        if dtype not in DTYPES:
            raise InvalidSetting(f"dtype is {dtype!r}; it can be auto, {', '.join(DTYPES)}", param="dtype")
        return dtype
    own = getattr(torch, config.dtype)
    return config.dtype if ops_for(own).activation_dtype(own) is torch.float32 else "float32"


def cache_dtype(weights_dtype: torch.dtype, kv_dtype: str) -> torch.dtype:
    """Return the dtype of cached keys and values: the one asked for, or for ``auto`` the weights'."""
    if kv_dtype == "auto":
        return weights_dtype
    if kv_dtype not in KV_DTYPES:
        raise InvalidSetting(
            f"kv_dtype is {kv_dtype!r}; it can be auto, {', '.join(KV_DTYPES)}", param="runner.kv_dtype"
        )
    dtype: torch.dtype = getattr(torch, kv_dtype)
    return dtype
