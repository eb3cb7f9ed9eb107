"""The decoder that the native families share; ``ModelConfig`` says how they differ.

Its two ends and its layers are apart, so that layers may be held all at once, or one after another.
T packed tokens, R rows, E hidden width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from penstock.kernels import BatchLayout, KVBlocks, Ops
from penstock.kernels.dtypes import rounded
from penstock.kernels.tensor import Tensor
from penstock.models.config import ModelConfig
from penstock.models.lora import Adapted
from penstock.models.parts import AttentionBlock, FeedForward, Loader, Step, load_feed_forward
from penstock.models.rope import RotaryEmbedding

Block = Callable[[Tensor, Tensor | None, Adapted], Tensor]
"""From what it reads, what may be added to, and adapters"""


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """Two blocks, each with a norm before it, after it or both."""

    before_attention: Tensor | None
    attention: AttentionBlock
    after_attention: Tensor | None
    before_mlp: Tensor | None
    mlp: FeedForward
    after_mlp: Tensor | None

    @classmethod
    def load(cls, loader: Loader, index: int) -> "DecoderLayer":
        """Take layer ``index``."""
        norms, prefix = loader.config.norms, f"model.layers.{index}"
        return cls(
            loader.optional_norm(prefix, norms.before_attention),
            AttentionBlock(loader, f"{prefix}.self_attn", index),
            loader.optional_norm(prefix, norms.after_attention),
            loader.optional_norm(prefix, norms.before_mlp),
            load_feed_forward(loader, prefix, index),
            loader.optional_norm(prefix, norms.after_mlp),
        )


class DecoderEnds:
    """What is before the first layer and after the last: embedding, norm and head."""

    def __init__(self, loader: Loader) -> None:
        """Take their tensors."""
        config = self._config = loader.config
        self._ops = loader.ops
        E, V = config.hidden_size, config.vocab_size
        self._norm = loader.norm("model.norm", E)
        # Checkpoints may carry a copy of a tied head; the embedding is what counts.
        name, is_tied = "model.embed_tokens", config.tie_word_embeddings
        self._head = loader.side_by_side([loader.weight(name if is_tied else "lm_head", V, E)])
        self._embedding = loader.ops.prepare_embedding(
            # Taken after the head was packed: of a mapped file, only the rows of tokens that occur are read.
            partial(loader.tensor, f"{name}.weight", V, E),
            loader.ops.activation_dtype(loader.dtype),
            # Rounded as the weights are, because that is how it was trained.
            scale=rounded(config.embedding_scale, loader.dtype),
            tied=self._head if is_tied else None,
        )

    def embed(self, token_ids: Tensor) -> Tensor:
        """Return what the first layer reads [T, E] of ``token_ids`` [T] int64."""
        return self._embedding(token_ids)

    def finish(self, x: Tensor) -> Tensor:
        """Return the final normed hidden states [T, E] of what the last layer left."""
        return self._ops.rms_norm(x, self._norm, self._config.rms_norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return [R, V] float32 from final ``hidden`` [R, E]."""
        config, logits = self._config, self._head(hidden).float()
        if config.logit_scale != 1.0:
            logits *= config.logit_scale
        if config.logit_cap is not None:
            logits.div_(config.logit_cap).tanh_().mul_(config.logit_cap)
        return logits


class DecoderBody:
    """Runs layers, one at a time; holds none."""

    def __init__(self, config: ModelConfig, ops: Ops, max_tokens: int | None) -> None:
        """``max_tokens`` is the longest sequence that will be run, None: what the model can hold."""
        self._config = config
        self._ops = ops
        self._windows = {layer.window for layer in config.layers}
        max_tokens = max_tokens or config.max_positions
        self._ropes = [RotaryEmbedding(rope, config.head_dim, max_tokens, ops) for rope in config.ropes]

    def begin(self, layout: BatchLayout, adapted: Adapted = ()) -> Step:
        """Return what all layers of one forward pass share."""
        config = self._config
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

    def run_layer(self, layer: DecoderLayer, x: Tensor, kv: KVBlocks, step: Step) -> Tensor:
        """Return what the next layer reads [T, E]; writes keys and values, and may overwrite ``x`` [T, E]."""
        return self.finish_layer(layer, x, self.mix(layer, x, kv, step), step.adapted)

    def mix(self, layer: DecoderLayer, x: Tensor, kv: KVBlocks, step: Step) -> Tensor:
        """Return what a layer's heads make of ``x`` [T, E], which is [T, H * D]; writes keys and values."""
        return layer.attention.mix(self._norm(x, layer.before_attention), kv, step)

    def finish_layer(self, layer: DecoderLayer, x: Tensor, mixed: Tensor, adapted: Adapted = ()) -> Tensor:
        """Return what the next layer reads [R, E] of rows that were ``mixed`` [R, H * D]; may overwrite ``x`` [R, E].

        A row's result depends on no other row.
        """
        x = self._add(x, mixed, layer.attention.project, layer.after_attention, adapted)
        return self._add(x, self._norm(x, layer.before_mlp), layer.mlp, layer.after_mlp, adapted)

    def _norm(self, x: Tensor, weight: Tensor | None) -> Tensor:
        return x if weight is None else self._ops.rms_norm(x, weight, self._config.rms_norm_eps)

    def _add(self, x: Tensor, y: Tensor, block: Block, after: Tensor | None, adapted: Adapted) -> Tensor:
        """Return ``x`` [R, E] plus what ``block`` makes of ``y``, normed if it has ``after``; may overwrite ``x``."""
        scale = self._config.residual_scale
        if after is None and scale == 1.0:
            return block(y, x, adapted)
        return self._ops.add(x, self._norm(block(y, None, adapted), after), scale=scale)
