"""LLaVA-NeXT: an image whole, and again in tiles at a resolution near its own.

Liu et al., "LLaVA-NeXT: Improved reasoning, OCR, and world knowledge" (2024). What the tiles have beyond the image,
which keeps its aspect, is dropped after encoding, and each row of what is left ends with a feature of its own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from PIL.Image import Image

from penstock.images.families.llava import num_features
from penstock.images.processor import Expansion, Prepared
from penstock.images.settings import ImageSettings, SeeingFiles
from penstock.images.shown import Detail

_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


class LlavaNextProcessor:
    """See ``processor.Processor``."""

    video_marker: str | None = None
    video_placeholder: str | None = None

    def __init__(self, files: SeeingFiles) -> None:
        """Read sizes. Raises ``ModelUnreadable``."""
        self.placeholder = self.image_marker = files.processor.text("image_token", "<image>")
        vision = files.model.part("vision_config")
        self._resolutions = read_resolutions(files.model)
        if files.image.values.get("image_grid_pinpoints") and read_resolutions(files.image) != self._resolutions:
            raise files.image.bad(
                "image_grid_pinpoints", files.image.values["image_grid_pinpoints"], "those of config.json"
            )
        self._tile = vision.integer("image_size", 224)
        self.most_pixels = self._tile**2
        self.most_tiles = 1 + max(height // self._tile * (width // self._tile) for height, width in self._resolutions)
        self._grid = self._tile // vision.integer("patch_size", 32)
        self._resampling = files.image.resampling()
        size = files.image.size("size")
        if any(length != self._tile for length in size.values()):
            raise files.image.bad("size", files.image.values["size"], f"the {self._tile} of config.json's image_size")
        if num_features(files, self._tile, self._tile) != self._grid**2:
            raise files.model.bad(
                "vision_feature_select_strategy",
                files.model.values.get("vision_feature_select_strategy"),
                "what leaves one row of features for each patch",
            )

    def image(self, image: Image, detail: Detail) -> Expansion:
        """Prepare an RGB image; where ``detail`` is low, as a whole alone."""
        size, tile = (image.height, image.width), self._tile
        tiles = [image.resize((tile, tile), self._resampling)]
        num_tokens = self._grid**2
        if detail == "low":
            num_tokens += 1
        else:
            resolution = best_resolution(size, self._resolutions)
            tiles += self._cut(image, resolution)
            seen = seen_part(size, (resolution[0] // tile * self._grid, resolution[1] // tile * self._grid))
            num_tokens += seen.num_rows * (seen.num_columns + 1)
        pixels = np.stack([np.asarray(tile) for tile in tiles])
        prepared = Prepared(pixels=pixels, num_tokens=num_tokens, size=size)
        return Expansion(text=self.placeholder * num_tokens, pictures=(prepared,))

    def video(self, frames: Sequence[Image], frames_per_s: float) -> Expansion:
        """Never asked for: there is no marker."""
        raise NotImplementedError

    def _cut(self, image: Image, resolution: tuple[int, int]) -> list[Image]:
        """Return the tiles, row by row, of an image brought to ``resolution``: as large as fits, black around it."""
        height, width = resolution
        of_width, of_height = width / image.width, height / image.height
        if of_width < of_height:
            fitted = (width, min(math.ceil(image.height * of_width), height))
        else:
            fitted = (min(math.ceil(image.width * of_height), width), height)
        resized = image.resize(fitted, self._resampling)
        # A crop that begins outside of an image is black there.
        left, top = (width - resized.width) // 2, (height - resized.height) // 2
        places = product(range(-top, height - top, self._tile), range(-left, width - left, self._tile))
        return [resized.crop((x, y, x + self._tile, y + self._tile)) for y, x in places]


@dataclass(frozen=True, slots=True)
class SeenPart:
    """The part of a grid of patches that the image fills."""

    top: int
    left: int
    num_rows: int
    num_columns: int


def seen_part(size: tuple[int, int], grid: tuple[int, int]) -> SeenPart:
    """Return where in ``grid`` of patches an image is whose height and width are ``size``; margins are even."""
    (height, width), (rows, columns) = size, grid
    if width / height > columns / rows:
        top = (rows - int(round(height * (columns / width), 7))) // 2
        return SeenPart(top, 0, rows - 2 * top, columns)
    left = (columns - int(round(width * (rows / height), 7))) // 2
    return SeenPart(0, left, rows, columns - 2 * left)


def read_resolutions(settings: ImageSettings) -> list[tuple[int, int]]:
    """Return the heights and widths that tiles can make. Raises ``ModelUnreadable``."""
    pinpoints = settings.values.get("image_grid_pinpoints") or _PINPOINTS
    if not isinstance(pinpoints, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pinpoints):
        raise settings.bad("image_grid_pinpoints", pinpoints, "pairs of a height and a width")
    return [(int(height), int(width)) for height, width in pinpoints]


def best_resolution(size: tuple[int, int], resolutions: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the first of those that keep most of an image's pixels and have least beside them."""
    height, width = size

    def kept_and_wasted(resolution: tuple[int, int]) -> tuple[int, int]:
        scale = min(resolution[1] / width, resolution[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - resolution[0] * resolution[1]

    return max(resolutions, key=kept_and_wasted)
