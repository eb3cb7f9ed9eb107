"""The towers of Qwen2-VL and Qwen2.5-VL, which see pictures in their own shapes.

Wang et al., "Qwen2-VL" (2024), and Bai et al., "Qwen2.5-VL" (2025). Patches of all pictures lie one after another.
Those of a frame see each other; in most layers of Qwen2.5-VL only those of a window of it do.

N patches, E tower width, D head width, M patches that become a token, K values of a patch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock.images.settings import Normalization
from penstock.kernels import Linear
from penstock.models.config_json import ConfigJson
from penstock.models.parts import GatedMLP, Loader
from penstock.models.vision.attention import PackedAttention, keys_and_values
from penstock.models.vision.tower import MLP, LayerNorm
from penstock.protocol import Picture
from penstock.quant import prepare_gated_linear

_EPS = 1e-6
_PATCHES_AT_ONCE = 4096
"""Of several pictures: more take no less time each, and more memory"""

Norm = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class TowerConfig:
    """A tower's shape."""

    num_layers: int
    width: int
    num_heads: int
    mlp_width: int
    patch_size: int
    merge_size: int
    """Patches on a side of the square that becomes a token."""
    frames_each: int
    """Frames in a patch."""
    rope_theta: float
    is_gated: bool
    """Qwen2.5-VL's: a gated feed-forward, and norms that take no mean away."""
    window: int | None = None
    """Tokens on a side of a window; None: there are none."""
    full_layers: frozenset[int] = frozenset()
    """Layers that see whole frames, where others see windows."""


def qwen2_vl(raw: ConfigJson, loader: Loader, normalization: Normalization) -> "QwenVisionEncoder":
    """Load a Qwen2-VL's. Raises ``ModelUnreadable``."""
    vision = raw.part("vision_config")
    width = vision.integer("embed_dim", 1280)
    config = TowerConfig(
        **_common(vision, width, "quick_gelu"),
        mlp_width=int(width * vision.number("mlp_ratio", 4.0)),
        is_gated=False,
    )
    return QwenVisionEncoder(loader, config, normalization)


def qwen2_5_vl(raw: ConfigJson, loader: Loader, normalization: Normalization) -> "QwenVisionEncoder":
    """Load a Qwen2.5-VL's. Raises ``ModelUnreadable``."""
    vision = raw.part("vision_config")
    common = _common(vision, vision.integer("hidden_size", 3584), "silu")
    config = TowerConfig(
        **common,
        mlp_width=vision.integer("intermediate_size", 3420),
        is_gated=True,
        window=max(1, vision.integer("window_size", 112) // (common["patch_size"] * common["merge_size"])),
        full_layers=frozenset(map(int, vision.values.get("fullatt_block_indexes", (7, 15, 23, 31)))),
    )
    return QwenVisionEncoder(loader, config, normalization)


def _common(raw: ConfigJson, width: int, activation: str) -> dict[str, Any]:
    """Return what both read alike."""
    for key, only in {"hidden_act": activation, "in_channels": 3, "in_chans": 3}.items():
        if raw.values.get(key, only) != only:
            raise raw.bad(key, raw.values[key], repr(only))
    num_heads = raw.integer("num_heads", 16)
    if width % (4 * num_heads):
        raise raw.bad("num_heads", num_heads, f"{width} to be cut into heads of four equal parts")
    return {
        "num_layers": raw.integer("depth", 32, most=1000),
        "width": width,
        "num_heads": num_heads,
        "patch_size": raw.integer("patch_size", 14),
        "merge_size": raw.integer("spatial_merge_size", 2),
        "frames_each": raw.integer("temporal_patch_size", 2),
        "rope_theta": float((raw.values.get("rope_parameters") or {}).get("rope_theta", 10000.0)),
    }


class QwenVisionEncoder:
    """See ``encoder.VisionEncoder``."""

    def __init__(self, loader: Loader, config: TowerConfig, normalization: Normalization) -> None:
        """Take the tensors, whose names begin with ``visual``."""
        self._config, self._ops = config, loader.ops
        self._dtype = loader.ops.activation_dtype(loader.dtype)
        E, frames, side = config.width, config.frames_each, config.patch_size
        kernel = loader.tensor("visual.patch_embed.proj.weight", E, 3, frames, side, side)
        # Its inputs in the order of a picture's bytes.
        self._embed = loader.ops.prepare_linear(kernel.permute(0, 2, 3, 4, 1).flatten(1), None, exact=True)
        # (v * scale - mean) / std as one product and one sum.
        mean, std = (torch.tensor(values * (frames * side**2)) for values in (normalization.mean, normalization.std))
        self._factor, self._shift = normalization.scale / std, -mean / std
        self._layers = [_Layer.load(loader, config, f"visual.blocks.{i}") for i in range(config.num_layers)]
        self._merge_norm = _load_norm(loader, config, "visual.merger.ln_q")
        self._merged_width = E * config.merge_size**2
        sizes = (self._merged_width, self._merged_width, loader.config.hidden_size)
        self._merge = MLP(loader, "visual.merger.mlp.0", "visual.merger.mlp.2", sizes, "gelu")
        # Of a head's pairs the first half turns with the row, the other with the column.
        num_each = E // config.num_heads // 4
        inverse = 1.0 / config.rope_theta ** (torch.arange(num_each, dtype=torch.float32) / num_each)
        self._inverse, self._axes = inverse.repeat(2), torch.arange(2).repeat_interleave(num_each)
        self.num_parameters = loader.num_parameters
        self.weights_bytes = loader.num_parameters * loader.dtype.itemsize

    @torch.inference_mode()
    def encode(self, pictures: Sequence[Picture]) -> list[Tensor]:
        """Return the features of each; see ``VisionEncoder.encode``."""
        features: list[Tensor] = []
        some: list[Picture] = []
        for picture in pictures:
            num_tokens = sum(other.num_tokens for other in some) + picture.num_tokens
            if some and num_tokens * self._config.merge_size**2 > _PATCHES_AT_ONCE:
                features += self._encode(some)
                some = []
            some.append(picture)
        return features + self._encode(some) if some else features

    def _encode(self, pictures: Sequence[Picture]) -> list[Tensor]:
        """Return the same, computed in one pass."""
        config, ops = self._config, self._ops
        arrangements = [_arrange(_grid(picture), config.merge_size, config.window) for picture in pictures]
        positions = np.concatenate([arrangement.positions for arrangement in arrangements], axis=1)
        frames = [length for arrangement in arrangements for length in arrangement.frames]
        windows = [length for arrangement in arrangements for length in arrangement.windows]
        heads = config.num_heads, config.width // config.num_heads
        angles = ops.rope_angles(torch.from_numpy(positions), self._inverse, heads[1], axes=self._axes)
        # Windows cut into more blocks than frames.
        kv = keys_and_values(ops, self._dtype, windows or frames, *heads)
        of_frames = PackedAttention(ops, frames, *heads, angles, kv)
        of_windows = PackedAttention(ops, windows, *heads, angles, kv) if windows else of_frames

        patches = [self._patches(*pair) for pair in zip(pictures, arrangements, strict=True)]
        x = self._embed(self._normalize(np.concatenate(patches)))
        for i, layer in enumerate(self._layers):
            x = layer(x, of_frames if i in config.full_layers else of_windows)
        merged = self._merge(self._merge_norm(x).view(-1, self._merged_width))
        tokens = torch.split(merged, [picture.num_tokens for picture in pictures])
        return [part[arrangement.places] for part, arrangement in zip(tokens, arrangements, strict=True)]

    def _patches(self, picture: Picture, arrangement: "_Arrangement") -> npt.NDArray[np.uint8]:
        """Return [N, K] of one picture."""
        config = self._config
        num_frames, height, width = picture.shape
        pixels = np.frombuffer(picture.pixels, dtype=np.uint8).reshape(num_frames, height, width, 3)
        missing = -num_frames % config.frames_each
        if missing:
            pixels = np.concatenate((pixels, *(pixels[-1:],) * missing))
        side, merge, (times, rows, columns) = config.patch_size, config.merge_size, _grid(picture)
        squares = pixels.reshape(times, config.frames_each, rows, merge, side, columns, merge, side, 3)
        tokens = squares.transpose(0, 2, 5, 3, 6, 1, 4, 7, 8).reshape(picture.num_tokens, -1)
        return tokens[arrangement.order].reshape(picture.num_tokens * merge**2, -1)

    def _normalize(self, patches: npt.NDArray[np.uint8]) -> Tensor:
        """Return [N, K] as the tower reads it."""
        x = torch.from_numpy(patches).to(torch.float32)
        return torch.addcmul(self._shift, x, self._factor, out=x).to(self._dtype)


@dataclass(frozen=True, slots=True)
class _Layer:
    """Attention and a feed-forward, each with a norm before."""

    attention_norm: Norm
    qkv: Linear
    project: Linear
    mlp_norm: Norm
    mlp: MLP | GatedMLP

    @classmethod
    def load(cls, loader: Loader, config: TowerConfig, name: str) -> "_Layer":
        E = config.width
        return cls(
            _load_norm(loader, config, f"{name}.norm1"),
            loader.linear(f"{name}.attn.qkv", 3 * E, E, bias=True),
            loader.linear(f"{name}.attn.proj", E, E, bias=True),
            _load_norm(loader, config, f"{name}.norm2"),
            _load_mlp(loader, config, f"{name}.mlp"),
        )

    def __call__(self, x: Tensor, attention: PackedAttention) -> Tensor:
        """Return what the next layer reads [N, E]; may overwrite ``x``."""
        x = self.project(attention(self.qkv(self.attention_norm(x))), x)
        return self.mlp(self.mlp_norm(x), x)


def _load_mlp(loader: Loader, config: TowerConfig, name: str) -> MLP | GatedMLP:
    E, width = config.width, config.mlp_width
    if not config.is_gated:
        return MLP(loader, f"{name}.fc1", f"{name}.fc2", (E, width, E), "quick_gelu")
    parts = [f"{name}.{part}_proj" for part in ("gate", "up")]
    gate, up = (loader.weight(part, width, E) for part in parts)
    gate_bias, up_bias = loader.biases(*parts, sizes=[width] * 2)
    gate_up = prepare_gated_linear(loader.ops, gate, up, gate_bias, up_bias, loader.dtype, activation="silu")
    return GatedMLP(gate_up, loader.linear(f"{name}.down_proj", E, width, bias=True))


def _load_norm(loader: Loader, config: TowerConfig, name: str) -> Norm:
    if not config.is_gated:
        return LayerNorm(loader, name, config.width, _EPS)
    weight = loader.tensor(f"{name}.weight", config.width).to(loader.ops.activation_dtype(loader.dtype))
    return partial(loader.ops.rms_norm, weight=weight, eps=_EPS)


@dataclass(frozen=True, slots=True)
class _Arrangement:
    """How the patches of pictures of one grid lie: by token, and the tokens of a window one after another."""

    positions: npt.NDArray[np.int64]
    """[2, N] row and column of each patch"""
    frames: list[int]
    """Patches of each frame"""
    windows: list[int]
    """Patches of each window; none if there are no windows"""
    order: npt.NDArray[np.int64]
    """Which token of the picture lies at each place"""
    places: Tensor
    """And the place of each of the picture's tokens"""


@lru_cache(maxsize=256)
def _arrange(grid: tuple[int, int, int], merge_size: int, window: int | None) -> _Arrangement:
    times, rows, columns = (axis.ravel() for axis in np.indices(grid))
    order = np.arange(len(times))
    lengths: list[int] = []
    if window is not None:
        keys = (times, rows // window, columns // window)
        order = np.lexsort(keys[::-1])
        _, counts = np.unique(np.stack(keys)[:, order], axis=1, return_counts=True)
        lengths = (counts * merge_size**2).tolist()
    down, right = (axis.ravel() for axis in np.indices((merge_size, merge_size)))
    places = ((rows, down), (columns, right))
    positions = np.stack([np.add.outer(axis[order] * merge_size, inside).ravel() for axis, inside in places])
    per_frame = grid[1] * grid[2] * merge_size**2
    return _Arrangement(positions, [per_frame] * grid[0], lengths, order, torch.from_numpy(np.argsort(order)))


def _grid(picture: Picture) -> tuple[int, int, int]:
    assert picture.grid is not None, "the family's processor gives its pictures grids"
    return picture.grid
