"""Configurations as version 4 of transformers wrote them: only what differs from upstream's classes."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from penstock.models.config_json import ConfigJson
from penstock.models.families import read_config
from penstock.models.vision.tower import read_tower


def _write(path: Path, values: dict[str, Any]) -> Path:
    (path / "config.json").write_text(json.dumps(values))
    return path


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "granite", "gemma3_text"])
def test_a_text_config_means_what_its_class_says(kind: str, tmp_path: Path) -> None:
    upstream = transformers.AutoConfig.for_model(kind)
    values = {
        "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": 9,
        "text_config": {"model_type": kind},
        "vision_config": {"model_type": "clip_vision_model"},
    }
    config = read_config(_write(tmp_path, values))
    head_dim = getattr(upstream, "head_dim", None) or upstream.hidden_size // upstream.num_attention_heads
    expected = {
        "vocab_size": upstream.vocab_size,
        "hidden_size": upstream.hidden_size,
        "intermediate_size": upstream.intermediate_size,
        "num_layers": upstream.num_hidden_layers,
        "num_heads": upstream.num_attention_heads,
        "num_kv_heads": upstream.num_key_value_heads,
        "head_dim": head_dim,
        "max_positions": upstream.max_position_embeddings,
        "rms_norm_eps": upstream.rms_norm_eps,
        "tie_word_embeddings": bool(upstream.tie_word_embeddings),
        "activation": {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}[
            getattr(upstream, "hidden_activation", None) or upstream.hidden_act
        ],
    }
    assert {name: getattr(config, name) for name in expected} == expected
    uses_window = getattr(upstream, "use_sliding_window", True)
    windows = {upstream.sliding_window} if getattr(upstream, "sliding_window", None) and uses_window else set()
    assert {layer.window for layer in config.layers} - {None} == windows


def test_llava_as_it_was_published(tmp_path: Path) -> None:
    """The keys that llava-hf/llava-1.5-7b-hf has."""
    values = {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": 32000,
        "model_type": "llava",
        "pad_token_id": 32001,
        "projector_hidden_act": "gelu",
        "text_config": {
            "architectures": ["LlamaForCausalLM"],
            "max_position_embeddings": 4096,
            "model_type": "llama",
            "rms_norm_eps": 1e-05,
            "torch_dtype": "float16",
            "vocab_size": 32064,
        },
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "vision_config": {
            "hidden_size": 1024,
            "image_size": 336,
            "intermediate_size": 4096,
            "model_type": "clip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "projection_dim": 768,
            "vocab_size": 32000,
        },
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }
    config = read_config(_write(tmp_path, values))
    assert (config.hidden_size, config.num_layers, config.vocab_size, config.dtype) == (4096, 32, 32064, "float16")
    assert config.architecture == "LlavaForConditionalGeneration"
    assert config.vision is not None
    assert config.vision.image_token_id == 32000


@pytest.mark.parametrize("kind", ["clip_vision_model", "siglip_vision_model", "idefics3_vision", "smolvlm_vision"])
def test_a_vision_config_means_what_its_class_says(kind: str) -> None:
    upstream = transformers.AutoConfig.for_model(kind)
    tower = read_tower(ConfigJson({"model_type": kind}, Path("config.json"), {}))
    names = {
        "hidden_size": "hidden_size",
        "intermediate_size": "intermediate_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "patch_size": "patch_size",
        "image_size": "image_size",
        "norm_eps": "layer_norm_eps",
    }
    assert {ours: getattr(tower, ours) for ours in names} == {
        ours: getattr(upstream, theirs) for ours, theirs in names.items()
    }
    assert tower.activation == {"quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh"}[upstream.hidden_act]
