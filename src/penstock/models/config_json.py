"""A checkpoint's config.json, read key by key: every complaint names file, key and what was wanted."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from penstock.errors import ModelUnreadable
from penstock.models.config import DTYPES, Rope

_ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


class ConfigJson:
    """The values of one config.json. Methods raise ``ModelUnreadable`` for what cannot be run."""

    def __init__(self, values: dict[str, Any], path: Path, generation: dict[str, Any], *, prefix: str = "") -> None:
        """Take ``values`` of the file ``path``, and those of generation_config.json.

        ``prefix`` comes before their keys in complaints, for values that are not the file's outermost.
        """
        self.values = values
        self.path = path
        self._generation = generation
        self._prefix = prefix

    def over(self, defaults: Mapping[str, Any]) -> "ConfigJson":
        """Return the same over ``defaults``."""
        return ConfigJson({**defaults, **self.values}, self.path, self._generation, prefix=self._prefix)

    def but(self, **values: Any) -> "ConfigJson":
        """Return the same but for ``values``."""
        return ConfigJson({**self.values, **values}, self.path, self._generation, prefix=self._prefix)

    def part(self, key: str) -> "ConfigJson":
        """Return the object under ``key``."""
        values = self.values.get(key)
        if not isinstance(values, dict):
            raise self.bad(key, values, "an object of settings")
        return ConfigJson(values, self.path, self._generation, prefix=f"{self._prefix}{key}.")

    def integer(self, key: str, default: int | None = None, *, most: int | None = None) -> int:
        """Return a positive integer, of at most ``most``."""
        value = self.values.get(key)
        if value is None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.bad(key, value, "a positive integer")
        if most is not None and value > most:
            raise self.bad(key, value, f"at most {most}")
        return value

    def number(self, key: str, default: float) -> float:
        """Return a positive number."""
        value = self.optional_number(key)
        return default if value is None else value

    def optional_number(self, key: str) -> float | None:
        """Return a positive number, None where there is none."""
        value = self.values.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not float(value) > 0:
            raise self.bad(key, value, "a positive number")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """Return whether ``key`` is set."""
        value = self.values.get(key)
        return default if value is None else bool(value)

    def dtype(self) -> str:
        """Return the checkpoint's own dtype."""
        name = str(self.values.get("dtype") or self.values.get("torch_dtype") or "float32").removeprefix("torch.")
        if name not in DTYPES:
            raise self.bad("torch_dtype", name, f"one of {', '.join(DTYPES)}")
        return name

    def activation(self) -> str:
        """Return the feed-forward's activation, by our name."""
        key = "hidden_activation" if self.values.get("hidden_activation") else "hidden_act"
        name = self.values.get(key) or "silu"
        if name not in _ACTIVATIONS:
            raise self.bad(key, name, "silu or gelu_pytorch_tanh")
        return _ACTIVATIONS[name]

    def eos_token_ids(self) -> tuple[int, ...]:
        """Return the tokens that end an answer, generation_config.json's first."""
        ids: list[int] = []
        for source in (self._generation, self.values):
            value = source.get("eos_token_id")
            for token_id in value if isinstance(value, list) else [] if value is None else [value]:
                if not isinstance(token_id, int) or isinstance(token_id, bool):
                    raise self.bad("eos_token_id", value, "a token id or a list of them")
                if token_id not in ids:
                    ids.append(token_id)
        return tuple(ids)

    def low_rank(self) -> dict[str, int]:
        """Return the ranks of products that ``penstock compress`` made two matrices of, by projection."""
        ranks = self.values.get("low_rank") or {}
        if not isinstance(ranks, dict) or not all(type(rank) is int and rank > 0 for rank in ranks.values()):
            raise self.bad("low_rank", ranks, "a positive rank for each projection")
        return ranks

    def windows(self, num_layers: int, slides: Callable[[int], bool]) -> tuple[int | None, ...]:
        """Return each layer's window: ``sliding_window`` where ``layer_types`` says so or, without it, ``slides``."""
        if self.values.get("sliding_window") is None:
            return (None,) * num_layers
        window, kinds = self.integer("sliding_window"), self.values.get("layer_types")
        if kinds is None:
            return tuple(window if slides(layer) else None for layer in range(num_layers))
        if len(kinds) != num_layers:
            raise self.bad("layer_types", kinds, f"one for each of the {num_layers} layers")
        for kind in kinds:
            if kind not in ("sliding_attention", "full_attention"):
                raise self.bad("layer_types", kind, "sliding_attention or full_attention")
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)

    def rope(self, head_dim: int, *, partial: bool = False, parameters: dict[str, Any] | None = None) -> Rope:
        """Return the rotation; reads transformers 5's ``rope_parameters`` and the older keys.

        ``partial``: the architecture may rotate a part of each head. ``parameters`` stand in for both sets of keys.
        """
        values = self.values
        scaling = {**(values.get("rope_scaling") or {}), **(values.get("rope_parameters") or {})}
        if parameters is not None:
            scaling = parameters
        theta = float(scaling.get("rope_theta", values.get("rope_theta", 10000.0)))
        if not theta > 0:
            raise self.bad("rope_theta", theta, "a positive number")
        share = float(scaling.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0)))
        rotary_dim = int(head_dim * share)
        if (share != 1.0 and not partial) or rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
            raise self.bad("partial_rotary_factor", share, "1.0" if not partial else "an even part of each head")
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        kind = "default" if kind == "mrope" else kind  # an older name, which says nothing but that there are sections
        if kind not in _ROPE_TYPES:
            raise self.bad("rope_scaling.rope_type", kind, f"one of {', '.join(_ROPE_TYPES)}")
        sections = self._sections(scaling, kind, rotary_dim)
        return replace(self._scaled(kind, scaling, theta, rotary_dim), sections=sections)

    def _scaled(self, kind: str, scaling: dict[str, Any], theta: float, rotary_dim: int) -> Rope:
        if kind == "default":
            return Rope(theta=theta, rotary_dim=rotary_dim)
        max_positions = self.integer("max_position_embeddings")
        original = int(
            scaling.get("original_max_position_embeddings")
            or self.values.get("original_max_position_embeddings")
            or max_positions
        )
        if kind in ("linear", "dynamic"):
            original = max_positions
        factor = scaling.get("factor")
        if factor is None:
            if kind not in ("yarn", "longrope"):
                raise self.bad("rope_scaling.factor", None, "a number")
            factor = max_positions / original
        if not float(factor) > 0:
            raise self.bad("rope_scaling.factor", factor, "a positive number")
        return Rope(
            theta=theta,
            rotary_dim=rotary_dim,
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
            short_factors=self._divisors(scaling, "short_factor", rotary_dim) if kind == "longrope" else (),
            long_factors=self._divisors(scaling, "long_factor", rotary_dim) if kind == "longrope" else (),
        )

    def _sections(self, scaling: dict[str, Any], kind: str, rotary_dim: int) -> tuple[int, ...]:
        sections = scaling.get("mrope_section")
        if sections is None:
            return ()
        if not isinstance(sections, list) or len(sections) != 3 or sum(map(int, sections)) != rotary_dim // 2:
            raise self.bad("rope_scaling.mrope_section", sections, f"three numbers that sum to {rotary_dim // 2}")
        if kind == "dynamic" or min(map(int, sections)) < 0:
            raise self.bad("rope_scaling", scaling, "sections of zero pairs or more, and angles that keep their base")
        return tuple(map(int, sections))

    def _divisors(self, scaling: dict[str, Any], key: str, rotary_dim: int) -> tuple[float, ...]:
        divisors = scaling.get(key)
        if (
            not isinstance(divisors, list)
            or len(divisors) != rotary_dim // 2
            or not all(float(d) > 0 for d in divisors)
        ):
            raise self.bad(f"rope_scaling.{key}", divisors, f"{rotary_dim // 2} positive numbers")
        return tuple(map(float, divisors))

    def bad(self, key: str, value: object, wanted: str) -> ModelUnreadable:
        """Return the error that says ``key`` cannot be ``value``."""
        return ModelUnreadable(f"{self.path}: {self._prefix}{key} is {value!r}, and Penstock needs {wanted}")
