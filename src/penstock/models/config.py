"""What a checkpoint's config.json says, checked, in one shape for all families. Pure data; no torch here.

A setting that changes the computation and that is not implemented is refused by name, never ignored.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from penstock.errors import ModelUnreadable

DTYPES = ("float32", "bfloat16", "float16")
_ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context."""

    kind: str = "default"
    """default, linear, dynamic, llama3 or yarn"""
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A decoder's shape."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope: RopeScaling = field(default_factory=RopeScaling)
    max_positions: int
    """Tokens the checkpoint says it can hold, scaling included."""
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """Normalize queries and keys per head before rotation."""
    layer_windows: tuple[int | None, ...]
    """Per layer, how many tokens back it sees, the current one included; None: all."""
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    dtype: str = "float32"
    """The checkpoint's own."""

    @property
    def window(self) -> int | None:
        """Tokens that matter to any layer; None where some layer sees all."""
        windows = [window for window in self.layer_windows if window is not None]
        return max(windows) if windows and len(windows) == self.num_layers else None


def kv_bytes_per_token(config: ModelConfig, element_bytes: int) -> int:
    """Return the bytes of one token's keys and values over all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * element_bytes


def read_config(path: Path) -> ModelConfig:
    """Return the configuration of the model in directory ``path``.

    Raises ``ModelUnreadable`` if it is missing, broken, of an unknown architecture, or asks for something that is
    not implemented.
    """
    raw = _read_json(path / "config.json", required=True)
    generation = _read_json(path / "generation_config.json", required=False)
    try:
        return _Reader(raw, path / "config.json").config(generation)
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ModelUnreadable(
            f"{path / 'config.json'} holds a value of the wrong kind ({error}); fetch the file again"
        ) from error


def _read_json(path: Path, *, required: bool) -> dict[str, Any]:
    if not path.is_file():
        if not required:
            return {}
        raise ModelUnreadable(f"{path} does not exist: a model directory in Hugging Face layout has one")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelUnreadable(f"{path} cannot be read: {error}; fetch the file again") from error
    if not isinstance(value, dict):
        raise ModelUnreadable(f"{path} holds {type(value).__name__}, not an object; fetch the file again")
    return value


@dataclass(frozen=True, slots=True)
class _Family:
    """What distinguishes an architecture's decoder from Llama's."""

    qkv_bias: bool | None = False
    """None: as ``attention_bias`` says"""
    o_bias: bool | None = False
    mlp_bias: bool | None = False
    qk_norm: bool = False
    window: str = "none"
    """``none``; ``all``: every layer has ``sliding_window``; ``upper``: layers from ``max_window_layers`` on, if
    ``use_sliding_window``"""


FAMILIES: dict[str, _Family] = {
    "LlamaForCausalLM": _Family(qkv_bias=None, o_bias=None, mlp_bias=None),
    "MistralForCausalLM": _Family(window="all"),
    "Qwen2ForCausalLM": _Family(qkv_bias=True, window="upper"),
    "Qwen3ForCausalLM": _Family(qkv_bias=None, o_bias=None, qk_norm=True, window="upper"),
}
"""The native architectures."""


class _Reader:
    """Reads one config.json, naming file and key in every complaint."""

    def __init__(self, raw: dict[str, Any], path: Path) -> None:
        self._raw = raw
        self._path = path

    def config(self, generation: dict[str, Any]) -> ModelConfig:
        raw = self._raw
        architecture = self._architecture()
        family = FAMILIES[architecture]
        self._refuse_unimplemented()
        num_layers, num_heads = self._int("num_hidden_layers"), self._int("num_attention_heads")
        hidden_size = self._int("hidden_size")
        num_kv_heads = self._int("num_key_value_heads", num_heads)
        head_dim = self._int("head_dim", hidden_size // num_heads)
        if num_heads % num_kv_heads:
            raise self._bad("num_key_value_heads", num_kv_heads, f"a divisor of the {num_heads} attention heads")
        if head_dim % 2:
            raise self._bad("head_dim", head_dim, "an even number, as rotary embedding needs")
        attention_bias = bool(raw.get("attention_bias", False))
        theta, rope, max_positions = self._rope()
        return ModelConfig(
            architecture=architecture,
            vocab_size=self._int("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=self._int("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            rope_theta=theta,
            rope=rope,
            max_positions=max_positions,
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
            o_bias=attention_bias if family.o_bias is None else family.o_bias,
            mlp_bias=bool(raw.get("mlp_bias", False)) if family.mlp_bias is None else family.mlp_bias,
            qk_norm=family.qk_norm,
            layer_windows=self._windows(family, num_layers),
            eos_token_ids=self._eos(generation),
            bos_token_id=raw.get("bos_token_id"),
            dtype=self._dtype(),
        )

    def _architecture(self) -> str:
        names = self._raw.get("architectures") or []
        for name in names:
            if name in FAMILIES:
                return str(name)
        found = ", ".join(map(str, names)) or f"none (model_type {self._raw.get('model_type')!r})"
        raise ModelUnreadable(
            f"{self._path}: architecture {found} is not one Penstock runs; it runs {', '.join(FAMILIES)}"
        )

    def _refuse_unimplemented(self) -> None:
        raw = self._raw
        if raw.get("quantization_config"):
            method = raw["quantization_config"].get("quant_method", "unknown")
            raise ModelUnreadable(
                f"{self._path}: the weights are quantized ({method}), which is not supported yet; "
                "use the bf16, fp16 or fp32 checkpoint"
            )
        if raw.get("hidden_act", "silu") not in ("silu", "swish"):
            raise self._bad("hidden_act", raw["hidden_act"], "silu")
        if raw.get("partial_rotary_factor", 1.0) != 1.0:
            raise self._bad("partial_rotary_factor", raw["partial_rotary_factor"], "1.0")

    def _rope(self) -> tuple[float, RopeScaling, int]:
        """Return base, scaling and context; reads transformers 5's ``rope_parameters`` and the older keys."""
        raw = self._raw
        max_positions = self._int("max_position_embeddings")
        parameters = raw.get("rope_parameters") or {}
        scaling = {**(raw.get("rope_scaling") or {}), **parameters}
        theta = float(scaling.get("rope_theta", raw.get("rope_theta", 10000.0)))
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind not in _ROPE_TYPES:
            raise self._bad("rope_scaling.rope_type", kind, f"one of {', '.join(_ROPE_TYPES)}")
        if not theta > 0:
            raise self._bad("rope_theta", theta, "a positive number")
        if scaling.get("partial_rotary_factor", 1.0) != 1.0:
            raise self._bad("rope_parameters.partial_rotary_factor", scaling["partial_rotary_factor"], "1.0")
        if kind == "default":
            return theta, RopeScaling(), max_positions
        original = int(
            scaling.get("original_max_position_embeddings")
            or raw.get("original_max_position_embeddings")
            or max_positions
        )
        factor = scaling.get("factor")
        if factor is None:
            if kind != "yarn":
                raise self._bad("rope_scaling.factor", None, "a number")
            factor = max_positions / original
        if not float(factor) > 0:
            raise self._bad("rope_scaling.factor", factor, "a positive number")
        rope = RopeScaling(
            kind=kind,
            factor=float(factor),
            original_max_positions=original,
            low_freq_factor=float(scaling.get("low_freq_factor") or 1.0),
            high_freq_factor=float(scaling.get("high_freq_factor") or 4.0),
            beta_fast=float(scaling.get("beta_fast") or 32.0),
            beta_slow=float(scaling.get("beta_slow") or 1.0),
            attention_factor=scaling.get("attention_factor"),
            mscale=scaling.get("mscale"),
            mscale_all_dim=scaling.get("mscale_all_dim"),
            truncate=bool(scaling.get("truncate", True)),
        )
        if kind in ("linear", "dynamic") or (kind == "yarn" and original == max_positions):
            max_positions = int(max_positions * rope.factor)
        return theta, rope, max_positions

    def _windows(self, family: _Family, num_layers: int) -> tuple[int | None, ...]:
        raw = self._raw
        window = raw.get("sliding_window")
        if family.window == "none" or window is None:
            return (None,) * num_layers
        window = self._int("sliding_window")
        if family.window == "all":
            return (window,) * num_layers
        if not raw.get("use_sliding_window", False):
            return (None,) * num_layers
        kinds = raw.get("layer_types")
        if kinds is not None:
            if len(kinds) != num_layers:
                raise self._bad("layer_types", kinds, f"one for each of the {num_layers} layers")
            return tuple(window if kind == "sliding_attention" else None for kind in kinds)
        first = int(raw.get("max_window_layers", 28))
        return tuple(window if layer >= first else None for layer in range(num_layers))

    def _eos(self, generation: dict[str, Any]) -> tuple[int, ...]:
        ids: list[int] = []
        for source in (generation, self._raw):
            value = source.get("eos_token_id")
            for token_id in value if isinstance(value, list) else [value]:
                if isinstance(token_id, int) and token_id not in ids:
                    ids.append(token_id)
        return tuple(ids)

    def _dtype(self) -> str:
        name = str(self._raw.get("dtype") or self._raw.get("torch_dtype") or "float32").removeprefix("torch.")
        if name not in DTYPES:
            raise self._bad("torch_dtype", name, f"one of {', '.join(DTYPES)}")
        return name

    def _int(self, key: str, default: int | None = None) -> int:
        value = self._raw.get(key)
        if value is None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self._bad(key, value, "a positive integer")
        return value

    def _bad(self, key: str, value: object, wanted: str) -> ModelUnreadable:
        return ModelUnreadable(f"{self._path}: {key} is {value!r}, and Penstock needs {wanted}")
