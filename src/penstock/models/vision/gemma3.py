"""Gemma 3: SigLIP's tower, whose patches are averaged in squares, normed and projected.

Gemma Team, "Gemma 3 Technical Report" (2025). C width of the tower, E hidden width of the decoder.
"""

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from penstock.estimate.seeing import TowerShape
from penstock.images.settings import Normalization
from penstock.models.config_json import ConfigJson
from penstock.models.parts import Loader
from penstock.models.vision.layers import Parts, finish
from penstock.models.vision.tower import VisionTower, read_tower
from penstock.protocol import Picture


class Gemma3Encoder:
    """See ``encoder.VisionEncoder``."""

    def __init__(self, raw: ConfigJson, loader: Loader, normalization: Normalization) -> None:
        """Load. Raises ``ModelUnreadable``."""
        config = read_tower(raw.part("vision_config"))
        patches, tokens = config.image_size // config.patch_size, raw.integer("mm_tokens_per_image", 256)
        self._side = round(tokens**0.5)
        self._pooled = patches // self._side
        if self._side**2 != tokens or self._side * self._pooled != patches:
            raise raw.bad("mm_tokens_per_image", tokens, f"a square that the {patches} x {patches} patches divide into")
        self._tower = VisionTower(loader, config, normalization)
        self.work, self.patch_work = self._tower.work, self._tower.patch_work
        C, E, prefix = config.hidden_size, loader.config.hidden_size, "multi_modal_projector"
        self._norm, self._norm_eps = loader.norm(f"{prefix}.mm_soft_emb_norm", C), config.norm_eps
        self._ops = loader.ops
        weight_CE = loader.tensor(f"{prefix}.mm_input_projection_weight", C, E)
        self._projection = loader.side_by_side([weight_CE.T])
        self.num_parameters = loader.num_parameters
        self.weights_bytes = loader.weights_bytes

    @staticmethod
    def shape(raw: ConfigJson, hidden_size: int) -> TowerShape:
        """Return what decides the memory of encoding, for a decoder of ``hidden_size``. Raises ``ModelUnreadable``."""
        return read_tower(raw.part("vision_config")).shape(hidden_size)

    @torch.inference_mode()
    def encode(self, pictures: Sequence[Picture]) -> list[Tensor]:
        """See ``encoder.VisionEncoder``."""
        return finish(self.encoding(pictures))

    def encoding(self, pictures: Sequence[Picture]) -> Parts[list[Tensor]]:
        """See ``encoder.VisionEncoder``; all pictures are of one shape."""
        if not pictures:
            return []
        side, pooled = self._side, self._pooled
        features = yield from self._tower(pictures)
        squares = features.view(len(pictures) * side, pooled, side, pooled, -1)
        # One after another: a sum over dimensions may be taken in another order for another number of pictures.
        total = torch.zeros_like(squares[:, 0, :, 0])
        for row, column in product(range(pooled), repeat=2):
            total += squares[:, row, :, column]
        mean = (total / pooled**2).flatten(0, 1)
        rows = self._projection(self._ops.rms_norm(mean, self._norm, self._norm_eps))
        return list(torch.split(rows, side**2))
