"""A decoder's shape and settings, in one form for all families. Pure data; no torch here."""

from collections.abc import Mapping
from dataclasses import dataclass, field

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rope:
    """Rotary angles: their base, and how they are stretched beyond the trained context."""

    theta: float
    rotary_dim: int
    """How many of a head's first elements are rotated."""
    sections: tuple[int, ...] = ()
    """How many of its pairs turn with a token's time, its row and its column, where positions have three axes."""
    kind: str = "default"
    """default, linear, dynamic, llama3, yarn or longrope"""
    factor: float = 1.0
    original_max_positions: int = 0
    """The context before it was stretched."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    """longrope's divisors of frequencies, for contexts up to ``original_max_positions``"""
    long_factors: tuple[float, ...] = ()
    """and beyond"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Experts:
    """A feed-forward block of which each token uses a few of many."""

    num_experts: int
    num_active: int
    """Experts a token uses."""
    intermediate_size: int
    normalize: bool
    """Have the weights of a token's experts sum to one."""
    name: str = "mlp"
    gate_up_down: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    """What an expert's three projections are called."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerConfig:
    """What may differ from layer to layer."""

    window: int | None = None
    """How many tokens back it sees, the current one included; None: all."""
    rope: Rope | None
    """None: queries and keys are not rotated."""
    experts: Experts | None = None
    """None: one gated feed-forward."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Norms:
    """What a layer's norms are called, and where they stand: before or after a block, on the way into the sum."""

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None
    offset: float = 0.0
    """Added to every norm's weight, those of heads included: 1 where weights are kept as deviations from one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionConfig:
    """What the engine has to know of a model that sees; what its encoder looks like is the encoder's."""

    image_token_id: int
    """The placeholder where a row of an image's features goes"""
    video_token_id: int | None = None
    """And of a video's, where that is another or there are any"""
    sees_both_ways: bool = False
    """A picture's tokens see each other whatever their order, so that none may be computed without the others."""
    reads_prompts_whole: bool = False
    """So do all tokens of a prompt that shows a picture; only what is generated sees no more than what came before."""
    has_three_axes: bool = False
    """Positions are in time, row and column: ``vision.RotaryPositions``."""
    scales_features: bool = False
    """The decoder's ``embedding_scale`` is features' too, not of text alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A decoder's shape. Defaults are Llama's; ``families`` says what each architecture changes."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerConfig, ...]
    max_positions: int
    """Tokens the checkpoint says it can hold, scaling included."""
    is_native: bool = True
    """Whether a native family runs it. Where transformers' code does, only sizes are filled in, windows included."""
    rms_norm_eps: float = 1e-6
    norms: Norms = field(default_factory=Norms)
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    fused_projections: bool = False
    """The checkpoint keeps ``qkv_proj`` and ``gate_up_proj`` as one tensor each."""
    qk_norm: str = "none"
    """Normalize queries and keys before rotation: ``heads``, each by itself; ``projection``, all heads as one row."""
    activation: str = "silu"
    """Of the feed-forward's gate: ``silu`` or ``gelu_tanh``."""
    attention_scale: float = 1.0
    """What scores are multiplied by."""
    score_cap: float | None = None
    """Scores s become cap * tanh(s / cap)."""
    logit_cap: float | None = None
    """Logits likewise."""
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    """What a block's result is multiplied by before it is added."""
    logit_scale: float = 1.0
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "float32"
    """The checkpoint's own."""
    low_rank: Mapping[str, int] = field(default_factory=dict)
    """Ranks of products that are two matrices one after the other, by the first of their projections."""
    vision: VisionConfig | None = None
    """None: text is all it reads."""

    @property
    def num_layers(self) -> int:
        """How many layers."""
        return len(self.layers)

    @property
    def window(self) -> int | None:
        """Tokens that matter to any layer; None where some layer sees all."""
        windows = [layer.window for layer in self.layers if layer.window is not None]
        return max(windows) if windows and len(windows) == self.num_layers else None

    @property
    def ropes(self) -> list[Rope | None]:
        """The different rotations of its layers."""
        return list(dict.fromkeys(layer.rope for layer in self.layers))

    @property
    def inserted_scale(self) -> float:
        """What an encoder's features are multiplied by on their way into the decoder."""
        return self.embedding_scale if self.vision is not None and self.vision.scales_features else 1.0

    @property
    def mlp_width(self) -> int:
        """Elements that a feed-forward holds of one token: a hidden row, and a copy of the token for each expert."""
        return max(
            self.intermediate_size
            if layer.experts is None
            else layer.experts.intermediate_size + layer.experts.num_active * self.hidden_size
            for layer in self.layers
        )
