"""The part of penstock-mini that sees, in plain torch with Hugging Face parameter names: SigLIP tower and projector.

Dimension letters: B drawings or sequences, P patches, W tower width, H heads, D head width, E the decoder's width,
T tokens.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from training.model import MiniModel


@dataclass(frozen=True, kw_only=True, slots=True)
class TowerConfig:
    """The shape of the tower; the defaults are penstock-mini's."""

    image_size: int = 48
    patch_size: int = 8
    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    intermediate_size: int = 512
    norm_eps: float = 1e-6

    @property
    def num_patches(self) -> int:
        """How many tokens an image becomes."""
        return (self.image_size // self.patch_size) ** 2


class Embeddings(nn.Module):
    """Each patch's pixels projected, with what is learned of its place added."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, config.patch_size, stride=config.patch_size)
        self.position_embedding = nn.Embedding(config.num_patches, config.hidden_size)

    def forward(self, pixels_B3YX: Tensor) -> Tensor:
        """What enters the layers [B, P, W]."""
        patches_BPW = self.patch_embedding(pixels_B3YX).flatten(2).transpose(1, 2)
        out_BPW: Tensor = patches_BPW + self.position_embedding.weight
        return out_BPW


class Attention(nn.Module):
    """Every patch looks at every other."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x_BPW: Tensor) -> Tensor:
        """What each patch gathers [B, P, W]."""
        q_BHPD, k_BHPD, v_BHPD = (
            projection(x_BPW).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed_BHPD = F.scaled_dot_product_attention(q_BHPD, k_BHPD, v_BHPD)
        out_BPW: Tensor = self.out_proj(mixed_BHPD.transpose(1, 2).flatten(2))
        return out_BPW


class MLP(nn.Module):
    """The feed-forward block."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Each patch transformed by itself."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


class Layer(nn.Module):
    """Attention, then the feed-forward block, each behind a norm and added back."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.self_attn = Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_BPW: Tensor) -> Tensor:
        """The residual stream after this layer [B, P, W]."""
        x_BPW = x_BPW + self.self_attn(self.layer_norm1(x_BPW))
        out_BPW: Tensor = x_BPW + self.mlp(self.layer_norm2(x_BPW))
        return out_BPW


class Encoder(nn.Module):
    """The layers, under the name that they have in a checkpoint."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))


class VisionModel(nn.Module):
    """SigLIP's tower as LLaVA uses it: the last layer's output, before the norm that follows there."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        # A checkpoint has it; LLaVA's features are taken before it, so it stays as it is made.
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)

    def forward(self, pixels_B3YX: Tensor) -> Tensor:
        """Features [B, P, W]."""
        x_BPW: Tensor = self.embeddings(pixels_B3YX)
        for layer in self.encoder.layers:
            x_BPW = layer(x_BPW)
        return x_BPW


class Tower(nn.Module):
    """The vision model, under the name that it has in a checkpoint."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.vision_model = VisionModel(config)


class Projector(nn.Module):
    """From the tower's features to embeddings of the decoder."""

    def __init__(self, tower_width: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(tower_width, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, features: Tensor) -> Tensor:
        """Embeddings, one for each feature."""
        out: Tensor = self.linear_2(F.gelu(self.linear_1(features)))
        return out


class SeeingModel(nn.Module):
    """penstock-mini with eyes: its parameters have the names of a LLaVA checkpoint."""

    def __init__(self, config: TowerConfig, language_model: MiniModel) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = Tower(config)
        self.multi_modal_projector = Projector(config.hidden_size, language_model.config.hidden_size)
        self.language_model = language_model
        self.initialize()

    def initialize(self) -> None:
        """Draw the new weights; projections back into the residual stream start smaller, by depth."""
        words_rms = self.language_model.model.embed_tokens.weight.square().mean().sqrt().item()
        for name, parameter in self.new_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.endswith("position_embedding.weight"):
                parameter.data.copy_(sines(self.config))
            elif parameter.ndim > 1:
                std: float = parameter[0].numel() ** -0.5
                if name.endswith(("out_proj.weight", "fc2.weight")):
                    std *= (2 * self.config.num_layers) ** -0.5
                elif name.endswith("linear_2.weight"):
                    # What enters the decoder is as large as its own words from the start.
                    std *= words_rms
                nn.init.normal_(parameter, std=std)

    def new_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Tower and projector, by name: all that the decoder did not bring."""
        return [*self.vision_tower.named_parameters(), *self.multi_modal_projector.named_parameters()]

    def embeddings(self, pixels_B3YX: Tensor) -> Tensor:
        """What stands for the images in the decoder [B, P, E]."""
        projected_BPE: Tensor = self.multi_modal_projector(self.vision_tower.vision_model(pixels_B3YX))
        return projected_BPE

    def hidden(self, ids_BT: Tensor, image_id: int, embeddings_BPE: Tensor) -> Tensor:
        """The decoder's final hidden states [B, T, E]; each row of ids has P placeholders for its image."""
        streams = self.language_model.streams(self.inserted(ids_BT, image_id, embeddings_BPE))
        out_BTE: Tensor = self.language_model.model.norm(streams[-1])
        return out_BTE

    def inserted(self, ids_BT: Tensor, image_id: int, embeddings_BPE: Tensor) -> Tensor:
        """What enters the decoder [B, T, E]."""
        text_BTE = self.language_model.model.embed_tokens(ids_BT)
        inserted_BTE: Tensor = text_BTE.masked_scatter((ids_BT == image_id).unsqueeze(-1), embeddings_BPE)
        return inserted_BTE


def sines(config: TowerConfig) -> Tensor:
    """Sines and cosines of each patch's row and column [P, W], so that neighbours are alike before anything is learned.

    Beyer, Zhai and Kolesnikov, "Better plain ViT baselines for ImageNet-1k" (2022), with wavelengths for a small grid.
    """
    side, quarter = config.image_size // config.patch_size, config.hidden_size // 4
    frequencies = torch.logspace(0, -1.5, quarter)
    angles = torch.arange(side)[:, None] * frequencies
    waves = torch.cat((angles.sin(), angles.cos()), dim=1)
    rows, columns = waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)
    return torch.cat((rows, columns), dim=-1).flatten(0, 1)


def pixels_of(images: list[Image.Image], image_size: int) -> Tensor:
    """Images as the tower takes them [B, 3, Y, X]: resized (bicubic), from -1 to 1."""
    size = (image_size, image_size)
    resized = [np.asarray(image.resize(size, Image.Resampling.BICUBIC), dtype=np.float32) for image in images]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).div(127.5).sub(1.0).contiguous()
