"""What reads images for a model; apart from its text, which the engine's process reads too."""

from typing import TYPE_CHECKING

from penstock.images.config import ImageConfig
from penstock.launch.settings import ModelSettings
from penstock.launch.text import directory_of
from penstock.models import find_shape, read_config

if TYPE_CHECKING:
    from penstock.images.reader import ImageReader


def load_images(model: ModelSettings, config: ImageConfig) -> "ImageReader | None":
    """Return what reads images for ``model``; None if it sees none, as a shape does. Raises ``ModelUnreadable``."""
    if find_shape(model.name) or read_config(directory_of(model)).vision is None:
        return None
    # Only now: they bring numpy, Pillow and aiohttp.
    from penstock.images.families import load_processor
    from penstock.images.reader import ImageReader

    processor = load_processor(directory_of(model), config)
    return None if processor is None else ImageReader(processor, config)
