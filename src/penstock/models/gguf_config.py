"""A GGUF file's metadata as a config.json would say it. No torch here."""

from pathlib import Path
from typing import Any

from penstock.errors import ModelUnreadable
from penstock.gguf.dequantize import FORMATS
from penstock.gguf.reader import GGUFFile, read_gguf
from penstock.models.config_json import ConfigJson

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3moe": "Qwen3MoeForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}
_KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
"""What stands under the architecture's name, and what config.json calls it."""
_SCALED_BY_WIDTH = {"gemma2": 46, "gemma3": 62}
"""Layers of the sizes (27B) whose scores are scaled by hidden width over heads; older files do not say so."""


def gguf_config(path: Path) -> ConfigJson:
    """Return what the config.json of the model in file ``path`` would say. Raises ``ModelUnreadable``."""
    file = read_gguf(path)
    name = file.metadata.get("general.architecture")
    if name not in _ARCHITECTURES:
        raise ModelUnreadable(
            f"{path}: architecture {name!r} is not one Penstock reads from GGUF ({', '.join(_ARCHITECTURES)}); serve "
            "its directory in Hugging Face layout"
        )
    if file.metadata.get("split.count", 1) != 1:
        raise ModelUnreadable(f"{path} is one of {file.metadata['split.count']} parts; merge them with gguf-split")

    def get(key: str, default: Any = None) -> Any:
        return file.metadata.get(f"{name}.{key}", default)

    values = {theirs: get(ours) for ours, theirs in _KEYS.items() if get(ours) is not None}
    values["architectures"] = [
        "MixtralForCausalLM" if name == "llama" and get("expert_count") else _ARCHITECTURES[name]
    ]
    values["dtype"] = _dtype(file)
    values["vocab_size"] = _vocab_size(file)
    values["tie_word_embeddings"] = "output.weight" not in file.tensors
    values["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    if get("expert_count"):
        values |= {"num_local_experts": get("expert_count"), "norm_topk_prob": True}
    if name.startswith("gemma"):
        values |= {"hidden_act": "gelu_pytorch_tanh", "sliding_window": get("attention.sliding_window")}
        values["query_pre_attn_scalar"] = _query_scalar(name, values, get("attention.scale"))
    values |= _rope(file, values, get)
    ends = [file.metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot")]
    values["eos_token_id"] = [token_id for token_id in ends if token_id is not None]
    return ConfigJson(values, path, {})


def _dtype(file: GGUFFile) -> str:
    """Return the narrowest dtype that holds all matrices exactly; for a quantized file bfloat16.

    What was rounded to 8 bits or less has little to lose by that, and was in 16 bits before; float32 would make a file
    of 4 bits eight times as large.
    """
    formats = {FORMATS[info.format] for info in file.tensors.values() if len(info.shape) > 1}
    if any(form.block_elements > 1 for form in formats):
        return "bfloat16"
    names = {form.name for form in formats}
    return {frozenset({"BF16"}): "bfloat16", frozenset({"F16"}): "float16"}.get(frozenset(names), "float32")


def _vocab_size(file: GGUFFile) -> int | None:
    embedding = file.tensors.get("token_embd.weight")
    return embedding.shape[0] if embedding is not None and embedding.shape else None


def _query_scalar(name: str, values: dict[str, Any], scale: float | None) -> float | None:
    if scale is not None:
        return float(scale) ** -2
    if values.get("num_hidden_layers") == _SCALED_BY_WIDTH.get(name):
        return float(values["hidden_size"] / values["num_attention_heads"])
    return values.get("head_dim")


def _rope(file: GGUFFile, values: dict[str, Any], get: Any) -> dict[str, Any]:
    kind, head_dim = get("rope.scaling.type", "none"), values.get("head_dim")
    rope: dict[str, Any] = {}
    if "rope_freqs.weight" in file.tensors:
        # Llama 3.1's stretching, as a divisor for each frequency.
        divisors = file.tensor("rope_freqs.weight").tolist()
        rope = {"type": "longrope", "short_factor": divisors, "long_factor": divisors, "attention_factor": 1.0}
    elif kind != "none":
        rope = {"type": kind, "factor": get("rope.scaling.factor")}
        rope["original_max_position_embeddings"] = get("rope.scaling.original_context_length")
        rope |= {key: get(f"rope.scaling.yarn_{key}") for key in ("beta_fast", "beta_slow")}
    rotated = get("rope.dimension_count")
    if head_dim is not None and rotated is not None:
        rope["partial_rotary_factor"] = rotated / head_dim
    return {"rope_scaling": {key: value for key, value in rope.items() if value is not None}}
