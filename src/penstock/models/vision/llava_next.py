"""LLaVA-NeXT: LLaVA's features of an image and of its tiles, brought into one row after another.

E hidden width of the decoder, N features of a tile.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from penstock.images.families.llava_next import best_resolution, read_resolutions, seen_part
from penstock.images.settings import ImageSettings, Normalization
from penstock.kernels.dtypes import torch_dtype
from penstock.models.config_json import ConfigJson
from penstock.models.parts import Loader
from penstock.models.vision.layers import Parts, finish
from penstock.models.vision.llava import LlavaEncoder
from penstock.protocol import Picture


class LlavaNextEncoder:
    """See ``encoder.VisionEncoder``."""

    def __init__(self, raw: ConfigJson, loader: Loader, normalization: Normalization) -> None:
        """Load. Raises ``ModelUnreadable``."""
        self._resolutions = read_resolutions(ImageSettings(raw.values, str(raw.path)))
        E = loader.config.hidden_size
        newline = loader.tensor("image_newline", E).to(torch_dtype(loader.ops.activation_dtype(loader.dtype)))
        self._newline = newline * loader.config.inserted_scale
        self._tiles = LlavaEncoder(raw, loader, normalization)
        self.work, self.patch_work = self._tiles.work, self._tiles.patch_work
        self.num_parameters, self.weights_bytes = self._tiles.num_parameters, self._tiles.weights_bytes

    @torch.inference_mode()
    def encode(self, pictures: Sequence[Picture]) -> list[Tensor]:
        """See ``encoder.VisionEncoder``."""
        return finish(self.encoding(pictures))

    def encoding(self, pictures: Sequence[Picture]) -> Parts[list[Tensor]]:
        """See ``encoder.VisionEncoder``; all have tiles of one height and width."""
        features = yield from self._tiles.encoding(pictures)
        return [self._arranged(picture, rows) for picture, rows in zip(pictures, features, strict=True)]

    def _arranged(self, picture: Picture, features: Tensor) -> Tensor:
        """Return the rows [num_tokens, E] of a picture from those of the whole and its tiles [tiles * N, E]."""
        num_tiles, tile, _ = picture.shape
        whole, rest = torch.split(features, [len(features) // num_tiles, len(features) - len(features) // num_tiles])
        if num_tiles == 1:
            return torch.cat([whole, self._newline[None]])
        side, E = round(len(whole) ** 0.5), features.shape[1]
        height, width = best_resolution(picture.size, self._resolutions)
        rows, columns = height // tile, width // tile
        grid = rest.view(rows, columns, side, side, E).transpose(1, 2).reshape(rows * side, columns * side, E)
        seen = seen_part(picture.size, (rows * side, columns * side))
        grid = grid[seen.top : seen.top + seen.num_rows, seen.left : seen.left + seen.num_columns]
        ends = self._newline.expand(seen.num_rows, 1, E)
        return torch.cat([whole, torch.cat([grid, ends], 1).flatten(0, 1)])
