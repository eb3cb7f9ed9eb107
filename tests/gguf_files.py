"""GGUF files written with ggml's own package from tiny checkpoints, as its conversion of models writes them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers

from tests.tiny_models import CHAT_TEMPLATE, EOS_ID, VOCAB_SIZE

Quantize = Callable[[np.ndarray], tuple[np.ndarray, gguf.GGMLQuantizationType]]
"""A matrix in float32 to its blocks and their format"""

ARCHITECTURES = {
    "llama": "llama",
    "llama-llama3": "llama",
    "llama-linear": "llama",
    "llama-yarn": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3-moe-sparse": "qwen3moe",
    "gemma2": "gemma2",
    "gemma3-pattern": "gemma3",
}
"""Of the families in ``tiny_models`` that ggml has"""


def as_floats(matrix: np.ndarray) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
    """Keep float32."""
    return matrix, gguf.GGMLQuantizationType.F32


def as_format(kind: gguf.GGMLQuantizationType) -> Quantize:
    """Have ggml's package quantize to ``kind``."""
    return lambda matrix: (gguf.quants.quantize(matrix, kind), kind)


def random_blocks(kind: gguf.GGMLQuantizationType) -> Quantize:
    """Ignore the matrix: the package cannot write the K formats, so any codes with small scales will do."""

    def quantize(matrix: np.ndarray) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
        block_elements, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        rows, row_blocks = matrix.shape[0], matrix.shape[1] // block_elements
        blocks = np.random.default_rng(rows).integers(0, 256, (rows, row_blocks, block_bytes), dtype=np.uint8)
        scales = np.array([2e-4, 1e-4], dtype=np.float16).view(np.uint8)
        if kind is gguf.GGMLQuantizationType.Q6_K:
            blocks[..., 208:] = scales[:2]
        else:
            blocks[..., :4] = scales
        return blocks.reshape(rows, -1), kind

    return quantize


def write_gguf(checkpoint: Path, file: Path, family: str, quantize: Quantize = as_floats) -> Path:
    """Write the checkpoint to ``file``, and the weights that ``quantize`` leaves back to the checkpoint.

    Embedding and head stay float32. Returns ``file``.
    """
    config = json.loads((checkpoint / "config.json").read_text())
    architecture = ARCHITECTURES[family]
    writer = gguf.GGUFWriter(file, architecture)
    _write_sizes(writer, config, architecture)
    _write_tokenizer(writer)
    tensors = load_file(checkpoint / "model.safetensors")
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    experts: dict[str, list[np.ndarray]] = {}
    for name in sorted(tensors, key=_expert_number):
        tensor = tensors[name]
        if tensor.ndim == 2 and "embed" not in name and "lm_head" not in name:
            blocks, kind = quantize(tensor.float().numpy())
            kept = gguf.quants.dequantize(blocks, kind)
            tensors[name] = torch.from_numpy(kept.reshape(tuple(tensor.shape)).copy()).to(tensor.dtype)
        else:
            blocks, kind = as_floats(tensor.float().numpy())
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            blocks = blocks + 1
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            key = "num_attention_heads" if "q_proj" in name else "num_key_value_heads"
            blocks = _interleaved(blocks, config[key])
        stem, _, suffix = name.rpartition(".")
        if ".experts." in stem:
            whole, _, last = stem.rpartition(".experts.")
            stem = f"{whole}.experts.{last.split('.')[1]}"
            experts.setdefault(stem, []).append(blocks)
            if len(experts[stem]) < config["num_local_experts"]:
                continue
            blocks = np.stack(experts.pop(stem))
        ours = names.get_name(stem)
        assert ours is not None, stem
        writer.add_tensor(f"{ours}.{suffix}", np.ascontiguousarray(blocks), raw_dtype=kind)
    if config["rope_parameters"].get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3_divisors(config))
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _expert_number(name: str) -> tuple[int, str]:
    return (int(name.split(".experts.")[1].split(".")[0]) if ".experts." in name else 0), name


def _interleaved(rows: np.ndarray, num_heads: int) -> np.ndarray:
    return rows.reshape(num_heads, 2, len(rows) // num_heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _llama3_divisors(config: dict[str, Any]) -> np.ndarray:
    rope = config["rope_parameters"]
    inverse = 1.0 / rope["rope_theta"] ** (np.arange(0, config["head_dim"], 2) / config["head_dim"])
    wavelengths, trained = 2 * np.pi / inverse, rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = (trained / wavelengths - low) / (high - low)
    blended = 1 / ((1 - smooth) / rope["factor"] + smooth)
    divisors = np.where(
        wavelengths < trained / high, 1.0, np.where(wavelengths > trained / low, rope["factor"], blended)
    )
    return divisors.astype(np.float32)


def _write_sizes(writer: gguf.GGUFWriter, config: dict[str, Any], architecture: str) -> None:
    rope = config["rope_parameters"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if rope.get("rope_type") in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
        if "original_max_position_embeddings" in rope:
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if "num_local_experts" in config:
        writer.add_expert_count(config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        if "moe_intermediate_size" in config:
            writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if architecture.startswith("gemma"):
        writer.add_sliding_window(config["sliding_window"])
        writer.add_attention_scale(config["query_pre_attn_scalar"] ** -0.5)
        if config.get("attn_logit_softcapping"):
            writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        if config.get("final_logit_softcapping"):
            writer.add_final_logit_softcapping(config["final_logit_softcapping"])


def _write_tokenizer(writer: gguf.GGUFWriter) -> None:
    """The byte tokenizer of ``tiny_models``, with unused tokens up to the size of the vocabulary."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    unused = [f"[PAD{i}]" for i in range(len(bytes_) + len(special), VOCAB_SIZE)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*bytes_, *special, *unused])
    kinds = [*[gguf.TokenType.NORMAL] * len(bytes_), *[gguf.TokenType.CONTROL] * len(special)]
    writer.add_token_types([*kinds, *[gguf.TokenType.UNUSED] * len(unused)])
    writer.add_eos_token_id(EOS_ID)
    writer.add_chat_template(CHAT_TEMPLATE)
