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
from penstock.kernels import BatchLayout, KVBlocks, Linear, Ops, ops_for
from penstock.models.config import DTYPES, ModelConfig, read_config
from penstock.models.rope import RotaryEmbedding
from penstock.models.weights import Weights

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer's weights as the kernels want them."""

    input_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Linear
    post_norm: Tensor
    gate_up: Linear
    down: Linear
    window: int | None


class DecoderModel:
    """A loaded decoder-only language model."""

    def __init__(self, config: ModelConfig, weights: Weights, dtype: torch.dtype, ops: Ops) -> None:
        self.config = config
        self.dtype = dtype
        self.num_parameters = 0
        self._ops = ops
        self._weights = weights
        E, V = config.hidden_size, config.vocab_size
        self._embedding = self._take("model.embed_tokens.weight", V, E)
        self._layers = [self._load_layer(layer) for layer in range(config.num_layers)]
        self._norm = self._take("model.norm.weight", E)
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
        shape = (num_blocks, block_size, self.config.num_kv_heads, self.config.head_dim)
        return [
            KVBlocks(_lazy_zeros(shape, self.dtype), _lazy_zeros(shape, self.dtype))
            for _ in range(self.config.num_layers)
        ]

    def forward(self, token_ids: Tensor, layout: BatchLayout, cache: list[KVBlocks]) -> Tensor:
        """Return the final normed hidden states [T, E] of ``token_ids`` [T] int64; writes keys and values."""
        ops, eps = self._ops, self.config.rms_norm_eps
        attentions = {
            window: ops.plan_attention(layout, cache[0], num_heads=self.config.num_heads, window=window)
            for window in set(self.config.layer_windows)
        }
        cos, sin = self._rope(layout.positions)
        x_TE = F.embedding(token_ids, self._embedding)
        for layer, kv in zip(self._layers, cache, strict=True):
            q_THD, k_TGD, v_TGD = self._qkv(layer, ops.rms_norm(x_TE, layer.input_norm, eps), cos, sin)
            ops.write_kv(kv, layout.slots, k_TGD, v_TGD)
            mixed_THD = attentions[layer.window](q_THD, k_TGD, v_TGD, kv, scale=self.config.head_dim**-0.5)
            x_TE = x_TE + layer.o(mixed_THD.flatten(1))
            gate_up_T2F = layer.gate_up(ops.rms_norm(x_TE, layer.post_norm, eps))
            x_TE = x_TE + layer.down(ops.silu_mul(gate_up_T2F))
        return ops.rms_norm(x_TE, self._norm, eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return [R, V] float32 from ``hidden`` [R, E]."""
        return self._head(hidden).float()

    def _qkv(self, layer: _Layer, x_TE: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        H, G, D = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        heads = layer.qkv(x_TE).view(-1, H + 2 * G, D)
        q_THD, k_TGD, v_TGD = heads[:, :H], heads[:, H : H + G], heads[:, H + G :]
        if layer.q_norm is None or layer.k_norm is None:
            qk = self._ops.apply_rope(heads[:, : H + G], cos, sin)
            return qk[:, :H], qk[:, H:], v_TGD
        eps = self.config.rms_norm_eps
        q_THD = self._ops.apply_rope(self._ops.rms_norm(q_THD, layer.q_norm, eps), cos, sin)
        k_TGD = self._ops.apply_rope(self._ops.rms_norm(k_TGD, layer.k_norm, eps), cos, sin)
        return q_THD, k_TGD, v_TGD

    # ---- loading

    def _load_layer(self, index: int) -> _Layer:
        config, name = self.config, f"model.layers.{index}"
        E, D, F_ = config.hidden_size, config.head_dim, config.intermediate_size
        q, kv = config.num_heads * D, config.num_kv_heads * D
        attention = f"{name}.self_attn"
        return _Layer(
            input_norm=self._take(f"{name}.input_layernorm.weight", E),
            qkv=self._linear(
                [(f"{attention}.q_proj", q), (f"{attention}.k_proj", kv), (f"{attention}.v_proj", kv)],
                E,
                bias=config.qkv_bias,
            ),
            q_norm=self._take(f"{attention}.q_norm.weight", D) if config.qk_norm else None,
            k_norm=self._take(f"{attention}.k_norm.weight", D) if config.qk_norm else None,
            o=self._linear([(f"{attention}.o_proj", E)], q, bias=config.o_bias),
            post_norm=self._take(f"{name}.post_attention_layernorm.weight", E),
            gate_up=self._linear([(f"{name}.mlp.gate_proj", F_), (f"{name}.mlp.up_proj", F_)], E, bias=config.mlp_bias),
            down=self._linear([(f"{name}.mlp.down_proj", E)], F_, bias=config.mlp_bias),
            window=config.layer_windows[index],
        )

    def _linear(self, parts: list[tuple[str, int]], num_inputs: int, *, bias: bool) -> Linear:
        """Return the projections ``parts`` (name, outputs) as one, side by side."""
        weights = [self._take(f"{name}.weight", outputs, num_inputs) for name, outputs in parts]
        biases = [self._take(f"{name}.bias", outputs) for name, outputs in parts] if bias else []
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        return self._ops.prepare_linear(weight, torch.cat(biases) if biases else None)

    def _take(self, name: str, *shape: int) -> Tensor:
        tensor = self._weights.take(name, shape, self.dtype)
        self.num_parameters += tensor.numel()
        return tensor


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return zeros that the system hands out page by page; torch.zeros would write gigabytes at start."""
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)


def load_model(path: Path, *, dtype: str = "auto", ops: Ops | None = None) -> DecoderModel:
    """Load the model in directory ``path``.

    Raises ``ModelUnreadable`` if the checkpoint is incomplete or broken, ``InvalidSetting`` for an unknown dtype.
    """
    config = read_config(path)
    with torch.inference_mode(), Weights(path) as weights:
        torch_dtype = getattr(torch, run_dtype(config, dtype))
        model = DecoderModel(config, weights, torch_dtype, ops or ops_for(torch_dtype))
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
    """Return the dtype a model runs in: the one asked for, or for ``auto`` the checkpoint's own if this processor
    computes in it, float32, which holds every value of the others exactly, if not.
    """
    if dtype != "auto":
        if dtype not in DTYPES:
            raise InvalidSetting(f"dtype is {dtype!r}; it can be auto, {', '.join(DTYPES)}", param="dtype")
        return dtype
    native = {"bfloat16": torch.cpu._is_avx512_bf16_supported, "float16": torch.cpu._is_amx_fp16_supported}
    return config.dtype if config.dtype == "float32" or native[config.dtype]() else "float32"
