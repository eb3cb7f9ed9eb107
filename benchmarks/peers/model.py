"""A model directory in Hugging Face layout: a published shape, random weights, a tokenizer of the same size.

Every id's text is ASCII but for 128 bytes, so that each token a server streams is a piece of text that can be counted.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

_INITIALIZER_RANGE = 0.02
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A Qwen2 decoder's sizes, named as its config.json names them."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int = 32768

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of one token's keys and values in 16 bits."""
        head_dim = self.hidden_size // self.num_attention_heads
        return 2 * 2 * self.num_hidden_layers * self.num_key_value_heads * head_dim


SHAPES = {
    "qwen2.5-0.5b": Shape(
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
    ),
    "small": Shape(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
    ),
    "tiny": Shape(
        vocab_size=1024,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=4096,
    ),
}
"""Qwen2.5-0.5B's, and two to try things on"""


def make_model(path: Path, shape: Shape, *, seed: int = 0) -> Path:
    """Write the model to ``path`` unless it is there, and return ``path``. Weights are bfloat16, the head is tied."""
    if path.exists():
        return path
    unfinished = path.with_name(f"{path.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    tokenizer = _tokenizer(shape.vocab_size)
    tokenizer.save(str(unfinished / "tokenizer.json"))
    eos_token_id = tokenizer.token_to_id("<|endoftext|>")
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        **asdict(shape),
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "attention_dropout": 0.0,
        "initializer_range": _INITIALIZER_RANGE,
        "torch_dtype": "bfloat16",
        "bos_token_id": eos_token_id,
        "eos_token_id": eos_token_id,
    }
    _write_json(unfinished / "config.json", config)
    _write_json(unfinished / "generation_config.json", {"do_sample": False, "eos_token_id": eos_token_id})
    _write_json(
        unfinished / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "clean_up_tokenization_spaces": False,
        },
    )
    save_file(_random_weights(shape, seed), unfinished / "model.safetensors", metadata={"format": "pt"})
    return unfinished.rename(path)


def prompt_token_ids(shape: Shape) -> range:
    """Return the ids prompts are drawn from: words, neither bytes nor special."""
    return range(256, shape.vocab_size - 1)


def _tokenizer(vocab_size: int) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f"Ġ{_word(i)}" for i in range(vocab_size - len(alphabet) - 1)]
    vocab = {token: i for i, token in enumerate([*alphabet, *words])}
    # One merge, because readers of GGUF files refuse a tokenizer without any.
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("Ġ", "a")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    assert tokenizer.get_vocab_size() == vocab_size
    return tokenizer


def _word(number: int) -> str:
    """Return the ``number``-th of a, b, .. z, aa, ab, .."""
    letters = ""
    number += 1
    while number:
        number, letter = divmod(number - 1, len(_LETTERS))
        letters = _LETTERS[letter] + letters
    return letters


def _random_weights(shape: Shape, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    E, F_ = shape.hidden_size, shape.intermediate_size
    kv = E // shape.num_attention_heads * shape.num_key_value_heads

    def random(*size: int) -> Tensor:
        return (torch.randn(*size, generator=generator) * _INITIALIZER_RANGE).bfloat16()

    weights = {"model.embed_tokens.weight": random(shape.vocab_size, E), "model.norm.weight": torch.ones(E).bfloat16()}
    for layer in range(shape.num_hidden_layers):
        name = f"model.layers.{layer}"
        weights |= {
            f"{name}.input_layernorm.weight": torch.ones(E).bfloat16(),
            f"{name}.post_attention_layernorm.weight": torch.ones(E).bfloat16(),
            f"{name}.self_attn.o_proj.weight": random(E, E),
            f"{name}.mlp.gate_proj.weight": random(F_, E),
            f"{name}.mlp.up_proj.weight": random(F_, E),
            f"{name}.mlp.down_proj.weight": random(E, F_),
        }
        for projection, width in (("q_proj", E), ("k_proj", kv), ("v_proj", kv)):
            weights[f"{name}.self_attn.{projection}.weight"] = random(width, E)
            weights[f"{name}.self_attn.{projection}.bias"] = random(width)
    return weights


def _write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
