"""The decoder that the native families share; ``ModelConfig`` says how they differ.

T packed tokens, R rows, E hidden width, V vocabulary.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import structlog
import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.errors import InvalidSetting, ModelUnreadable
from penstock.kernels import BatchLayout, KVBlocks, Ops, ops_for
from penstock.models.config import DTYPES, ModelConfig
from penstock.models.families import read_config
from penstock.models.lora import Adapted, Adapter, read_adapter
from penstock.models.model import LanguageModel, new_cache
from penstock.models.parts import AttentionBlock, FeedForward, Loader, Step, load_feed_forward
from penstock.models.rope import RotaryEmbedding
from penstock.models.weights import TensorSource, open_weights

_log = structlog.get_logger(__name__)

KV_DTYPES = ("float32", "bfloat16", "int8")
"""What keys and values can be cached in, whatever the weights' dtype."""


@dataclass(frozen=True, slots=True)
class _Layer:
    """Two blocks, each with a norm before it, after it or both."""

    before_attention: Tensor | None
    attention: AttentionBlock
    after_attention: Tensor | None
    before_mlp: Tensor | None
    mlp: FeedForward
    after_mlp: Tensor | None


class DecoderModel:
    """A loaded decoder-only language model."""

    def __init__(
        self,
        config: ModelConfig,
        weights: TensorSource,
        dtype: torch.dtype,
        kv_dtype: torch.dtype,
        ops: Ops,
        *,
        max_tokens: int | None = None,
        adaptable: bool = False,
    ) -> None:
        """Load; ``max_tokens`` is the longest sequence that will be run, if it is less than the model can hold.

        ``adaptable`` makes ``load_adapter`` possible, and the feed-forward a little slower.
        """
        self.config = config
        self.dtype = dtype
        self.kv_dtype = kv_dtype
        self._ops = ops
        self._activation_dtype = ops.activation_dtype(dtype)
        self._adaptable = adaptable
        loader = Loader(config, weights, dtype, ops, adaptable=adaptable)
        E, V = config.hidden_size, config.vocab_size
        self._embedding = loader.tensor("model.embed_tokens.weight", V, E)
        self._layers = [self._load_layer(loader, index) for index in range(config.num_layers)]
        self._norm = loader.norm("model.norm", E)
        # Checkpoints may carry a copy of a tied head; the embedding is what counts.
        head = self._embedding if config.tie_word_embeddings else loader.tensor("lm_head.weight", V, E)
        self._head = ops.prepare_linear(head, None)
        self.num_parameters = loader.num_parameters
        self._windows = {layer.window for layer in config.layers}
        self._ropes = [
            RotaryEmbedding(rope, config.head_dim, max_tokens or config.max_positions) for rope in config.ropes
        ]

    @property
    def weights_bytes(self) -> int:
        """Bytes of all parameters in the dtype they run in."""
        return self.num_parameters * self.dtype.itemsize

    def new_cache(self, num_blocks: int, block_size: int) -> list[KVBlocks]:
        """Return zeroed cache blocks for each layer; memory is taken page by page as it is first written."""
        return new_cache(self.config, self._ops, self.kv_dtype, num_blocks, block_size)

    def load_adapter(self, path: Path) -> Adapter:
        """Return the LoRA adapter in directory ``path``, for ``forward``. Raises ``ModelUnreadable``."""
        assert self._adaptable, "the model was loaded without room for adapters"
        with torch.inference_mode():
            return read_adapter(path, self.config, self._ops, self.dtype)

    def forward(self, token_ids: Tensor, layout: BatchLayout, cache: list[KVBlocks], adapted: Adapted = ()) -> Tensor:
        """Return the final normed hidden states [T, E] of ``token_ids`` [T] int64; writes keys and values."""
        step = self._begin(layout, adapted)
        x_TE = F.embedding(token_ids, self._embedding).to(self._activation_dtype)
        if self.config.embedding_scale != 1.0:
            # Rounded as the weights are, because that is how it was trained.
            x_TE = x_TE * torch.tensor(self.config.embedding_scale, dtype=self.dtype)
        for layer, kv in zip(self._layers, cache, strict=True):
            attention = partial(layer.attention, kv=kv)
            x_TE = self._add(x_TE, layer.before_attention, attention, layer.after_attention, step)
            x_TE = self._add(x_TE, layer.before_mlp, layer.mlp, layer.after_mlp, step)
        return self._ops.rms_norm(x_TE, self._norm, self.config.rms_norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return [R, V] float32 from ``hidden`` [R, E]."""
        config, logits = self.config, self._head(hidden).float()
        if config.logit_scale != 1.0:
            logits *= config.logit_scale
        if config.logit_cap is not None:
            logits.div_(config.logit_cap).tanh_().mul_(config.logit_cap)
        return logits

    def _begin(self, layout: BatchLayout, adapted: Adapted) -> Step:
        config = self.config
        attentions = {
            window: self._ops.plan_attention(
                layout,
                num_heads=config.num_heads,
                num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                window=window,
                score_cap=config.score_cap,
            )
            for window in self._windows
        }
        return Step(layout, attentions, [rope(layout.positions) for rope in self._ropes], adapted)

    def _add(self, x: Tensor, before: Tensor | None, block: FeedForward, after: Tensor | None, step: Step) -> Tensor:
        """Return ``x`` [T, E] plus what ``block`` makes of it, normed before and after; may overwrite ``x``."""
        eps, scale = self.config.rms_norm_eps, self.config.residual_scale
        normed = x if before is None else self._ops.rms_norm(x, before, eps)
        if after is None and scale == 1.0:
            return block(normed, x, step=step)
        result = block(normed, None, step=step)
        if after is not None:
            result = self._ops.rms_norm(result, after, eps)
        return torch.add(x, result, alpha=scale)

    def _load_layer(self, loader: Loader, index: int) -> _Layer:
        norms, prefix = self.config.norms, f"model.layers.{index}"
        return _Layer(
            loader.optional_norm(prefix, norms.before_attention),
            AttentionBlock(loader, f"{prefix}.self_attn", index),
            loader.optional_norm(prefix, norms.after_attention),
            loader.optional_norm(prefix, norms.before_mlp),
            load_feed_forward(loader, prefix, index),
            loader.optional_norm(prefix, norms.after_mlp),
        )


def load_model(
    path: Path,
    *,
    dtype: str = "auto",
    kv_dtype: str = "auto",
    ops: Ops | None = None,
    max_tokens: int | None = None,
    adaptable: bool = False,
) -> LanguageModel:
    """Load the model in directory or GGUF file ``path``.

    ``max_tokens`` is the longest sequence that will be run; None: what it can hold. ``adaptable``: adapters may come.

    Raises ``ModelUnreadable`` if the checkpoint is incomplete or broken, ``InvalidSetting`` for an unknown dtype.
    """
    config = read_config(path)
    torch_dtype: torch.dtype = getattr(torch, run_dtype(config, dtype))
    torch_kv_dtype = cache_dtype(torch_dtype, kv_dtype)
    ops = ops or ops_for(torch_dtype)
    if not config.is_native:
        if adaptable:
            raise InvalidSetting(
                f"LoRA adapters need a native family, and {config.architecture} runs in transformers' code; leave out "
                "--max-loras",
                param="runner.max_adapters",
            )
        # Optional, and slow to import.
        from penstock.models.upstream import UpstreamModel

        return UpstreamModel(path, config, torch_dtype, torch_kv_dtype, ops)
    with torch.inference_mode(), open_weights(path) as weights:
        model = DecoderModel(
            config, weights, torch_dtype, torch_kv_dtype, ops, max_tokens=max_tokens, adaptable=adaptable
        )
        ignored = list(weights.unused())
    for name in ignored:
        if name.startswith(f"model.layers.{config.num_layers}."):
            raise ModelUnreadable(
                f"{path} has tensors of a layer {config.num_layers} ({name}), and its config says that there are "
                f"{config.num_layers} layers; the two do not belong together"
            )
    if ignored:
        _log.debug("weights_ignored", num_tensors=len(ignored), first=ignored[0])
    return model


def count_parameters(path: Path, config: ModelConfig) -> int:
    """Return how many parameters ``load_model`` will hold, from the files' headers alone."""
    with open_weights(path) as weights:
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
