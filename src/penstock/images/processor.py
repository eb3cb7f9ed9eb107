"""What a family makes of an image before its encoder sees it: pixels, and the text that stands for it in the prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL.Image import Image

from penstock.images.shown import Detail


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """One ``protocol.Picture`` before it has a place in a prompt."""

    pixels: npt.NDArray[np.uint8]
    """[frames or tiles, height, width, 3], resized, cropped and padded, not normalized"""
    num_tokens: int
    size: tuple[int, int]
    """Height and width of the image that tiles were cut from"""
    grid: tuple[int, int, int] | None = None
    """(time, rows, columns) of its tokens, for families whose positions have three axes"""
    time_step: float = 1.0
    """What one step of the grid's time adds to positions"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expansion:
    """What one image or video becomes."""

    text: str
    """What takes the marker's place in the prompt. Each of ``pictures`` has its placeholder tokens in it, in order"""
    pictures: tuple[Prepared, ...]


class Processor(Protocol):
    """A family's preparation of images, on Pillow and numpy, equal to transformers' before normalization.

    Immutable; called from several threads.
    """

    image_marker: str
    """What the chat template writes for an image"""
    video_marker: str | None
    """And for a video; None: the family sees none"""
    placeholder: str
    """The token that stands for one row of an image's features"""
    video_placeholder: str | None
    """And of a video's"""

    most_pixels: int
    """Of the largest image, tile or frame that an encoder sees by itself"""
    most_tiles: int
    """Of a picture, itself included"""

    def image(self, image: Image, detail: Detail) -> Expansion:
        """Prepare an RGB image."""

    def video(self, frames: Sequence[Image], frames_per_s: float) -> Expansion:
        """Prepare RGB frames of one size, taken ``frames_per_s``. Only where there is a ``video_marker``."""
