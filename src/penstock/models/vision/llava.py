"""LLaVA 1.5: a tower's features of each patch, brought to the decoder's width by two projections.

Liu et al., "Improved Baselines with Visual Instruction Tuning" (2023).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from penstock.estimate.seeing import TowerShape
from penstock.images.settings import Normalization
from penstock.models.config_json import ConfigJson
from penstock.models.parts import Loader
from penstock.models.vision.layers import Parts, finish, in_parts
from penstock.models.vision.tower import MLP, VisionTower, read_activation, read_tower
from penstock.protocol import Picture


class LlavaEncoder:
    """See ``encoder.VisionEncoder``."""

    def __init__(self, raw: ConfigJson, loader: Loader, normalization: Normalization) -> None:
        """Load. Raises ``ModelUnreadable``."""
        chosen = raw.values.get("vision_feature_layer", -2)
        wanted = chosen if isinstance(chosen, list) else [chosen]
        config = read_tower(raw.part("vision_config"))
        if not all(isinstance(index, int) and -config.num_layers - 1 <= index <= config.num_layers for index in wanted):
            raise raw.bad("vision_feature_layer", chosen, f"of the {config.num_layers} layers there are")
        strategy = raw.values.get("vision_feature_select_strategy", "default")
        if strategy not in ("default", "full"):
            raise raw.bad("vision_feature_select_strategy", strategy, "default or full")
        self._first = int(strategy == "default")
        self._tower = VisionTower(loader, config, normalization, wanted)
        self.work, self.patch_work = self._tower.work, self._tower.patch_work
        E, prefix = loader.config.hidden_size, "multi_modal_projector"
        width = config.hidden_size * len(wanted)
        self._projector_work = width * E + E**2
        self._projector = MLP(
            loader,
            f"{prefix}.linear_1",
            f"{prefix}.linear_2",
            (width, E, E),
            read_activation(raw, "projector_hidden_act", "gelu"),
            bias=raw.flag("multimodal_projector_bias", True),
        )
        self._scale = loader.config.inserted_scale
        self.num_parameters = loader.num_parameters
        self.weights_bytes = loader.weights_bytes

    @staticmethod
    def shape(raw: ConfigJson, hidden_size: int) -> TowerShape:
        """Return what decides the memory of encoding, for a decoder of ``hidden_size``. Raises ``ModelUnreadable``."""
        chosen = raw.values.get("vision_feature_layer", -2)
        num_results = len(chosen) if isinstance(chosen, list) else 1
        return read_tower(raw.part("vision_config")).shape(hidden_size, num_results=num_results)

    @torch.inference_mode()
    def encode(self, pictures: Sequence[Picture]) -> list[Tensor]:
        """See ``encoder.VisionEncoder``."""
        return finish(self.encoding(pictures))

    def encoding(self, pictures: Sequence[Picture]) -> Parts[list[Tensor]]:
        """See ``encoder.VisionEncoder``; all have one height and width, and tiles are encoded one by one."""
        if not pictures:
            return []
        features = (yield from self._tower(pictures))[:, self._first :]
        rows = yield from in_parts(self._projector, features.flatten(0, 1), self._projector_work)
        if self._scale != 1.0:
            rows *= self._scale
        return list(torch.split(rows, [picture.shape[0] * features.shape[1] for picture in pictures]))
