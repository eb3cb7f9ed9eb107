"""The towers of Qwen2-VL and Qwen2.5-VL, which see pictures in their own shapes.

Wang et al., "Qwen2-VL" (2024), and Bai et al., "Qwen2.5-VL" (2025). Patches of all pictures lie one after another.
Those of a frame see each other; in most layers of Qwen2.5-VL only those of a window of it do.

N patches, E tower width, D head width, M patches that become a token, K values of a patch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock.estimate.seeing import TowerShape
from penstock.images.settings import Normalization
from penstock.kernels.dtypes import torch_dtype
from penstock.models.config_json import ConfigJson
from penstock.models.parts import GatedMLP, Loader
from penstock.models.vision.attention import ROWS_AT_ONCE, PackedAttention, keys_and_values, runs
from penstock.models.vision.layers import Layer, Norm, Parts, RowWork, finish, in_parts
from penstock.models.vision.patches import Normalizer
from penstock.models.vision.tower import MLP, LayerNorm
from penstock.protocol import Picture
from penstock.quant import prepare_gated_linear

_EPS = 1e-6


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

    @property
    def shape(self) -> TowerShape:
        """What decides the memory of encoding."""
        return TowerShape(
            width=self.width,
            num_heads=self.num_heads,
            mlp_width=self.mlp_width,
            patch_size=self.patch_size,
            frames_each=self.frames_each,
            merged=self.merge_size**2,
            projector_width=self.width * self.merge_size**2,
        )

    @property
    def row_work(self) -> RowWork:
        """What a layer is for a patch."""
        return RowWork(self.width, (3 if self.is_gated else 2) * self.width * self.mlp_width)


def read_qwen2_vl(raw: ConfigJson) -> TowerConfig:
    """Return the shape of a Qwen2-VL's. Raises ``ModelUnreadable``."""
    vision = raw.part("vision_config")
    width = vision.integer("embed_dim", 1280)
    return TowerConfig(
        **_common(vision, width, "quick_gelu"),
        mlp_width=int(width * vision.number("mlp_ratio", 4.0)),
        is_gated=False,
    )


def read_qwen2_5_vl(raw: ConfigJson) -> TowerConfig:
    """Return the shape of a Qwen2.5-VL's. Raises ``ModelUnreadable``."""
    vision = raw.part("vision_config")
    common = _common(vision, vision.integer("hidden_size", 3584), "silu")
    return TowerConfig(
        **common,
        mlp_width=vision.integer("intermediate_size", 3420),
        is_gated=True,
        window=max(1, vision.integer("window_size", 112) // (common["patch_size"] * common["merge_size"])),
        full_layers=frozenset(map(int, vision.values.get("fullatt_block_indexes", (7, 15, 23, 31)))),
    )


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
        self._dtype = torch_dtype(loader.ops.activation_dtype(loader.dtype))
        E, frames, side = config.width, config.frames_each, config.patch_size
        kernel = loader.tensor("visual.patch_embed.proj.weight", E, 3, frames, side, side)
        # Its inputs in the order of a picture's bytes.
        self._embed = loader.ops.prepare_linear(kernel.permute(0, 2, 3, 4, 1).flatten(1), None, exact=True)
        self._normalize = Normalizer(normalization, frames * side**2, self._dtype)
        self._layers = [_load_layer(loader, config, f"visual.blocks.{i}") for i in range(config.num_layers)]
        self._merge_norm = _load_norm(loader, config, "visual.merger.ln_q")
        self._merged_width = E * config.merge_size**2
        self._num_outputs = loader.config.hidden_size
        sizes = (self._merged_width, self._merged_width, self._num_outputs)
        self._merger = MLP(loader, "visual.merger.mlp.0", "visual.merger.mlp.2", sizes, "gelu")
        self._merge_work = self._merged_width * (self._merged_width + self._num_outputs)
        self._merged_at_once = max(1, ROWS_AT_ONCE // config.merge_size**2)
        self._embed_work = E * 3 * frames * side**2
        self.patch_work = config.num_layers * config.row_work.weights
        # Of a head's pairs the first half turns with the row, the other with the column.
        num_each = E // config.num_heads // 4
        inverse = 1.0 / config.rope_theta ** (torch.arange(num_each, dtype=torch.float32) / num_each)
        self._inverse, self._axes = inverse.repeat(2), torch.arange(2).repeat_interleave(num_each)
        self.num_parameters = loader.num_parameters
        self.weights_bytes = loader.weights_bytes

    def work(self, picture: Picture) -> int:
        """Return the multiply-adds of all layers for a picture."""
        config = self._config
        num_frames, rows, columns = _grid(picture)
        num_patches = rows * columns * config.merge_size**2
        in_window = num_patches if config.window is None else (config.window * config.merge_size) ** 2
        num_full = config.num_layers if config.window is None else len(config.full_layers)
        num_seen = num_full * num_patches + (config.num_layers - num_full) * min(in_window, num_patches)
        return num_frames * num_patches * (self.patch_work + 2 * config.width * num_seen)

    @torch.inference_mode()
    def encode(self, pictures: Sequence[Picture]) -> list[Tensor]:
        """See ``encoder.VisionEncoder``."""
        return finish(self.encoding(pictures))

    def encoding(self, pictures: Sequence[Picture]) -> Parts[list[Tensor]]:
        """See ``encoder.VisionEncoder``; a frame sees no other, so each could be a picture."""
        features = [torch.empty(picture.num_tokens, self._num_outputs, dtype=self._dtype) for picture in pictures]
        frames = [
            _Frame(picture, time, rows)
            for picture, to in zip(pictures, features, strict=True)
            for time, rows in enumerate(to.view(_grid(picture)[0], -1, self._num_outputs))
        ]
        for run in runs([frame.num_tokens * self._config.merge_size**2 for frame in frames]):
            yield from self._encode(frames[run.start : run.stop])
        return features

    def _encode(self, frames: "Sequence[_Frame]") -> Parts[None]:
        """Write the features of frames, computed in one pass."""
        config, ops = self._config, self._ops
        arrangements = [_arrange(*frame.rows_and_columns, config.merge_size, config.window) for frame in frames]
        positions = np.concatenate([arrangement.positions for arrangement in arrangements], axis=1)
        lengths = [arrangement.positions.shape[1] for arrangement in arrangements]
        windows = [length for arrangement in arrangements for length in arrangement.windows]
        heads = config.num_heads, config.width // config.num_heads
        angles = ops.rope_angles(torch.from_numpy(positions), self._inverse, heads[1], axes=self._axes)
        kv = keys_and_values(ops, self._dtype, [lengths, windows], *heads)
        of_frames = PackedAttention(ops, lengths, *heads, angles, kv)
        of_windows = PackedAttention(ops, windows, *heads, angles, kv) if windows else of_frames

        patches = [self._patches(*pair) for pair in zip(frames, arrangements, strict=True)]
        together = torch.from_numpy(np.concatenate(patches) if len(patches) > 1 else patches[0])
        del patches
        x = yield from in_parts(lambda some: self._embed(self._normalize(some)), together, self._embed_work)
        del together
        for i, layer in enumerate(self._layers):
            yield from layer(x, of_frames if i in config.full_layers else of_windows)
        merged = yield from in_parts(
            self._merge, x.view(-1, self._merged_width), self._merge_work, self._merged_at_once
        )
        tokens = torch.split(merged, [frame.num_tokens for frame in frames])
        for frame, some, arrangement in zip(frames, tokens, arrangements, strict=True):
            torch.index_select(some, 0, arrangement.places, out=frame.features)

    def _merge(self, x: Tensor) -> Tensor:
        """Return tokens [N / M, E] from patches [N / M, M * E]."""
        normed = self._merge_norm(x.view(-1, self._config.width))
        return self._merger(normed.view(-1, self._merged_width))

    def _patches(self, frame: "_Frame", arrangement: "_Arrangement") -> npt.NDArray[np.uint8]:
        """Return [N, K] of a frame."""
        config = self._config
        num_images, height, width = frame.picture.shape
        pixels = np.frombuffer(frame.picture.pixels, dtype=np.uint8).reshape(num_images, height, width, 3)
        # The last is taken again where one is missing.
        images = [min(frame.time * config.frames_each + i, num_images - 1) for i in range(config.frames_each)]
        side, merge, (rows, columns) = config.patch_size, config.merge_size, frame.rows_and_columns
        squares = pixels[images].reshape(config.frames_each, rows, merge, side, columns, merge, side, 3)
        tokens = squares.transpose(1, 4, 2, 5, 0, 3, 6, 7).reshape(frame.num_tokens, -1)
        return tokens[arrangement.order].reshape(frame.num_tokens * merge**2, -1)


@dataclass(frozen=True, slots=True)
class _Frame:
    """What the tower sees at a time: one of a video's, or an image."""

    picture: Picture
    time: int
    features: Tensor
    """[num_tokens, decoder's E] to be written"""

    @property
    def num_tokens(self) -> int:
        """Those that it becomes."""
        return len(self.features)

    @property
    def rows_and_columns(self) -> tuple[int, int]:
        """Of its tokens."""
        return _grid(self.picture)[1:]


def _load_layer(loader: Loader, config: TowerConfig, name: str) -> Layer:
    E = config.width
    return Layer(
        _load_norm(loader, config, f"{name}.norm1"),
        loader.linear(f"{name}.attn.qkv", 3 * E, E, bias=True),
        loader.linear(f"{name}.attn.proj", E, E, bias=True),
        _load_norm(loader, config, f"{name}.norm2"),
        _load_mlp(loader, config, f"{name}.mlp"),
        config.row_work,
    )


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
    weight = loader.tensor(f"{name}.weight", config.width).to(torch_dtype(loader.ops.activation_dtype(loader.dtype)))
    return partial(loader.ops.rms_norm, weight=weight, eps=_EPS)


@dataclass(frozen=True, slots=True)
class _Arrangement:
    """How the patches of a frame lie: by token, and the tokens of a window one after another."""

    positions: npt.NDArray[np.int64]
    """[2, N] row and column of each patch"""
    windows: list[int]
    """Patches of each window; none if there are no windows"""
    order: npt.NDArray[np.int64]
    """Which token of the frame lies at each place"""
    places: Tensor
    """And the place of each of the frame's tokens"""


@lru_cache(maxsize=256)
def _arrange(num_rows: int, num_columns: int, merge_size: int, window: int | None) -> _Arrangement:
    rows, columns = (axis.ravel() for axis in np.indices((num_rows, num_columns)))
    order = np.arange(len(rows))
    lengths: list[int] = []
    if window is not None:
        keys = (rows // window, columns // window)
        order = np.lexsort(keys[::-1])
        _, counts = np.unique(np.stack(keys)[:, order], axis=1, return_counts=True)
        lengths = (counts * merge_size**2).tolist()
    down, right = (axis.ravel() for axis in np.indices((merge_size, merge_size)))
    places = ((rows, down), (columns, right))
    positions = np.stack([np.add.outer(axis[order] * merge_size, inside).ravel() for axis, inside in places])
    return _Arrangement(positions, lengths, order, torch.from_numpy(np.argsort(order)))


def _grid(picture: Picture) -> tuple[int, int, int]:
    assert picture.grid is not None, "the family's processor gives its pictures grids"
    return picture.grid
