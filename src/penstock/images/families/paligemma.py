"""PaliGemma 1 and 2: every image becomes one square, and each patch of it a token.

Beyer et al., "PaliGemma: A versatile 3B VLM for transfer" (2024).
"""

from collections.abc import Sequence

from PIL.Image import Image

from penstock.images.pixels import ToOneSize
from penstock.images.processor import Expansion, Prepared
from penstock.images.settings import SeeingFiles
from penstock.images.shown import Detail


class PaliGemmaProcessor:
    """See ``processor.Processor``."""

    video_marker: str | None = None
    video_placeholder: str | None = None
    placeholder = image_marker = "<image>"

    def __init__(self, files: SeeingFiles) -> None:
        """Read sizes. Raises ``ModelUnreadable``."""
        image, vision = files.image, files.model.part("vision_config")
        self._to_one_size = ToOneSize(image)
        side = vision.integer("image_size", 224)
        if self._to_one_size.height_and_width != (side, side):
            raise image.bad("size", image.values.get("size"), f"the {side} of config.json's vision_config.image_size")
        self.most_pixels, self.most_tiles = side**2, 1
        self._num_tokens = (side // vision.integer("patch_size", 16)) ** 2
        if image.integer("image_seq_length", self._num_tokens) != self._num_tokens:
            raise image.bad("image_seq_length", image.values["image_seq_length"], f"one of {self._num_tokens} patches")

    def image(self, image: Image, detail: Detail) -> Expansion:
        """Prepare an RGB image; there is only one detail."""
        pixels = self._to_one_size(image)[None]
        prepared = Prepared(pixels=pixels, num_tokens=self._num_tokens, size=(image.height, image.width))
        return Expansion(text=self.placeholder * self._num_tokens, pictures=(prepared,))

    def video(self, frames: Sequence[Image], frames_per_s: float) -> Expansion:
        """Never asked for: there is no marker."""
        raise NotImplementedError
