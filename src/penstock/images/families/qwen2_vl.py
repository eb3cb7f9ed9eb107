"""Qwen2-VL and Qwen2.5-VL: images keep their shape, and their size within bounds; videos are images with a time.

Wang et al., "Qwen2-VL" (2024), and Bai et al., "Qwen2.5-VL" (2025). Equal to transformers' processors: an image's on
Pillow, and a video's but for its filter, which is Pillow's here too.
"""

import math
from collections.abc import Sequence

import numpy as np
from PIL.Image import Image

from penstock.errors import InvalidImage
from penstock.images.processor import Expansion, Prepared
from penstock.images.settings import ImageSettings, SeeingFiles
from penstock.images.shown import Detail

_IMAGE, _VIDEO = "<|image_pad|>", "<|video_pad|>"
"""What the chat template writes between tokens that say where vision begins and ends, and placeholders"""
_LOW_PIXELS = 512 * 512
"""Pixels of an image that is wanted in low detail, at most: OpenAI's low is a square of 512"""
_MOST_ELONGATED = 200
_SAMPLED_PER_S = 2.0
"""Frames that are taken of a second of video, as the models were trained"""
_LEAST_FRAMES, _MOST_FRAMES = 4, 768
"""Of a video that has more than are taken"""
_VIDEO_TOKENS = 115_200
"""Tokens that a video may become, should its frames not be small already: 90% of a context of 128,000"""


class Qwen2VLProcessor:
    """See ``processor.Processor``."""

    placeholder = image_marker = _IMAGE
    video_placeholder: str | None = _VIDEO
    video_marker: str | None = _VIDEO
    most_tiles = 1

    def __init__(self, files: SeeingFiles, most_pixels: int, tokens_per_s: int | None) -> None:
        """Read sizes, of which none is to exceed ``most_pixels`` unless the least the checkpoint takes does.

        ``tokens_per_s`` is how far a second of video moves positions, None: frames are counted. Raises
        ``ModelUnreadable``.
        """
        vision, image = files.model.part("vision_config"), files.image
        self._tokens_per_s = tokens_per_s
        patch_size, merge_size = vision.integer("patch_size", 14), vision.integer("spatial_merge_size", 2)
        self._factor = patch_size * merge_size
        self._frames_each = vision.integer("temporal_patch_size", 2)
        wanted = {"patch_size": patch_size, "merge_size": merge_size, "temporal_patch_size": self._frames_each}
        for key, value in wanted.items():
            if image.integer(key, value) != value:
                raise image.bad(key, image.values[key], f"the {value} that vision_config in config.json has")
        if not image.flag("do_resize", True):
            raise image.bad("do_resize", False, "images to be resized to whole patches")
        self._resampling = image.resampling()
        self._bounds = _pixel_bounds(image, 56 * 56, 28 * 28 * 1280, most_pixels)
        self._video_bounds = _pixel_bounds(files.video, 128 * 28 * 28, 28 * 28 * 768, most_pixels)
        most = max(self._bounds[1], self._video_bounds[1], int(1.05 * self._video_bounds[0]))
        # The most elongated image is a single row of tokens, which cannot be made narrower.
        self.most_pixels = max(most, self._factor * math.isqrt(_MOST_ELONGATED * most))

    def image(self, image: Image, detail: Detail) -> Expansion:
        """Prepare an RGB image. Raises ``InvalidImage`` for one too elongated."""
        least, most = self._bounds
        if detail == "low":
            most = max(least, min(most, _LOW_PIXELS))
        return self._expand([image], least, most, _IMAGE)

    def video(self, frames: Sequence[Image], frames_per_s: float) -> Expansion:
        """Prepare RGB frames of one size, of which two a second are taken. Raises ``InvalidImage`` as for images."""
        num_frames = len(frames)
        if frames_per_s > _SAMPLED_PER_S:
            num_taken = min(max(num_frames / frames_per_s * _SAMPLED_PER_S, _LEAST_FRAMES), _MOST_FRAMES, num_frames)
            num_taken = max(1, int(num_taken) // self._frames_each) * self._frames_each
            frames = [frames[i * num_frames // num_taken] for i in range(num_taken)]
            frames_per_s *= num_taken / num_frames
        seconds_each = self._frames_each / frames_per_s
        least, most = self._video_bounds
        share = _VIDEO_TOKENS * self._factor**2 * self._frames_each // len(frames)
        if share < most:
            most = max(share, int(least * 1.05))
        time_step = 1.0 if self._tokens_per_s is None else self._tokens_per_s * seconds_each
        return self._expand(frames, least, most, _VIDEO, time_step)

    def _expand(
        self, frames: Sequence[Image], least: int, most: int, placeholder: str, time_step: float = 1.0
    ) -> Expansion:
        first = frames[0]
        height, width = fitting_size(first.height, first.width, self._factor, least, most)
        pixels = np.stack([np.asarray(frame.resize((width, height), self._resampling)) for frame in frames])
        grid = (-(-len(frames) // self._frames_each), height // self._factor, width // self._factor)
        num_tokens = math.prod(grid)
        picture = Prepared(
            pixels=pixels,
            num_tokens=num_tokens,
            size=(first.height, first.width),
            grid=grid,
            time_step=time_step,
        )
        return Expansion(text=placeholder * num_tokens, pictures=(picture,))


def qwen2_vl_processor(files: SeeingFiles, most_pixels: int) -> Qwen2VLProcessor:
    """Return a Qwen2-VL's processor: in positions, a video's frames just count. Raises ``ModelUnreadable``."""
    return Qwen2VLProcessor(files, most_pixels, None)


def qwen2_5_vl_processor(files: SeeingFiles, most_pixels: int) -> Qwen2VLProcessor:
    """Return a Qwen2.5-VL's processor: positions follow a video's clock. Raises ``ModelUnreadable``."""
    return Qwen2VLProcessor(files, most_pixels, files.model.part("vision_config").integer("tokens_per_second", 4))


def fitting_size(height: int, width: int, factor: int, least: int, most: int) -> tuple[int, int]:
    """Return the height and width, multiples of ``factor``, that an image is resized to.

    As near to its shape as ``least`` and ``most`` pixels in all allow. Raises ``InvalidImage`` for one too elongated.
    """
    if max(height, width) > _MOST_ELONGATED * min(height, width):
        raise InvalidImage(
            f"an image of {width} x {height} pixels is too elongated: one side may be {_MOST_ELONGATED} times as long "
            "as the other; crop it"
        )
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > most:
        shrink = math.sqrt(height * width / most)
        new_height, new_width = (max(factor, int(side / shrink / factor) * factor) for side in (height, width))
    elif new_height * new_width < least:
        grow = math.sqrt(least / (height * width))
        new_height, new_width = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return new_height, new_width


def _pixel_bounds(settings: ImageSettings, least: int, most: int, most_wanted: int) -> tuple[int, int]:
    """Return how few and how many pixels an image may have; newer files keep that under ``size``, in its own words.

    ``least`` and ``most`` where they do not say; no more than ``most_wanted``, but the least in any case.
    """
    size = settings.part("size")
    least = size.integer("shortest_edge", size.integer("min_pixels", least))
    most = size.integer("longest_edge", size.integer("max_pixels", most))
    least, most = settings.integer("min_pixels", least), settings.integer("max_pixels", most)
    return least, max(least, min(most, most_wanted))
