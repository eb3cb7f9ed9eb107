"""The vision transformer that CLIP, SigLIP and their kin share: patches in, a row of features for each out.

Dosovitskiy et al., "An Image is Worth 16x16 Words" (2020). n pictures of one size, N tokens of a picture, C hidden
width, H heads, D head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from penstock.estimate.seeing import TowerShape
from penstock.images.settings import Normalization
from penstock.kernels.dtypes import torch_dtype
from penstock.models.config_json import ConfigJson
from penstock.models.parts import Loader
from penstock.models.vision.attention import PackedAttention, keys_and_values, runs
from penstock.models.vision.layers import Layer, Parts, RowWork, in_parts
from penstock.models.vision.patches import Normalizer, cut_patches
from penstock.protocol import Picture

_ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}
"""Kernels' names by upstream's"""

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

    def shape(self, projector_width: int, *, merged: int = 1, num_results: int = 1) -> TowerShape:
        """Return what decides the memory of encoding, with a projector of this shape."""
        return TowerShape(
            width=self.hidden_size,
            num_heads=self.num_heads,
            mlp_width=self.intermediate_size,
            patch_size=self.patch_size,
            merged=merged,
            projector_width=projector_width,
            num_results=num_results,
        )

    @property
    def row_work(self) -> RowWork:
        """What a layer is for a token."""
        return RowWork(self.hidden_size, 2 * self.hidden_size * self.intermediate_size)


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
        dtype = torch_dtype(loader.ops.activation_dtype(loader.dtype))
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


def _load_layer(loader: Loader, config: TowerConfig, prefix: str) -> Layer:
    C = config.hidden_size
    first, second = (LayerNorm(loader, f"{prefix}.layer_norm{i}", C, config.norm_eps) for i in (1, 2))
    names = [f"{prefix}.self_attn.{name}_proj" for name in "qkv"]
    sizes = (C, config.intermediate_size, C)
    return Layer(
        first,
        loader.side_by_side([loader.weight(name, C, C) for name in names], loader.biases(*names, sizes=[C] * 3)),
        loader.linear(f"{prefix}.self_attn.out_proj", C, C, bias=True),
        second,
        MLP(loader, f"{prefix}.mlp.fc1", f"{prefix}.mlp.fc2", sizes, config.activation),
        config.row_work,
    )


def _fractional_positions(side: int) -> Tensor:
    """Return which of the embeddings [side * side] each patch of a full square gets.

    It would be its own, were the quotients exact. They are rounded here as they were in training.
    """
    quotients = (torch.arange(side, dtype=torch.float32) * (1.0 / torch.tensor(side))).clamp(max=1.0 - 1e-6)
    buckets = torch.bucketize(quotients, torch.arange(1 / side, 1.0, 1 / side), right=True)
    return (buckets[:, None] * side + buckets[None, :]).flatten()


class VisionTower:
    """The layers up to the last one that is wanted, and what comes before them."""

    def __init__(
        self, loader: Loader, config: TowerConfig, normalization: Normalization, wanted: Sequence[int] | None = None
    ) -> None:
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
        self._embed_work = C * 3 * P**2
        self._ops, self._dtype = loader.ops, torch_dtype(loader.ops.activation_dtype(loader.dtype))
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
        self._layers = [_load_layer(loader, config, f"vision_tower.encoder.layers.{i}") for i in range(num_layers)]
        self._normalize = Normalizer(normalization, P**2, dtype)
        self.patch_work = num_layers * config.row_work.weights

    def work(self, picture: Picture) -> int:
        """Return the multiply-adds of all layers for a picture or its tiles."""
        N, C = self.config.num_tokens, self.config.hidden_size
        return picture.shape[0] * N * (self.patch_work + len(self._layers) * 2 * N * C)

    def __call__(self, pictures: Sequence[Picture]) -> Parts[Tensor]:
        """Return features [n, N, width], those of wanted layers side by side, of pictures of one height and width.

        ``n`` counts tiles. As many go together as a part has rows for; one that has more goes alone.
        """
        N, patches = self.config.num_tokens, cut_patches(pictures, self.config.patch_size)
        num_patches = N - self.config.has_class_token
        n, width = len(patches) // num_patches, self.config.hidden_size * len(self._wanted or [-1])
        features = torch.empty(n, N, width, dtype=self._dtype)
        for run in runs([N] * n):
            some = patches[run.start * num_patches : run.stop * num_patches]
            features[run.start : run.stop] = yield from self._encode(some)
        return features

    def _encode(self, patches: Tensor) -> Parts[Tensor]:
        config, C = self.config, self.config.hidden_size
        N = config.num_tokens
        embedded = yield from in_parts(lambda some: self._embed(self._normalize(some)), patches, self._embed_work)
        x_nNC = embedded.view(-1, N - config.has_class_token, C)
        if self._class is not None:
            x_nNC = torch.cat([self._class.expand(len(x_nNC), 1, C), x_nNC], 1)
        x = x_nNC.add_(self._positions).view(-1, C)
        del embedded, x_nNC  # what they lay in goes with them
        attention = self._attention(len(x) // N)
        if self._norm_before is not None:
            x = self._norm_before(x)
        results = {0: x.clone()} if self._wanted is not None and 0 in self._wanted else {}
        for i, layer in enumerate(self._layers, 1):
            yield from layer(x, attention)
            if self._wanted is not None and i in self._wanted:
                results[i] = x if i == len(self._layers) else x.clone()  # the next layer adds to it
        if self._wanted is None:
            return (x if self._norm_after is None else self._norm_after(x)).view(-1, N, C)
        return torch.cat([results[i] for i in self._wanted], 1).view(-1, N, C * len(self._wanted))

    def _attention(self, num_pictures: int) -> PackedAttention:
        """Return the attention of pictures whose tokens see each other; where they are, the embeddings have said."""
        H, D = self.config.num_heads, self.config.hidden_size // self.config.num_heads
        lengths = [self.config.num_tokens] * num_pictures
        unrotated = torch.ones(sum(lengths), 1, D), torch.zeros(sum(lengths), 1, D)
        kv = keys_and_values(self._ops, self._dtype, [lengths], H, D)
        return PackedAttention(self._ops, lengths, H, D, unrotated, kv)
