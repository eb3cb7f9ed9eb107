"""What an engine says about itself."""

import enum
from typing import Annotated

import msgspec

from penstock.protocol.generate import Pooling


class EngineState(enum.StrEnum):
    """Where an engine is in its life."""

    LOADING = "loading"
    READY = "ready"
    STALLED = "stalled"
    """There is work and no step has finished lately."""
    RESTARTING = "restarting"
    """The engine process died and another is loading."""
    DRAINING = "draining"
    FAILED = "failed"
    """The engine could not be started; ``EngineStatus.reason`` says why."""
    STOPPED = "stopped"


class MemoryPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Where an engine's memory goes, in bytes unless said otherwise."""

    weights_bytes: int
    activation_peak_bytes: int
    block_bytes: int
    """One block over all layers, keys and values."""
    num_blocks: int
    block_size: int
    """Tokens per block."""
    available_bytes: int
    """What the machine had free for all of it when the plan was made."""
    encoder_weights_bytes: int = 0
    """What images are encoded with."""
    encoder_cache_bytes: int = 0
    """What they may be encoded to at a time."""
    encoder_peak_bytes: int = 0
    """What encoding them works in."""
    image_bytes: int = 0
    """What they take themselves, while they are decoded and while they wait."""

    @property
    def cache_bytes(self) -> int:
        """All blocks together."""
        return self.num_blocks * self.block_bytes

    @property
    def cache_tokens(self) -> int:
        """Tokens that fit in the cache."""
        return self.num_blocks * self.block_size

    @property
    def left_bytes(self) -> int:
        """Available memory that the plan leaves alone."""
        seeing_bytes = (
            self.encoder_weights_bytes + self.encoder_cache_bytes + self.encoder_peak_bytes + self.image_bytes
        )
        fixed_bytes = self.weights_bytes + self.activation_peak_bytes + seeing_bytes
        return self.available_bytes - fixed_bytes - self.cache_bytes


class SamplingDefaults(msgspec.Struct, frozen=True, kw_only=True):
    """What holds where a request leaves a parameter out; see ``SamplingParams``."""

    temperature: Annotated[float, msgspec.Meta(ge=0)] = 1.0
    top_k: Annotated[int, msgspec.Meta(ge=-1)] = 0
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0)] = 1.0


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The model an engine runs."""

    name: str
    """The name it is served under."""
    source: str
    """The directory it was read from."""
    architecture: str
    dtype: str
    """What weights are kept in, quantization included."""
    kv_dtype: str
    """What keys and values are cached in."""
    num_parameters: int
    vocab_size: int
    max_model_tokens: int
    """Most tokens, prompt and answer together, one request may hold."""
    eos_token_ids: tuple[int, ...]
    memory: MemoryPlan
    sampling: SamplingDefaults = SamplingDefaults()
    """What its makers suggest."""
    hidden_size: int
    """Numbers in an embedding."""
    pooling: Pooling = "mean"
    """How embeddings are pooled where a request does not say."""
    kernels: str = "reference"
    """What it computes with: an instruction set, or reference for plain torch."""
    sees: bool = False
    """Whether it takes images."""


class EngineCounters(msgspec.Struct, frozen=True, kw_only=True):
    """Totals since the engine process started."""

    num_steps: int = 0
    num_prompt_tokens: int = 0
    num_generation_tokens: int = 0
    num_prefix_queries: int = 0
    """Prompt tokens looked up in the prefix cache."""
    num_prefix_hits: int = 0
    """Prompt tokens found there."""
    num_preemptions: int = 0
    num_recomputed_tokens: int = 0
    num_evicted_blocks: int = 0
    num_drafts: int = 0
    """Times that tokens were guessed for a sequence and then verified."""
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    """Guesses that came true."""
    decode_s: float = 0.0
    """Seconds in steps where every sequence decoded, if there is speculation."""
    undrafted_decode_s: float = 0.0
    """What the tokens of those would have taken without guesses, by what steps without any were measured to take."""

    @property
    def acceptance_rate(self) -> float:
        """Share of guesses that came true; 0 before the first."""
        return self.num_accepted_tokens / self.num_draft_tokens if self.num_draft_tokens else 0.0

    @property
    def speculation_speedup(self) -> float:
        """How many times as fast decoding is as without guesses; 1 without speculation."""
        return self.undrafted_decode_s / self.decode_s if self.decode_s else 1.0


class SeeingStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How an engine encodes pictures: totals since it started, and what it holds now."""

    num_feature_queries: int = 0
    """Times that a sequence needed a picture's features."""
    num_feature_hits: int = 0
    """Of those, times that they were there, or on the way for another."""
    num_evicted_features: int = 0
    """Pictures whose features were given up for others'."""
    feature_bytes: int = 0
    """Of the features that are held or awaited."""
    most_feature_bytes: int = 0
    num_encoded_pictures: int = 0
    num_encoded_tokens: int = 0
    """Placeholder tokens of those."""
    encode_s: float = 0.0
    """Seconds that encoders took; several processes' are added up."""
    num_workers: int = 0
    """Processes that encode; 0: the engine's does."""
    num_ready_workers: int = 0
    num_worker_restarts: int = 0


class EngineStatus(msgspec.Struct, frozen=True, kw_only=True):
    """An engine at one moment."""

    state: EngineState
    reason: str | None = None
    """Why it is not ready, for people."""
    num_running: int = 0
    num_waiting: int = 0
    num_waiting_tokens: int = 0
    num_free_blocks: int = 0
    """Blocks a request could get now, cached ones that may be evicted included."""
    num_blocks: int = 0
    last_step_age_s: float | None = None
    """Seconds since the last finished step; None before the first."""
    num_restarts: int = 0
    counters: EngineCounters = EngineCounters()
    seeing: SeeingStatus | None = None
    """None for a model that sees nothing."""
    model: ModelInfo | None = None
    """None until the engine has loaded."""

    @property
    def kv_cache_usage(self) -> float:
        """Share of blocks held by requests, 0 to 1."""
        return 1 - self.num_free_blocks / self.num_blocks if self.num_blocks else 0.0
