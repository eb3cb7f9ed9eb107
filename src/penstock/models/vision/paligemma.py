"""PaliGemma 1 and 2: SigLIP's features of each patch, projected.

Beyer et al., "PaliGemma: A versatile 3B VLM for transfer" (2024).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from penstock.images.settings import Normalization
from penstock.models.config_json import ConfigJson
from penstock.models.parts import Loader
from penstock.models.vision.layers import Parts, finish, in_parts
from penstock.models.vision.tower import VisionTower, read_tower
from penstock.protocol import Picture


class PaliGemmaEncoder:
    """See ``encoder.VisionEncoder``."""

    def __init__(self, raw: ConfigJson, loader: Loader, normalization: Normalization) -> None:
        """Load. Raises ``ModelUnreadable``."""
        config = read_tower(raw.part("vision_config"))
        self._tower = VisionTower(loader, config, normalization)
        self.work, self.patch_work = self._tower.work, self._tower.patch_work
        E, name = loader.config.hidden_size, "multi_modal_projector.linear"
        self._projection = loader.linear(name, E, config.hidden_size, bias=True)
        self._projection_work = E * config.hidden_size
        self.num_parameters = loader.num_parameters
        self.weights_bytes = loader.weights_bytes

    @torch.inference_mode()
    def encode(self, pictures: Sequence[Picture]) -> list[Tensor]:
        """See ``encoder.VisionEncoder``."""
        return finish(self.encoding(pictures))

    def encoding(self, pictures: Sequence[Picture]) -> Parts[list[Tensor]]:
        """See ``encoder.VisionEncoder``; all pictures are of one shape."""
        if not pictures:
            return []
        features = yield from self._tower(pictures)
        rows = yield from in_parts(self._projection, features.flatten(0, 1), self._projection_work)
        return list(torch.split(rows, features.shape[1]))
