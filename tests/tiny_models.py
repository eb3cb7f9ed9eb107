"""Tiny random checkpoints of every native family, made with transformers, which is also the oracle."""

import json
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCAB_SIZE = 320
EOS_ID = 258

SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "eos_token_id": EOS_ID,
    "bos_token_id": None,
    "pad_token_id": None,
}

_ROPE = {"rope_theta": 10000.0}
_LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope",
        "short_factor": [1.0 + i / 8 for i in range(6)],
        "long_factor": [2.0 + i for i in range(6)],
        "partial_rotary_factor": 0.75,
        **_ROPE,
    }
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied-biases": ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, **_ROPE}}),
    "llama-dynamic": (
        "Llama",
        {"max_position_embeddings": 64, "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, **_ROPE}},
    ),
    "llama-llama3": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
                **_ROPE,
            }
        },
    ),
    "llama-yarn": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                **_ROPE,
            }
        },
    ),
    "mistral": ("Mistral", {"sliding_window": 24}),
    "mistral-full": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {}),
    "olmo2": ("Olmo2", {}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 4}),
    "smollm3-windows": (
        "SmolLM3",
        {"num_hidden_layers": 4, "no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 24},
    ),
    "granite": (
        "Granite",
        {
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.1,
            "logits_scaling": 8.0,
            "attention_bias": True,
        },
    ),
    "phi3": ("Phi3", {"sliding_window": 24}),
    "phi3-partial": ("Phi3", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.75, **_ROPE}}),
    "phi3-long": (
        "Phi3",
        {
            "max_position_embeddings": 512,
            "original_max_position_embeddings": 32,
            "initializer_range": 0.25,
            **_LONGROPE,
        },
    ),
    "gemma": ("Gemma", {"num_key_value_heads": 1}),
    "gemma2": (
        "Gemma2",
        {
            "num_hidden_layers": 3,
            "sliding_window": 24,
            "query_pre_attn_scalar": 24,
            "tie_word_embeddings": False,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            "num_hidden_layers": 4,
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
            "query_pre_attn_scalar": 24,
        },
    ),
    "gemma3-scaled": (
        "Gemma3",
        {
            "num_hidden_layers": 6,
            "sliding_window": 24,
            "tie_word_embeddings": False,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "gemma3-pattern": ("Gemma3", {"num_hidden_layers": 7, "sliding_window": 24, "tie_word_embeddings": False}),
    "mixtral": ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "qwen3-moe": (
        "Qwen3Moe",
        {
            "num_hidden_layers": 3,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "mlp_only_layers": [1],
            "norm_topk_prob": True,
        },
    ),
    "qwen3-moe-sparse": (
        "Qwen3Moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True},
    ),
    "qwen3-moe-unnormalized": (
        "Qwen3Moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 2},
    ),
}
"""Name -> (transformers' class prefix, what differs from the shape above)."""

UPSTREAM: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt-neox": ("GPTNeoX", {}),
    "stablelm": ("StableLm", {"use_qkv_bias": True, "qk_layernorm": True}),
    "cohere2": ("Cohere2", {"num_hidden_layers": 4, "sliding_window": 24}),
    "olmoe": ("Olmoe", {"num_experts": 6, "num_experts_per_tok": 2}),
}
"""Likewise, of families that transformers' code runs."""
EVERY = FAMILIES | UPSTREAM

_CONFIGS = {"Gemma3": "Gemma3TextConfig"}
"""Where a class's configuration is not called like it"""


def make_checkpoint(
    path: Path,
    family: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    **overrides: Any,
) -> Path:
    """Write a random checkpoint of ``family`` with a byte tokenizer to directory ``path`` and return it.

    Biases and norms are random too, so that a forgotten one shows.
    """
    prefix, differences = EVERY[family]
    config = getattr(transformers, _CONFIGS.get(prefix, f"{prefix}Config"))(**{**SHAPE, **differences, **overrides})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.3 + (1.0 if "norm.weight" in name else 0.0))
            assert parameter.std() > 0.01, f"{name} would hide what is wrong with it"
    model.to(dtype).save_pretrained(path, max_shard_size=max_shard_size)
    write_tokenizer(path)
    return path


def write_tokenizer(path: Path) -> None:
    """Write a byte-level tokenizer whose ids 0-255 are the bytes, and a ChatML template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "chat_template": CHAT_TEMPLATE, "model_max_length": 512}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))


def make_talker(path: Path, chains: list[list[str]], chat_template: str) -> Path:
    """Write a model to directory ``path`` that says the ``chains`` of pieces, each a token of its own, and ends.

    A piece is followed by the next of its chain, the last by the end of sequence; a new line before the answer, which
    every template ends with, by the first of the first chain. Attention and gates add nothing: all it knows is the last
    token. No piece may be in two chains.
    """
    config = transformers.LlamaConfig(**{**SHAPE, "max_position_embeddings": 2048})
    model = transformers.LlamaForCausalLM(config)
    write_tokenizer(path)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.add_tokens([piece for chain in chains for piece in chain])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": chat_template}))
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embeddings = torch.nn.functional.normalize(torch.randn(VOCAB_SIZE, config.hidden_size), dim=-1)
        model.model.embed_tokens.weight.copy_(embeddings)
        model.lm_head.weight.zero_()
        for chain in chains:
            ids = [tokenizer.token_to_id(piece) for piece in chain]
            before = tokenizer.encode("\n").ids if chain is chains[0] else []
            for token_id, following in pairwise([*before, *ids, EOS_ID]):
                model.lm_head.weight[following] += 2 * embeddings[token_id]
    model.save_pretrained(path)
    return path


@lru_cache(maxsize=32)
def reference(path: Path) -> Any:
    """Return transformers' model of a checkpoint, in float32."""
    # Whatever mode it is first asked for in, others will use it.
    with torch.inference_mode(False):
        return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@torch.no_grad()
def reference_logits(path: Path, token_ids: list[int]) -> torch.Tensor:
    """Return [T, V] logits of one sequence."""
    logits: torch.Tensor = reference(path)(torch.tensor([token_ids])).logits[0]
    return logits


def reference_greedy(path: Path, token_ids: list[int], num_tokens: int) -> list[int]:
    """Return the tokens transformers' greedy ``generate`` adds, end of sequence ignored."""
    return list(_generated(path, tuple(token_ids), num_tokens))


@lru_cache(maxsize=1024)
@torch.no_grad()
def _generated(path: Path, token_ids: tuple[int, ...], num_tokens: int) -> tuple[int, ...]:
    output = reference(path).generate(
        torch.tensor([token_ids]),
        attention_mask=torch.ones(1, len(token_ids), dtype=torch.int64),
        do_sample=False,
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        eos_token_id=None,
        pad_token_id=0,
    )
    return tuple(output[0, len(token_ids) :].tolist())
