"""Idefics3 and SmolVLM: an image in square tiles, each named by row and column in the prompt, and once more as a whole.

Laurencon et al., "Building and better understanding vision-language models" (2024); Marafioti et al., "SmolVLM" (2025).
"""

import math
from collections.abc import Sequence
from itertools import product

import numpy as np
from PIL.Image import Image

from penstock.images.processor import Expansion, Prepared
from penstock.images.settings import SeeingFiles
from penstock.images.shown import Detail

_LONGEST = 4096
"""No image becomes longer, whatever the settings say."""
_AROUND, _WHOLE = "<fake_token_around_image>", "<global-img>"


class Idefics3Processor:
    """See ``processor.Processor``. Every tile is a picture."""

    video_marker: str | None = None
    video_placeholder: str | None = None

    def __init__(self, files: SeeingFiles) -> None:
        """Read sizes. Raises ``ModelUnreadable``."""
        self.placeholder = self.image_marker = "<image>"
        image, vision = files.image, files.model.part("vision_config")
        size, tile = image.size("size"), image.size("max_image_size")
        if set(size) != {"longest_edge"} or set(tile) != {"longest_edge"}:
            raise image.bad("size", image.values.get("size"), "a longest_edge, as of max_image_size")
        self._edge = size["longest_edge"] if image.flag("do_resize", True) else None
        self._tile = tile["longest_edge"]
        if vision.integer("image_size", 224) != self._tile:
            raise vision.bad("image_size", vision.values.get("image_size"), f"the {self._tile} of max_image_size")
        self._splits = image.flag("do_image_splitting", True)
        self._resampling = image.resampling()
        self.most_pixels, self.most_tiles = self._tile**2, 1
        grid = self._tile // vision.integer("patch_size", 32)
        self._num_tokens = grid**2 // files.model.integer("scale_factor", 2) ** 2

    def image(self, image: Image, detail: Detail) -> Expansion:
        """Prepare an RGB image; where ``detail`` is low, as a whole alone."""
        size, tile = (image.height, image.width), self._tile
        if self._edge is not None:
            image = self._resized(image, *longest_edge_size(*size, self._edge))
        tokens = self.placeholder * self._num_tokens
        text, tiles = "", []
        if self._splits and detail != "low":
            image = self._resized(image, *_multiples(image.height, image.width, tile))
            rows, columns = image.height // tile, image.width // tile
            if rows * columns > 1:
                for row, column in product(range(rows), range(columns)):
                    left, top = column * tile, row * tile
                    tiles.append(image.crop((left, top, left + tile, top + tile)))
                    text += f"{_AROUND}<row_{row + 1}_col_{column + 1}>{tokens}"
                    text += "\n" if column == columns - 1 else ""
                text += "\n"
        tiles.append(self._resized(image, tile, tile))
        text += f"{_AROUND}{_WHOLE}{tokens}{_AROUND}"
        pictures = tuple(
            Prepared(pixels=np.asarray(tile)[None], num_tokens=self._num_tokens, size=size) for tile in tiles
        )
        return Expansion(text=text, pictures=pictures)

    def video(self, frames: Sequence[Image], frames_per_s: float) -> Expansion:
        """Never asked for: there is no marker."""
        raise NotImplementedError

    def _resized(self, image: Image, height: int, width: int) -> Image:
        return image.resize((width, height), self._resampling)


def longest_edge_size(height: int, width: int, edge: int) -> tuple[int, int]:
    """Return height and width with the longer one ``edge``, the shorter one made even, and neither above 4096."""
    aspect = width / height
    if width >= height:
        height, width = int(edge / aspect), edge
        height = max(height + height % 2, 1)
    else:
        height, width = edge, int(edge * aspect)
        width = max(width + width % 2, 1)
    aspect = width / height
    if width >= height and width > _LONGEST:
        height, width = max(int(_LONGEST / aspect), 1), _LONGEST
    elif height > width and height > _LONGEST:
        height, width = _LONGEST, max(int(_LONGEST * aspect), 1)
    return height, width


def _multiples(height: int, width: int, tile: int) -> tuple[int, int]:
    """Return the multiples of ``tile`` that tiles are cut from."""
    aspect = width / height
    if width >= height:
        width = math.ceil(width / tile) * tile
        return math.ceil(int(width / aspect) / tile) * tile, width
    height = math.ceil(height / tile) * tile
    return height, math.ceil(int(height * aspect) / tile) * tile
