"""LLaVA 1.5: every image becomes one square, and each patch of it a token."""

import math
from collections.abc import Sequence

from PIL.Image import Image

from penstock.images.pixels import ToOneSize
from penstock.images.processor import Expansion, Prepared
from penstock.images.settings import SeeingFiles
from penstock.images.shown import Detail


class LlavaProcessor:
    """See ``processor.Processor``."""

    video_marker: str | None = None
    video_placeholder: str | None = None

    def __init__(self, files: SeeingFiles) -> None:
        """Read sizes. Raises ``ModelUnreadable``."""
        self.placeholder = self.image_marker = files.processor.text("image_token", "<image>")
        self._to_one_size = ToOneSize(files.image)
        self._num_tokens = num_features(files, *self._to_one_size.height_and_width)
        self.most_pixels, self.most_tiles = math.prod(self._to_one_size.height_and_width), 1

    def image(self, image: Image, detail: Detail) -> Expansion:
        """Prepare an RGB image; there is only one detail."""
        pixels = self._to_one_size(image)[None]
        prepared = Prepared(pixels=pixels, num_tokens=self._num_tokens, size=(image.height, image.width))
        return Expansion(text=self.placeholder * self._num_tokens, pictures=(prepared,))

    def video(self, frames: Sequence[Image], frames_per_s: float) -> Expansion:
        """Never asked for: there is no marker."""
        raise NotImplementedError


def num_features(files: SeeingFiles, height: int, width: int) -> int:
    """Return how many rows of features an image of this size has. Raises ``ModelUnreadable``."""
    vision = files.model.part("vision_config")
    is_clip = vision.text("model_type", "clip_vision_model") == "clip_vision_model"
    patch_size = vision.integer("patch_size", 32 if is_clip else 16)
    if (height, width) != (vision.integer("image_size", 224),) * 2:
        raise vision.bad("image_size", vision.values.get("image_size"), f"the {height} x {width} that images come in")
    # CLIP puts one before the patches; by default the first is dropped, whatever it is.
    drops_first = files.model.text("vision_feature_select_strategy", "default") == "default"
    return (height // patch_size) * (width // patch_size) + is_clip - drops_first
