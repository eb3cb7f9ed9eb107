"""The vision transformer that CLIP, SigLIP and their kin share: patches in, a row of features for each out.

Dosovitskiy et al., "An Image is Worth 16x16 Words" (2020). n pictures of one size, N tokens of a picture, C hidden
width, H heads, D head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from penstock.models.config_json import ConfigJson
from penstock.models.parts import Loader
from penstock.models.vision.attention import PackedAttention, keys_and_values

_ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}
"""Kernels' names by upstream's"""


_TOKENS_AT_ONCE = 4096
"""More take memory and are no faster: products are large enough."""
_OF_IDEFICS3 = ("idefics3", "idefics3_vision", "smolvlm", "smolvlm_vision")


@dataclass(frozen=True, kw_only=True, slots=True)
class TowerConfig:
    """A tower's shape. Defaults are SigLIP's."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    patch_size: int
    image_size: int
    activation: str
    norm_eps: float
    has_class_token: bool = False
    patch_bias: bool = True
    norm_before: str | None = None
    """A norm of what the first layer reads, by its name."""
    norm_after: str | None = "post_layernorm"
    has_fractional_positions: bool = False
    """Patches find theirs by dividing, as those of images of any size would."""

    @property
    def num_tokens(self) -> int:
        """Tokens of a picture."""
        return (self.image_size // self.patch_size) ** 2 + self.has_class_token


def read_activation(raw: ConfigJson, key: str, default: str) -> str:
    """Return a feed-forward's activation, by kernels' name. Raises ``ModelUnreadable``."""
    name = raw.values.get(key, default)
    if name not in _ACTIVATIONS:
        raise raw.bad(key, name, f"one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def read_tower(raw: ConfigJson) -> TowerConfig:
    """Return the tower that a ``vision_config`` describes. Raises ``ModelUnreadable``."""
    kind = raw.values.get("model_type", "clip_vision_model")
    if kind not in ("clip_vision_model", "siglip_vision_model", *_OF_IDEFICS3):
        raise raw.bad("model_type", kind, "clip_vision_model or siglip_vision_model")
    is_clip, is_of_idefics3 = kind == "clip_vision_model", kind in _OF_IDEFICS3
    config = TowerConfig(
        hidden_size=raw.integer("hidden_size", 1152 if is_of_idefics3 else 768),
        intermediate_size=raw.integer("intermediate_size", 3072),
        num_layers=raw.integer("num_hidden_layers", 12, most=1000),
        num_heads=raw.integer("num_attention_heads", 16 if is_of_idefics3 else 12),
        patch_size=raw.integer("patch_size", 32 if is_clip or is_of_idefics3 else 16),
        image_size=raw.integer("image_size", 224),
        activation=read_activation(raw, "hidden_act", "quick_gelu" if is_clip else "gelu_pytorch_tanh"),
        norm_eps=raw.number("layer_norm_eps", 1e-5 if is_clip else 1e-6),
    )
    if config.hidden_size % config.num_heads:
        raise raw.bad("num_attention_heads", config.num_heads, f"a divisor of the width {config.hidden_size}")
    if is_clip:
        return replace(config, has_class_token=True, patch_bias=False, norm_before="pre_layrnorm")
    return replace(config, has_fractional_positions=is_of_idefics3)


class LayerNorm:
    """Ba et al., "Layer Normalization" (2016)."""

    def __init__(self, loader: Loader, name: str, width: int, eps: float) -> None:
        dtype = loader.ops.activation_dtype(loader.dtype)
        self._weight, self._bias = (loader.tensor(f"{name}.{part}", width).to(dtype) for part in ("weight", "bias"))
        self._eps = eps
        self._ops = loader.ops

    def __call__(self, x: Tensor) -> Tensor:
        """Return [n * N, C] from ``x`` [n * N, C]."""
        return self._ops.layer_norm(x, self._weight, self._bias, self._eps)


class MLP:
    """second(activation(first(x))): a tower's feed-forward, and most projectors."""

    def __init__(
        self,
        loader: Loader,
        first: str,
        second: str,
        sizes: tuple[int, int, int],
        activation: str,
        *,
        bias: bool = True,
    ) -> None:
        """Take the projections called ``first`` and ``second``, between ``sizes``."""
        num_inputs, num_hidden, num_outputs = sizes
        self._first = loader.linear(first, num_hidden, num_inputs, bias=bias, activation=activation)
        self._second = loader.linear(second, num_outputs, num_hidden, bias=bias)

    def __call__(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """Return [T, E] from ``x`` [T, K], plus ``added``, which may be overwritten."""
        return self._second(self._first(x), added)


class _Layer:
    def __init__(self, loader: Loader, config: TowerConfig, prefix: str) -> None:
        C = config.hidden_size
        self._norms = [LayerNorm(loader, f"{prefix}.layer_norm{i}", C, config.norm_eps) for i in (1, 2)]
        names = [f"{prefix}.self_attn.{name}_proj" for name in "qkv"]
        self._qkv = loader.side_by_side(
            [loader.weight(name, C, C) for name in names], loader.biases(*names, sizes=[C] * 3)
        )
        self._out = loader.linear(f"{prefix}.self_attn.out_proj", C, C, bias=True)
        sizes = (C, config.intermediate_size, C)
        self._mlp = MLP(loader, f"{prefix}.mlp.fc1", f"{prefix}.mlp.fc2", sizes, config.activation)

    def __call__(self, x: Tensor, attention: PackedAttention) -> Tensor:
        """Return [n * N, C] from ``x`` [n * N, C], which may be overwritten."""
        before_attention, before_mlp = self._norms
        x = self._out(attention(self._qkv(before_attention(x))), x)
        return self._mlp(before_mlp(x), x)


def _fractional_positions(side: int) -> Tensor:
    """Return which of the embeddings [side * side] each patch of a full square gets.

    It would be its own, were the quotients exact. They are rounded here as they were in training.
    """
    quotients = (torch.arange(side, dtype=torch.float32) * (1.0 / torch.tensor(side))).clamp(max=1.0 - 1e-6)
    buckets = torch.bucketize(quotients, torch.arange(1 / side, 1.0, 1 / side), right=True)
    return (buckets[:, None] * side + buckets[None, :]).flatten()


class VisionTower:
    """The layers up to the last one that is wanted, and what comes before them."""

    def __init__(self, loader: Loader, config: TowerConfig, wanted: Sequence[int] | None = None) -> None:
        """``wanted`` are the layers whose results are, counted as transformers does.

        0 is what the first layer reads, -1 the last one's result. None: the last one's, normed.
        """
        self.config = config
        C, P = config.hidden_size, config.patch_size
        layers = range(config.num_layers + 1)
        self._wanted = None if wanted is None else [layers[index] for index in wanted]
        embeddings = "vision_tower.embeddings"
        weight_CKPP = loader.tensor(f"{embeddings}.patch_embedding.weight", C, 3, P, P)
        bias = loader.biases(f"{embeddings}.patch_embedding", sizes=[C])[0] if config.patch_bias else None
        # Patches come as they lie in an image, colours innermost.
        self._embed = loader.ops.prepare_linear(weight_CKPP.permute(0, 2, 3, 1).reshape(C, -1), bias, exact=True)
        self._ops, self._dtype = loader.ops, loader.ops.activation_dtype(loader.dtype)
        dtype = self._dtype
        positions = loader.tensor(f"{embeddings}.position_embedding.weight", config.num_tokens, C).to(dtype)
        if config.has_fractional_positions:
            positions = positions[_fractional_positions(config.image_size // P)]
        self._positions = positions
        self._class = loader.tensor(f"{embeddings}.class_embedding", C).to(dtype) if config.has_class_token else None
        self._norm_before, self._norm_after = (
            None if name is None else LayerNorm(loader, f"vision_tower.{name}", C, config.norm_eps)
            for name in (config.norm_before, config.norm_after if wanted is None else None)
        )
        num_layers = max(self._wanted) if self._wanted else config.num_layers
        self._layers = [_Layer(loader, config, f"vision_tower.encoder.layers.{i}") for i in range(num_layers)]

    def __call__(self, patches: Tensor) -> Tensor:
        """Return features [n, N, width], those of wanted layers side by side, from patches [n * grid, P * P * 3]."""
        num_patches = self.config.num_tokens - self.config.has_class_token
        each = max(1, _TOKENS_AT_ONCE // num_patches) * num_patches
        return torch.cat([self._encode(part) for part in torch.split(patches, each)])

    def _encode(self, patches: Tensor) -> Tensor:
        config, C = self.config, self.config.hidden_size
        N = config.num_tokens
        x_nNC = self._embed(patches).view(-1, N - config.has_class_token, C)
        if self._class is not None:
            x_nNC = torch.cat([self._class.expand(len(x_nNC), 1, C), x_nNC], 1)
        attention = self._attention(len(x_nNC))
        x = (x_nNC + self._positions).view(-1, C)
        if self._norm_before is not None:
            x = self._norm_before(x)
        if self._wanted is None:
            for layer in self._layers:
                x = layer(x, attention)
            return (x if self._norm_after is None else self._norm_after(x)).view(-1, N, C)
        results = {0: x.clone()} if 0 in self._wanted else {}
        for i, layer in enumerate(self._layers, 1):
            x = layer(x, attention)
            if i in self._wanted:
                results[i] = x if i == len(self._layers) else x.clone()  # the next layer adds to it
        return torch.cat([results[i] for i in self._wanted], 1).view(-1, N, C * len(self._wanted))

    def _attention(self, num_pictures: int) -> PackedAttention:
        """Return the attention of pictures whose tokens see each other; where they are, the embeddings have said."""
        H, D = self.config.num_heads, self.config.hidden_size // self.config.num_heads
        lengths = [self.config.num_tokens] * num_pictures
        unrotated = torch.ones(sum(lengths), 1, D), torch.zeros(sum(lengths), 1, D)
        kv = keys_and_values(self._ops, self._dtype, lengths, H, D)
        return PackedAttention(self._ops, lengths, H, D, unrotated, kv)
