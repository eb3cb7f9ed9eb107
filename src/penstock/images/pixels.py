"""What families do to an image's pixels, as transformers does it with Pillow and numpy."""

import numpy as np
import numpy.typing as npt
from PIL import Image

from penstock.images.settings import ImageSettings

Pixels = npt.NDArray[np.uint8]
"""[height, width, 3]"""


class ToOneSize:
    """Brings any image to the size that an encoder reads: pad, resize, crop, each if the settings say so."""

    def __init__(self, settings: ImageSettings) -> None:
        """Read how. Raises ``ModelUnreadable``."""
        self._size = settings.size("size") if settings.flag("do_resize", True) else None
        crops = settings.flag("do_center_crop", "crop_size" in settings.values)
        self._crop = settings.height_and_width("crop_size") if crops else None
        self._resampling = settings.resampling()
        self._background: tuple[int, ...] | None = None
        if settings.flag("do_pad"):
            self._background = tuple(int(value * 255) for value in settings.normalization().mean)
        if self._crop is None and (self._size is None or set(self._size) != {"height", "width"}):
            raise settings.bad("size", settings.values.get("size"), "a height and a width, or a crop_size")

    @property
    def height_and_width(self) -> tuple[int, int]:
        """The size of what comes out."""
        if self._crop is not None:
            return self._crop
        assert self._size is not None
        return self._size["height"], self._size["width"]

    def __call__(self, image: Image.Image) -> Pixels:
        """Return the pixels of an RGB image."""
        if self._background is not None:
            image = padded_to_square(image, self._background)
        if self._size is not None:
            height, width = resized_size(image.height, image.width, self._size)
            image = image.resize((width, height), self._resampling)
        pixels = np.asarray(image)
        return pixels if self._crop is None else center_cropped(pixels, *self._crop)


def resized_size(height: int, width: int, size: dict[str, int]) -> tuple[int, int]:
    """Return the height and width that ``size`` makes of an image's."""
    if "height" in size:
        return size["height"], size["width"]
    short, long = min(height, width), max(height, width)
    new_short = size["shortest_edge"]
    new_long = int(new_short * long / short)
    return (new_long, new_short) if width <= height else (new_short, new_long)


def center_cropped(pixels: Pixels, height: int, width: int) -> Pixels:
    """Return the middle of ``pixels``, black where there is none."""
    found = pixels.shape[:2]
    if found[0] < height or found[1] < width:
        outer = max(height, found[0]), max(width, found[1])
        top, left = (-(-(new - old) // 2) for new, old in zip(outer, found, strict=True))
        padded = np.zeros((*outer, 3), dtype=np.uint8)
        padded[top : top + found[0], left : left + found[1]] = pixels
        top += (found[0] - height) // 2
        left += (found[1] - width) // 2
        return padded[max(0, top) : top + height, max(0, left) : left + width]
    top, left = (found[0] - height) // 2, (found[1] - width) // 2
    return pixels[top : top + height, left : left + width]


def padded_to_square(image: Image.Image, background: tuple[int, ...]) -> Image.Image:
    """Return ``image`` in the middle of the smallest square that holds it."""
    side = max(image.size)
    if image.width == image.height:
        return image
    square = Image.new("RGB", (side, side), background)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
