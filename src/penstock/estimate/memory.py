"""Where an engine's memory goes, worked out before anything is loaded."""

from dataclasses import dataclass

from penstock.errors import NotEnoughMemory
from penstock.protocol import MemoryPlan
from penstock.units import format_bytes

_FLOAT32_BYTES = 4
_LOGIT_BYTES = 3 * _FLOAT32_BYTES
"""Per logit of a sampled row: itself, a copy where log-probabilities are to be of what the model said, and what a
grammar adds to it."""
LEAST_SAMPLED_ROWS = 16
"""Rows of a step that may be sampled however few sequences may run: one of them may guess what follows"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """The sizes of a decoder that decide its memory."""

    weights_bytes: int
    """All parameters in the dtype they run in."""
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    activation_element_bytes: int
    """Bytes per activation."""
    kv_element_bytes: int
    """Bytes per element of a cached key or value."""
    attention_scratch_bytes: int = 0
    """What one layer's attention works in beside queries, keys, values and result."""
    sampling_scratch_bytes: int = 0
    """What sampling works in, however many rows there are."""
    kv_scale_bytes: int = 0
    """Bytes of the scale beside each head's key and value, where elements are codes."""
    draft: "ModelShape | None" = None
    """The smaller model that guesses for it, whose cache has as many blocks"""
    encoder_weights_bytes: int = 0
    """What it sees with"""
    encoder_cache_bytes: int = 0
    """What images may be encoded to at a time"""
    encoder_peak_bytes: int = 0
    """What encoding one works in"""
    image_bytes: int = 0
    """Images themselves, before they are encoded"""

    @property
    def kv_bytes_per_token(self) -> int:
        """One token's keys and values over all layers."""
        head_bytes = self.head_dim * self.kv_element_bytes + self.kv_scale_bytes
        own = 2 * self.num_layers * self.num_kv_heads * head_bytes
        return own if self.draft is None else own + self.draft.kv_bytes_per_token

    @property
    def all_weights_bytes(self) -> int:
        """Its own and the draft model's."""
        return self.weights_bytes + (0 if self.draft is None else self.draft.all_weights_bytes)

    @property
    def seeing_bytes(self) -> int:
        """All that it takes to see."""
        return self.encoder_weights_bytes + self.encoder_cache_bytes + self.encoder_peak_bytes + self.image_bytes


def plan_memory(
    shape: ModelShape,
    *,
    block_size: int,
    step_tokens: int,
    max_running: int,
    max_model_tokens: int,
    available_bytes: int,
    memory_bytes: int | None,
    memory_share: float,
) -> MemoryPlan:
    """Return a plan whose cache holds at least one request of ``max_model_tokens``.

    ``memory_bytes`` is the cache's size if the operator gave one; otherwise the cache takes what weights and
    activations leave of ``memory_share`` of ``available_bytes``. Either way it gets no more blocks than
    ``max_running`` requests of ``max_model_tokens`` can fill.
    Raises NotEnoughMemory, naming what is needed and what would help.
    """
    activation_bytes = activation_peak_bytes(shape, step_tokens=step_tokens, max_running=max_running)
    block_bytes = block_size * shape.kv_bytes_per_token
    blocks_per_request = -(-max_model_tokens // block_size)
    fixed_bytes = shape.all_weights_bytes + activation_bytes + shape.seeing_bytes
    usable_bytes = int(available_bytes * memory_share) if memory_bytes is None else available_bytes
    cache_bytes = usable_bytes - fixed_bytes if memory_bytes is None else memory_bytes
    if memory_bytes is not None and fixed_bytes + memory_bytes > available_bytes:
        raise NotEnoughMemory(
            f"a cache of {format_bytes(memory_bytes)} beside weights of {format_bytes(shape.all_weights_bytes)} "
            f"{_seeing(shape.seeing_bytes)}and activations of {format_bytes(activation_bytes)} exceeds the "
            f"{format_bytes(available_bytes)} available; lower --cache-memory, or leave it out to size the cache from "
            "free memory"
        )
    if cache_bytes < blocks_per_request * block_bytes:
        raise NotEnoughMemory(
            _too_small(
                shape.all_weights_bytes,
                shape.seeing_bytes,
                activation_bytes,
                blocks_per_request * block_bytes,
                max(cache_bytes, 0),
                max_model_tokens=max_model_tokens,
                tokens_that_fit=max(cache_bytes, 0) // block_bytes * block_size,
                available_bytes=available_bytes,
                memory_share=memory_share if memory_bytes is None else None,
            )
        )
    return MemoryPlan(
        weights_bytes=shape.all_weights_bytes,
        activation_peak_bytes=activation_bytes,
        block_bytes=block_bytes,
        num_blocks=min(cache_bytes // block_bytes, max_running * blocks_per_request),
        block_size=block_size,
        available_bytes=available_bytes,
        encoder_weights_bytes=shape.encoder_weights_bytes,
        encoder_cache_bytes=shape.encoder_cache_bytes,
        encoder_peak_bytes=shape.encoder_peak_bytes,
        image_bytes=shape.image_bytes,
    )


def activation_peak_bytes(shape: ModelShape, *, step_tokens: int, max_running: int) -> int:
    """Return an upper bound on what one step holds beside weights and cache.

    Layers run one after another and free what they made: the peak is the residual stream plus the widest moment.

    - attention: queries, keys and values before and after rotation and the output, for all tokens of the step; and what
      attention works in;
    - feed-forward: gate, up and their product, with the product's float32 twin;
    - sampling: the logits, a copy of them and what grammars add, one row per running sequence, and what sampling works
      in.
    """
    element = shape.activation_element_bytes
    query_width = shape.num_heads * shape.head_dim
    kv_width = shape.num_kv_heads * shape.head_dim
    # The stream itself, its normalized copy, and the float32 the norm computes in.
    residual = step_tokens * shape.hidden_size * (2 * element + _FLOAT32_BYTES)
    attention = step_tokens * (3 * query_width + 4 * kv_width) * element + shape.attention_scratch_bytes
    feed_forward = step_tokens * shape.intermediate_size * (3 * element + _FLOAT32_BYTES)
    num_rows = min(max(max_running, LEAST_SAMPLED_ROWS), step_tokens)
    sampling = num_rows * shape.vocab_size * _LOGIT_BYTES + shape.sampling_scratch_bytes
    return residual + max(attention, feed_forward, sampling)


def format_memory_plan(plan: MemoryPlan) -> str:
    """Return the plan as the small table an operator sees at start."""
    rows: tuple[tuple[str, int, str], ...] = (
        ("weights", plan.weights_bytes, ""),
        ("activation peak", plan.activation_peak_bytes, ""),
        (
            "cache",
            plan.cache_bytes,
            f"{plan.num_blocks:,} blocks of {plan.block_size} tokens: {plan.cache_tokens:,} tokens fit",
        ),
        ("left", plan.left_bytes, f"of {format_bytes(plan.available_bytes)} available"),
    )
    if plan.encoder_cache_bytes:
        seeing = (
            ("encoder", plan.encoder_weights_bytes, ""),
            ("encoder peak", plan.encoder_peak_bytes, ""),
            ("encoder cache", plan.encoder_cache_bytes, "what images are encoded to"),
            ("images", plan.image_bytes, "that are decoded, or wait for their turn"),
        )
        rows = (*rows[:1], *seeing, *rows[1:])
    lines = [f"  {name:<16}{format_bytes(num_bytes):>11}  {note}".rstrip() for name, num_bytes, note in rows]
    return "\n".join(["memory plan", *lines])


def _too_small(
    weights_bytes: int,
    seeing_bytes: int,
    activation_bytes: int,
    request_bytes: int,
    cache_bytes: int,
    *,
    max_model_tokens: int,
    tokens_that_fit: int,
    available_bytes: int,
    memory_share: float | None,
) -> str:
    """Say what one full-length request needs, what there is, and which knob would help."""
    needed = (
        f"one request of {max_model_tokens:,} tokens needs {format_bytes(request_bytes)} of cache beside "
        f"{format_bytes(weights_bytes)} of weights {_seeing(seeing_bytes)}and {format_bytes(activation_bytes)} of "
        "activations"
    )
    if memory_share is None:
        have = f"--cache-memory allows {format_bytes(cache_bytes)}"
        remedies = ["raise --cache-memory"]
    else:
        have = f"the engine may use {memory_share:.0%} of the {format_bytes(available_bytes)} available"
        remedies = ["free memory", "raise --memory-share"] if memory_share < 1 else ["free memory"]
    if tokens_that_fit:
        remedies.insert(0, f"lower --max-model-tokens to {tokens_that_fit:,} or less")
    else:
        remedies.append("serve a smaller model")
    return f"{needed}, but {have}; {', or '.join(remedies)}"


def _seeing(num_bytes: int) -> str:
    return f"with {format_bytes(num_bytes)} for images " if num_bytes else ""
