"""What an operator may tell an engine. Each note says what turning the value up and down does."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import msgspec

from penstock.config import Count, Seconds, Share
from penstock.protocol import Pooling


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerConfig:
    """How requests share the engine's steps."""

    step_tokens: Count = 512
    """Tokens one step may process; prompts take at most three eighths of them where as many others decode. Up: faster
    prefill. Down: steadier time between tokens of others."""
    encoder_patches: Count = 1024
    """Patches of images that one step may take through the model's vision tower; an image that is more work is encoded
    over as many steps as it takes. Up: images are seen sooner. Down: shorter pauses for who decodes beside them."""
    max_running: Count = 256
    """Sequences that may hold cache blocks at once. Up: more throughput. Down: faster tokens for each."""
    max_waiting: Count = 1024
    """Requests that may queue. Up: longer waits. Down: earlier refusals."""
    max_waiting_tokens: Count = 1_000_000
    """Prompt tokens that may queue. Up: longer waits and more memory. Down: earlier refusals."""
    max_image_bytes: Count = 256 << 20
    """Bytes that the pixels of all images may take whose requests wait or run, as they are shown to the model: three a
    pixel. Up: more of them at a time. Down: earlier refusals, more memory for the cache."""
    starvation_s: Seconds = 60.0
    """A request that waited this long is held back by no class. Up: stricter classes. Down: fairer ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheConfig:
    """The pool of KV cache blocks."""

    block_size: Count = 16
    """Tokens per block. Up: less bookkeeping. Down: finer prefix reuse and less waste at the end."""
    memory_bytes: Count | None = None
    """Bytes for all blocks; None sizes the pool from free memory."""
    memory_share: Share = 0.8
    """Share of free memory the engine may use when ``memory_bytes`` is not given. Up: more tokens fit."""
    prefix_caching: bool = True
    """Keep computed blocks for later requests that begin alike."""
    encoder_memory_bytes: Count = 256 << 20
    """Bytes for what images were encoded to, where the model sees: for requests that wait for their turn to compute
    them, and for later ones about the same image. Up: more images at a time, fewer encoded again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunnerConfig:
    """How the model runs."""

    dtype: str = "auto"
    """``auto``, ``float32``, ``bfloat16`` or ``float16``: what weights are kept in. ``auto`` takes the checkpoint's
    own where kernels take it, and float32, which loses nothing, elsewhere. Short names are taken too, such as bf16."""
    kv_dtype: str = "auto"
    """``auto``, ``float32``, ``bfloat16`` or ``int8``: what keys and values are cached in. ``auto`` takes the weights'
    dtype. ``int8``, with a scale for each token and head, holds nearly twice the tokens of bfloat16 in the same memory
    and reads long contexts up to 1.5 times as fast, for nearly the same answers."""
    quantize: str | None = None
    """``int8`` or ``int4`` rounds projections to codes of so many bits at load, and activations to 8: the fastest, at a
    half and a quarter of bfloat16's memory. ``w8a16`` and ``w4a16`` round only the weights: slower than those, a little
    closer. Codes that a checkpoint has stay what they are, if they have no more bits."""
    threads: Annotated[int, msgspec.Meta(ge=1, le=1024)] | None = None
    """Threads one step uses at most; None takes all cores. Where none is left for the HTTP side, steps over fewer than
    eight tokens, which wait for memory, use one less. A thread without a core of its own stalls the others."""
    pin_threads: bool = False
    """Tie each of these threads but one to a core of its own, where that is allowed. On a machine of one's own they
    never change cores; on a shared or virtual one a tied thread waits for its core while others are free, and two
    servers tie theirs to the same cores."""
    max_model_tokens: Count | None = None
    """Most tokens one request may hold, prompt and answer; None takes what the model was made for."""
    pooling: Pooling | None = None
    """``mean`` or ``last``: what embeddings are made of where a request does not say. None: as the model's
    1_Pooling/config.json has it; without one, the mean."""
    encoder_workers: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Processes that encode images beside the engine's, which decodes meanwhile and outlives them, each with weights
    and cores of its own. 0: steps encode, and wait for it."""
    encoder_timeout_s: Seconds = 300.0
    """Such a process that takes longer for what it was handed is ended and started again. Up: larger images on slower
    machines. Down: one that hangs is noticed sooner."""
    max_adapters: Annotated[int, msgspec.Meta(ge=0)] = 0
    """LoRA adapters that may be loaded at once, by whoever reaches the API; above 0, steps are a little slower."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeculationConfig:
    """Guessing tokens that a step then verifies together. Answers are the same with it and without."""

    method: Literal["off", "ngram", "suffix", "draft"] = "off"
    """What guesses: ``ngram`` goes on as the prompt did after the same three tokens, ``suffix`` as prompt and answer
    did after the longest run of the same tokens, ``draft`` as a smaller model does. What does not pay is not made."""
    model: str | None = None
    """The smaller model of ``draft``: one with the same vocabulary."""
    max_tokens: Count = 8
    """Most tokens guessed at a time. Up: faster where text repeats itself at length. Down: less is tried in vain."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """All of the engine's settings."""

    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    runner: RunnerConfig = field(default_factory=RunnerConfig)
    speculation: SpeculationConfig = field(default_factory=SpeculationConfig)
