"""Published models' sizes, to be run with random weights: speed without a download.

Values are those of each model's config.json on its publisher's page; how fast a model runs depends on nothing else.
"""

from penstock.errors import ModelUnreadable
from penstock.models.config import LayerConfig, ModelConfig, Rope

SHAPE_PREFIX = "shape:"
"""Begins the name of a model with random weights: ``shape:qwen2.5-0.5b``."""


def find_shape(name: str) -> ModelConfig | None:
    """Return the sizes that a model name such as ``shape:qwen2.5-0.5b`` stands for; None if it names no shape.

    Raises ``ModelUnreadable`` for a shape that is not in the table.
    """
    if not name.startswith(SHAPE_PREFIX):
        return None
    shape = SHAPES.get(name.removeprefix(SHAPE_PREFIX))
    if shape is None:
        raise ModelUnreadable(f"there is no shape {name.removeprefix(SHAPE_PREFIX)!r}; there are {', '.join(SHAPES)}")
    return shape


def _shape(
    architecture: str,
    *,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    intermediate: int,
    vocab: int,
    context: int,
    theta: float,
    tied: bool,
    eps: float = 1e-5,
    rope_factor: float | None = None,
) -> ModelConfig:
    return ModelConfig(
        architecture=architecture,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=eps,
        layers=(LayerConfig(rope=_rope(theta, head_dim, rope_factor)),) * layers,
        max_positions=context,
        tie_word_embeddings=tied,
        qkv_bias=architecture == "Qwen2ForCausalLM",
        qk_norm="heads" if architecture == "Qwen3ForCausalLM" else "none",
        attention_scale=head_dim**-0.5,
        dtype="bfloat16",
    )


def _rope(theta: float, head_dim: int, llama3_factor: float | None) -> Rope:
    if llama3_factor is None:
        return Rope(theta=theta, rotary_dim=head_dim)
    return Rope(
        theta=theta,
        rotary_dim=head_dim,
        kind="llama3",
        factor=llama3_factor,
        original_max_positions=8192,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    )


# fmt: off
SHAPES: dict[str, ModelConfig] = {
    # The random Llama that benchmarks/vs_transformers.py measures; nobody published it.
    "llama-0.1b": _shape(
        "LlamaForCausalLM", layers=12, hidden=768, heads=12, kv_heads=4, head_dim=64, intermediate=2048,
        vocab=32000, context=2048, theta=1e4, tied=True, eps=1e-6,
    ),
    # HuggingFaceTB/SmolLM2-135M-Instruct
    "smollm2-135m": _shape(
        "LlamaForCausalLM", layers=30, hidden=576, heads=9, kv_heads=3, head_dim=64, intermediate=1536,
        vocab=49152, context=8192, theta=1e5, tied=True,
    ),
    # Qwen/Qwen2.5-0.5B-Instruct
    "qwen2.5-0.5b": _shape(
        "Qwen2ForCausalLM", layers=24, hidden=896, heads=14, kv_heads=2, head_dim=64, intermediate=4864,
        vocab=151936, context=32768, theta=1e6, tied=True, eps=1e-6,
    ),
    # Qwen/Qwen3-0.6B
    "qwen3-0.6b": _shape(
        "Qwen3ForCausalLM", layers=28, hidden=1024, heads=16, kv_heads=8, head_dim=128, intermediate=3072,
        vocab=151936, context=40960, theta=1e6, tied=True, eps=1e-6,
    ),
    # meta-llama/Llama-3.2-1B-Instruct
    "llama-3.2-1b": _shape(
        "LlamaForCausalLM", layers=16, hidden=2048, heads=32, kv_heads=8, head_dim=64, intermediate=8192,
        vocab=128256, context=131072, theta=5e5, tied=True, rope_factor=32.0,
    ),
    # Qwen/Qwen2.5-1.5B-Instruct
    "qwen2.5-1.5b": _shape(
        "Qwen2ForCausalLM", layers=28, hidden=1536, heads=12, kv_heads=2, head_dim=128, intermediate=8960,
        vocab=151936, context=32768, theta=1e6, tied=True, eps=1e-6,
    ),
    # mistralai/Mistral-7B-Instruct-v0.3
    "mistral-7b": _shape(
        "MistralForCausalLM", layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, intermediate=14336,
        vocab=32768, context=32768, theta=1e6, tied=False,
    ),
    # meta-llama/Llama-3.1-8B-Instruct
    "llama-3.1-8b": _shape(
        "LlamaForCausalLM", layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, intermediate=14336,
        vocab=128256, context=131072, theta=5e5, tied=False, rope_factor=8.0,
    ),
}
# fmt: on
"""By name, smallest first."""
