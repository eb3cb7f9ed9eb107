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

_SHAPE: dict[str, Any] = {
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
}
"""Name -> (transformers' class prefix, what differs from the shape above)."""


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
    prefix, differences = FAMILIES[family]
    config = getattr(transformers, f"{prefix}Config")(**{**_SHAPE, **differences, **overrides})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.3 + (1.0 if "norm" in name else 0.0))
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
    config = transformers.LlamaConfig(**{**_SHAPE, "max_position_embeddings": 2048})
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
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@torch.no_grad()
def reference_logits(path: Path, token_ids: list[int]) -> torch.Tensor:
    """Return [T, V] logits of one sequence."""
    logits: torch.Tensor = reference(path)(torch.tensor([token_ids])).logits[0]
    return logits


@torch.no_grad()
def reference_greedy(path: Path, token_ids: list[int], num_tokens: int) -> list[int]:
    """Return the tokens transformers' greedy ``generate`` adds, end of sequence ignored."""
    output = reference(path).generate(
        torch.tensor([token_ids]),
        attention_mask=torch.ones(1, len(token_ids), dtype=torch.int64),
        do_sample=False,
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        eos_token_id=None,
        pad_token_id=0,
    )
    generated: list[int] = output[0, len(token_ids) :].tolist()
    return generated
