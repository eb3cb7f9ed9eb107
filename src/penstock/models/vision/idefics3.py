"""Idefics3 and SmolVLM: SigLIP's tower, and a projection of squares of patches, a token each."""

from collections.abc import Sequence

import torch
from torch import Tensor

from penstock.estimate.seeing import TowerShape
from penstock.images.settings import Normalization
from penstock.models.config_json import ConfigJson
from penstock.models.parts import Loader
from penstock.models.vision.layers import Parts, finish
from penstock.models.vision.tower import VisionTower, read_tower
from penstock.protocol import Picture


class Idefics3Encoder:
    """See ``encoder.VisionEncoder``."""

    def __init__(self, raw: ConfigJson, loader: Loader, normalization: Normalization) -> None:
        """Load. Raises ``ModelUnreadable``."""
        config = read_tower(raw.part("vision_config"))
        self._scale = raw.integer("scale_factor", 2)
        self._side = config.image_size // config.patch_size
        if self._side % self._scale:
            raise raw.bad("scale_factor", self._scale, f"a divisor of the {self._side} patches in a row")
        self._tower = VisionTower(loader, config, normalization)
        self.work, self.patch_work = self._tower.work, self._tower.patch_work
        self._projection = loader.linear(
            "connector.modality_projection.proj", loader.config.hidden_size, config.hidden_size * self._scale**2
        )
        self.num_parameters = loader.num_parameters
        self.weights_bytes = loader.weights_bytes

    @staticmethod
    def shape(raw: ConfigJson, hidden_size: int) -> TowerShape:
        """Return what decides the memory of encoding, for a decoder of ``hidden_size``. Raises ``ModelUnreadable``."""
        tower, merged = read_tower(raw.part("vision_config")), raw.integer("scale_factor", 2) ** 2
        return tower.shape(max(hidden_size, merged * tower.hidden_size), merged=merged)

    @torch.inference_mode()
    def encode(self, pictures: Sequence[Picture]) -> list[Tensor]:
        """See ``encoder.VisionEncoder``."""
        return finish(self.encoding(pictures))

    def encoding(self, pictures: Sequence[Picture]) -> Parts[list[Tensor]]:
        """See ``encoder.VisionEncoder``; all pictures are of one shape."""
        if not pictures:
            return []
        side, scale = self._side // self._scale, self._scale
        features = yield from self._tower(pictures)
        # The patches of a square go side by side, row by row.
        squares = features.view(len(pictures), side, scale, side, scale, -1).transpose(2, 3)
        rows = self._projection(squares.reshape(-1, scale**2 * features.shape[-1]))
        return list(torch.split(rows, side**2))
