"""Gemma 3: every image becomes one square; a long one may be cut into squares besides.

Gemma Team, "Gemma 3 Technical Report" (2025).
"""

import math
from collections.abc import Sequence
from itertools import product

from PIL.Image import Image

from penstock.images.pixels import ToOneSize
from penstock.images.processor import Expansion, Prepared
from penstock.images.settings import SeeingFiles
from penstock.images.shown import Detail


class Gemma3Processor:
    """See ``processor.Processor``. Every crop is a picture."""

    image_marker = "<start_of_image>"
    video_marker: str | None = None
    placeholder = "<image_soft_token>"
    video_placeholder: str | None = None

    def __init__(self, files: SeeingFiles) -> None:
        """Read sizes. Raises ``ModelUnreadable``."""
        image, vision = files.image, files.model.part("vision_config")
        self._to_one_size = ToOneSize(image)
        if self._to_one_size.height_and_width != (vision.integer("image_size", 224),) * 2:
            raise image.bad("size", image.values.get("size"), "that of config.json's vision_config.image_size")
        self.most_pixels, self.most_tiles = math.prod(self._to_one_size.height_and_width), 1
        self._num_tokens = files.model.integer("mm_tokens_per_image", 256)
        self._text = f"\n\n<start_of_image>{self.placeholder * self._num_tokens}<end_of_image>\n\n"
        self._crops = image.flag("do_pan_and_scan")
        self._least_crop = image.integer("pan_and_scan_min_crop_size", 256)
        self._most_crops = image.integer("pan_and_scan_max_num_crops", 4)
        self._least_ratio = float(image.values.get("pan_and_scan_min_ratio_to_activate") or 1.2)

    def image(self, image: Image, detail: Detail) -> Expansion:
        """Prepare an RGB image; where ``detail`` is low, as a whole alone."""
        crops = self._cut(image) if self._crops and detail != "low" else []
        size = (image.height, image.width)
        pictures = tuple(
            Prepared(pixels=self._to_one_size(part)[None], num_tokens=self._num_tokens, size=size)
            for part in (image, *crops)
        )
        text = self._text
        if crops:
            text = f"Here is the original image {text} and here are some crops to help you see better " + " ".join(
                [text] * len(crops)
            )
        return Expansion(text=text, pictures=pictures)

    def video(self, frames: Sequence[Image], frames_per_s: float) -> Expansion:
        """Never asked for: there is no marker."""
        raise NotImplementedError

    def _cut(self, image: Image) -> list[Image]:
        """Return an image that is long enough in a row of pieces, as near to squares as may be."""
        long, short = max(image.size), min(image.size)
        if long / short < self._least_ratio:
            return []
        count = min(long // self._least_crop, math.floor(long / short + 0.5))
        count = min(max(count, 2), self._most_crops)
        along = math.ceil(long / count)
        if min(along, short) < self._least_crop:
            return []
        columns, rows = (count, 1) if image.width >= image.height else (1, count)
        width, height = math.ceil(image.width / columns), math.ceil(image.height / rows)
        return [
            image.crop((x * width, y * height, min((x + 1) * width, image.width), min((y + 1) * height, image.height)))
            for y, x in product(range(rows), range(columns))
        ]
