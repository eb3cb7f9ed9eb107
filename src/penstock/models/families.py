"""The native architectures: what each changes in the decoder that all of them share. No torch here.

A family is one function from its config.json to a ``ModelConfig``. ``docs/adding-a-model.md`` shows how to add one. A
setting that changes the computation and that is not implemented is refused by name, never ignored.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from penstock.errors import ModelUnreadable
from penstock.gguf import is_gguf
from penstock.json_objects import read_json_object, reading
from penstock.models.config import Experts, LayerConfig, ModelConfig, Norms, VisionConfig
from penstock.models.config_json import ConfigJson

_SANDWICH = Norms(
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
    offset=1.0,
)
"""Gemma's since its second version: before and after each block, weights kept as deviations from one."""


def llama(raw: ConfigJson, *, partial_rotary: bool = False) -> ModelConfig:
    """Llama 2 and 3.x: what every other family starts from."""
    # A broken file may say billions, and each layer takes memory before the first weight is missed.
    num_layers, num_heads = raw.integer("num_hidden_layers", most=10_000), raw.integer("num_attention_heads")
    hidden_size = raw.integer("hidden_size")
    num_kv_heads = raw.integer("num_key_value_heads", num_heads)
    head_dim = raw.integer("head_dim", hidden_size // num_heads)
    if num_heads % num_kv_heads:
        raise raw.bad("num_key_value_heads", num_kv_heads, f"a divisor of the {num_heads} attention heads")
    if head_dim % 2:
        raise raw.bad("head_dim", head_dim, "an even number, as rotary embedding needs")
    rope, max_positions = raw.rope(head_dim, partial=partial_rotary), raw.integer("max_position_embeddings")
    stretched = rope.kind in ("linear", "dynamic") or (
        rope.kind == "yarn" and rope.original_max_positions == max_positions
    )
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=raw.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=raw.integer("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        layers=(LayerConfig(rope=rope),) * num_layers,
        max_positions=int(max_positions * rope.factor) if stretched else max_positions,
        rms_norm_eps=float(raw.values.get("rms_norm_eps", 1e-6)),
        tie_word_embeddings=raw.flag("tie_word_embeddings"),
        qkv_bias=raw.flag("attention_bias"),
        o_bias=raw.flag("attention_bias"),
        mlp_bias=raw.flag("mlp_bias"),
        activation=raw.activation(),
        attention_scale=head_dim**-0.5,
        eos_token_ids=raw.eos_token_ids(),
        dtype=raw.dtype(),
    )


def mistral(raw: ConfigJson) -> ModelConfig:
    """All layers see ``sliding_window`` tokens, if it is set."""
    return _windowed(raw, llama(raw), lambda layer: True)


def qwen2(raw: ConfigJson) -> ModelConfig:
    """Qwen2 and 2.5: biased queries, keys and values; upper layers may have windows."""
    return _upper_windowed(raw, replace(llama(raw), qkv_bias=True, o_bias=False))


def qwen3(raw: ConfigJson) -> ModelConfig:
    """Heads of queries and keys are normalized."""
    return _upper_windowed(raw, replace(llama(raw), qk_norm="heads"))


def olmo2(raw: ConfigJson) -> ModelConfig:
    """Norms after the blocks only, and over all of a token's queries or keys."""
    norms = Norms(
        before_attention=None,
        after_attention="post_attention_layernorm",
        before_mlp=None,
        after_mlp="post_feedforward_layernorm",
    )
    return replace(llama(raw), norms=norms, qk_norm="projection")


def smollm3(raw: ConfigJson) -> ModelConfig:
    """Every fourth layer does not rotate; those may have windows."""
    config = replace(llama(raw), tie_word_embeddings=raw.flag("tie_word_embeddings", True))
    interval = raw.integer("no_rope_layer_interval", 4)
    rotates = raw.values.get("no_rope_layers")
    if rotates is None:
        rotates = [(layer + 1) % interval != 0 for layer in range(config.num_layers)]
    if len(rotates) != config.num_layers:
        raise raw.bad("no_rope_layers", rotates, f"one for each of the {config.num_layers} layers")
    layers = [
        layer if rotated else replace(layer, rope=None) for layer, rotated in zip(config.layers, rotates, strict=True)
    ]
    config = replace(config, layers=tuple(layers))
    return _windowed(raw, config, lambda i: not rotates[i]) if raw.flag("use_sliding_window") else config


def granite(raw: ConfigJson) -> ModelConfig:
    """Llama with four multipliers."""
    return replace(
        llama(raw),
        embedding_scale=raw.number("embedding_multiplier", 1.0),
        residual_scale=raw.number("residual_multiplier", 1.0),
        attention_scale=raw.number("attention_multiplier", 1.0),
        logit_scale=1.0 / raw.number("logits_scaling", 1.0),
    )


def phi3(raw: ConfigJson) -> ModelConfig:
    """Phi-3 and Phi-4: projections kept as one tensor, a part of each head rotated, longrope."""
    config = replace(llama(raw, partial_rotary=True), fused_projections=True)
    return _windowed(raw, config, lambda layer: True)


def gemma(raw: ConfigJson) -> ModelConfig:
    """Gemma 1: Llama with larger embeddings, and norms' weights kept as deviations from one."""
    if raw.values.get("hidden_act") == "gelu":  # as first files have it, of models trained with the approximation
        raw = raw.but(hidden_act="gelu_pytorch_tanh")
    if raw.flag("use_bidirectional_attention"):
        raise raw.bad("use_bidirectional_attention", True, "a decoder, in which tokens see only what came before")
    config = llama(raw)
    return replace(
        config,
        norms=Norms(offset=1.0),
        tie_word_embeddings=raw.flag("tie_word_embeddings", True),
        embedding_scale=config.hidden_size**0.5,
    )


def gemma2(raw: ConfigJson) -> ModelConfig:
    """Scores and logits are capped; every second layer has a window."""
    config = replace(_later_gemma(raw), score_cap=raw.optional_number("attn_logit_softcapping"))
    return _windowed(raw, config, lambda layer: layer % 2 == 0)


def gemma3(raw: ConfigJson) -> ModelConfig:
    """Five layers with windows and angles of their own for each one that sees all; heads are normalized."""
    pattern = raw.integer("sliding_window_pattern", 6)
    config = _windowed(raw, replace(_later_gemma(raw), qk_norm="heads"), lambda layer: (layer + 1) % pattern != 0)
    by_kind = raw.values.get("rope_parameters") or {}
    scaling = raw.values.get("rope_scaling") or {}
    wide = {"rope_theta": raw.number("rope_theta", 1e6), **scaling, **by_kind.get("full_attention", {})}
    local = {"rope_theta": raw.number("rope_local_base_freq", 1e4), **by_kind.get("sliding_attention", {})}
    ropes = [raw.rope(config.head_dim, parameters=parameters) for parameters in (wide, local)]
    layers = [replace(layer, rope=ropes[layer.window is not None]) for layer in config.layers]
    # Full attention's scaling is part of max_position_embeddings already.
    return replace(config, layers=tuple(layers), max_positions=raw.integer("max_position_embeddings"))


def mixtral(raw: ConfigJson) -> ModelConfig:
    """Mistral with a mixture of experts in every layer."""
    experts = Experts(
        num_experts=raw.integer("num_local_experts", 8),
        num_active=raw.integer("num_experts_per_tok", 2),
        intermediate_size=raw.integer("intermediate_size"),
        normalize=True,
        name="block_sparse_moe",
        gate_up_down=("w1", "w3", "w2"),
    )
    return _with_experts(raw, mistral(raw), experts, lambda layer: True)


def qwen3_moe(raw: ConfigJson) -> ModelConfig:
    """Qwen3 with a mixture of experts in most layers."""
    experts = Experts(
        num_experts=raw.integer("num_experts", raw.values.get("num_local_experts")),  # transformers 5 renames it
        num_active=raw.integer("num_experts_per_tok", 8),
        intermediate_size=raw.integer("moe_intermediate_size"),
        normalize=raw.flag("norm_topk_prob"),
    )
    step, dense = raw.integer("decoder_sparse_step", 1), raw.values.get("mlp_only_layers") or []
    config = replace(llama(raw), qk_norm="heads")
    if raw.flag("use_sliding_window"):
        config = _windowed(raw, config, lambda layer: True)
    return _with_experts(raw, config, experts, lambda layer: layer not in dense and (layer + 1) % step == 0)


def llava(raw: ConfigJson) -> ModelConfig:
    """LLaVA 1.5 and NeXT: any text family, before which images become tokens."""
    text = _text(raw)
    is_tied = _is_tied_by_either(text, raw)
    # Granite multiplies what it is given, whatever that is.
    vision = VisionConfig(image_token_id=_placeholder(raw, "image_token_index", "image_token_id"), scales_features=True)
    return replace(text, vision=vision, tie_word_embeddings=is_tied)


def idefics3(raw: ConfigJson) -> ModelConfig:
    """Idefics3 and SmolVLM: likewise."""
    vision = VisionConfig(image_token_id=_placeholder(raw, "image_token_id"))
    return replace(_text(raw), vision=vision, tie_word_embeddings=raw.flag("tie_word_embeddings"))


def gemma3_vision(raw: ConfigJson) -> ModelConfig:
    """Gemma 3, with images whose tokens see each other."""
    vision = VisionConfig(image_token_id=_placeholder(raw, "image_token_index", "image_token_id"), sees_both_ways=True)
    return replace(_text(raw), vision=vision, tie_word_embeddings=raw.flag("tie_word_embeddings", True))


def paligemma(raw: ConfigJson) -> ModelConfig:
    """PaliGemma 1 and 2: Gemma 1 and 2, which read an image and a question whole."""
    text = raw.part("text_config")
    # Upstream's name for how a prompt is read; text without an image comes one token after another here.
    config = _text(raw.but(text_config=text.but(use_bidirectional_attention=None).values), with_cap=True)
    vision = VisionConfig(
        image_token_id=_placeholder(raw, "image_token_index", "image_token_id"),
        sees_both_ways=True,
        reads_prompts_whole=True,
    )
    return replace(config, vision=vision, tie_word_embeddings=raw.flag("tie_word_embeddings", True))


def qwen2_vl(raw: ConfigJson) -> ModelConfig:
    """Qwen2-VL and Qwen2.5-VL: Qwen2 with positions on three axes."""
    config = _text(raw)
    if not all(rope is not None and rope.sections for rope in config.ropes):
        raise raw.bad("rope_scaling.mrope_section", None, "three numbers, of pairs that turn with time, row and column")
    vision = VisionConfig(
        image_token_id=_placeholder(raw, "image_token_id"),
        video_token_id=_placeholder(raw, "video_token_id"),
        has_three_axes=True,
    )
    return replace(config, vision=vision, tie_word_embeddings=_is_tied_by_either(config, raw))


FAMILIES: dict[str, Callable[[ConfigJson], ModelConfig]] = {
    "LlamaForCausalLM": llama,
    "MistralForCausalLM": mistral,
    "Qwen2ForCausalLM": qwen2,
    "Qwen3ForCausalLM": qwen3,
    "Qwen3MoeForCausalLM": qwen3_moe,
    "MixtralForCausalLM": mixtral,
    "GemmaForCausalLM": gemma,
    "Gemma2ForCausalLM": gemma2,
    "Gemma3ForCausalLM": gemma3,
    "Phi3ForCausalLM": phi3,
    "GraniteForCausalLM": granite,
    "SmolLM3ForCausalLM": smollm3,
    "Olmo2ForCausalLM": olmo2,
    "LlavaForConditionalGeneration": llava,
    "LlavaNextForConditionalGeneration": llava,
    "Gemma3ForConditionalGeneration": gemma3_vision,
    "PaliGemmaForConditionalGeneration": paligemma,
    "Idefics3ForConditionalGeneration": idefics3,
    "SmolVLMForConditionalGeneration": idefics3,
    "Qwen2VLForConditionalGeneration": qwen2_vl,
    "Qwen2_5_VLForConditionalGeneration": qwen2_vl,
}
"""By the name in config.json's ``architectures``."""


def read_config(path: Path) -> ModelConfig:
    """Return the configuration of the model in directory or GGUF file ``path``.

    Raises ``ModelUnreadable`` if it is missing, broken, of an unknown architecture, or asks for something that is
    not implemented.
    """
    file = path if is_gguf(path) else path / "config.json"
    with reading(file):
        if is_gguf(path):
            # Brings numpy.
            from penstock.models.gguf_config import gguf_config

            config = _config_of(gguf_config(path))
            return replace(config, norms=replace(config.norms, offset=0.0))  # added already
        generation = read_json_object(path / "generation_config.json")
        return _config_of(ConfigJson(read_json_object(file, required=True), file, generation))


def _config_of(raw: ConfigJson) -> ModelConfig:
    names = raw.values.get("architectures") or []
    if not isinstance(names, list):
        raise raw.bad("architectures", names, "a list of names")
    for name in names:
        if name in FAMILIES:
            return replace(FAMILIES[name](raw), architecture=name, low_rank=raw.low_rank())
    if not names:
        raise ModelUnreadable(
            f"{raw.path}: architectures is not given (model_type is {raw.values.get('model_type')!r}); Penstock runs "
            f"{', '.join(FAMILIES)}, and others through transformers"
        )
    if raw.values.get("quantization_config"):
        raise ModelUnreadable(
            f"{raw.path}: the weights are quantized, and {names[0]} runs in transformers' code, which Penstock runs "
            "from bf16, fp16 or fp32; use such a checkpoint"
        )
    # Takes torch and an extra, which native families do without.
    from penstock.models.upstream import read_upstream_config

    return read_upstream_config(raw, str(next(iter(names))))


# ---- what several families have in common


_LLAMA_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}
_MISTRAL_7B = {**_LLAMA_7B, "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072}
_QWEN2_7B = {**_LLAMA_7B, "vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768}
_GEMMA_7B = {
    "vocab_size": 256000,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
}
_GEMMA2_2B = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
_GEMMA3_2B = {
    **_GEMMA2_2B,
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}
_QWEN2_VL_72B = {
    **_QWEN2_7B,
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
}
_TEXT_MODELS: dict[str, tuple[Callable[[ConfigJson], ModelConfig], dict[str, Any]]] = {
    "llama": (llama, _LLAMA_7B),
    "mistral": (mistral, {**_MISTRAL_7B, "sliding_window": 4096}),
    "qwen2": (qwen2, _QWEN2_7B),
    "qwen3": (qwen3, {**_QWEN2_7B, "head_dim": 128}),
    "granite": (granite, _LLAMA_7B),
    "gemma": (gemma, _GEMMA_7B),
    "gemma2": (gemma2, _GEMMA2_2B),
    "gemma3_text": (gemma3, _GEMMA3_2B),
    **dict.fromkeys(("qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text"), (qwen2, _QWEN2_VL_72B)),
}
"""By a text_config's ``model_type``: its family, and the values of upstream's class where they are not written down.
Before version 5 transformers wrote only what differs from those."""


def _text(raw: ConfigJson, *, with_cap: bool = False) -> ModelConfig:
    """Return the decoder's configuration, which is under ``text_config``; in older files of some families, outside.

    What a family does to its logits, upstream's models that see leave out, but for those ``with_cap``.
    """
    inner = raw if raw.values.get("text_config") is None else raw.part("text_config")
    kind = inner.values.get("model_type", "llama")
    if kind not in _TEXT_MODELS:
        raise inner.bad("model_type", kind, f"one of {', '.join(_TEXT_MODELS)}")
    family, defaults = _TEXT_MODELS[kind]
    shared = ("dtype", "torch_dtype", "eos_token_id")
    outer: dict[str, Any] = {key: raw.values[key] for key in shared if key in raw.values}
    config = family(inner.over({**defaults, **outer}))
    return replace(config, logit_scale=1.0, logit_cap=config.logit_cap if with_cap else None)


def _is_tied_by_either(text: ModelConfig, raw: ConfigJson) -> bool:
    """Return whether the decoder's part or the outer one says so; the other has its class's value then."""
    return text.tie_word_embeddings or raw.flag("tie_word_embeddings")


def _placeholder(raw: ConfigJson, *keys: str) -> int:
    """Return the id of the token that stands for features, under the first of ``keys`` that is there."""
    key = next((key for key in keys if key in raw.values), keys[0])
    return raw.integer(key)


def _windowed(raw: ConfigJson, config: ModelConfig, slides: Callable[[int], bool]) -> ModelConfig:
    windows = raw.windows(config.num_layers, slides)
    layers = [replace(layer, window=window) for layer, window in zip(config.layers, windows, strict=True)]
    return replace(config, layers=tuple(layers))


def _upper_windowed(raw: ConfigJson, config: ModelConfig) -> ModelConfig:
    """Layers from ``max_window_layers`` on have windows, if ``use_sliding_window``."""
    if not raw.flag("use_sliding_window"):
        return config
    first = int(raw.values.get("max_window_layers", 28))
    return _windowed(raw, config, lambda layer: layer >= first)


def _later_gemma(raw: ConfigJson) -> ModelConfig:
    return replace(
        gemma(raw),
        norms=_SANDWICH,
        attention_scale=raw.number("query_pre_attn_scalar", 256.0) ** -0.5,
        logit_cap=raw.optional_number("final_logit_softcapping"),
    )


def _with_experts(
    raw: ConfigJson, config: ModelConfig, experts: Experts, is_sparse: Callable[[int], bool]
) -> ModelConfig:
    if experts.num_active > experts.num_experts:
        raise raw.bad("num_experts_per_tok", experts.num_active, f"at most the {experts.num_experts} experts")
    layers = [replace(layer, experts=experts if is_sparse(i) else None) for i, layer in enumerate(config.layers)]
    return replace(config, layers=tuple(layers))
